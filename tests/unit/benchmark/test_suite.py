"""All measurements by one command: each is a command line that works, what is there is kept, failures are told."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.benchmark.figures import aligned, figures_of, main_figures
from megagpt.benchmark.machine import command_of
from megagpt.benchmark.measurements import date_measured
from megagpt.benchmark.suite import CPU, GPU, Entry, run_suite, summary
from megagpt.config import load_config
from megagpt.errors import UsageError
from tests.forked import run_module
from tests.unit.benchmark.results import measurement, write_all
from tools.benchmark import _chosen

ENTRIES = (*CPU, *GPU)
CHECKOUT = Path(__file__).parents[3]
FAST = "corpus --parts signatures --megabytes 0.1 --repeats 1"


def test_names_are_of_one_measurement_each():
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert all(re.fullmatch(r"[a-z0-9_]+", entry.name) for entry in ENTRIES)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_measurement_is_a_command_line_that_works(entry: Entry, tmp_path: Path):
    command, *words = entry.arguments(Path("model.py"))
    text = run_module("tools.benchmark", command, "--help").stdout
    assert [word for word in words if word.startswith("--") and word not in text] == []
    if command in ("train", "growth"):
        end = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
        changes = [word for option, word in itertools.pairwise(words) if option == "--against"]
        for more in ([], *(change.split() for change in changes)):
            load_config(words[0], [*words[1:end], *more])


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.targets], ids=lambda entry: entry.name)
def test_targets_are_of_figures_that_the_result_has(entry: Entry):
    names = {figure.name for figure in figures_of(measurement(entry), entry.targets) if figure.target}
    assert names
    assert names <= set(entry.targets)


def test_nanogpt_takes_part_where_it_is_given():
    entry = Entry("a", "A", "train configs/small.yaml --steps 3", nanogpt=True)
    words = ["train", "configs/small.yaml", "--steps", "3"]
    assert entry.arguments() == words
    assert entry.arguments(Path("x/model.py")) == [*words, "--nanogpt", "x/model.py"]


def test_figures_are_those_of_the_result_beside_their_targets():
    (train,) = [entry for entry in CPU if entry.name == "train_small"]
    figures = {figure.name: figure for figure in figures_of(measurement(train), train.targets)}
    assert figures["speedup over nanogpt, compiled"].cells() == (
        "speedup over nanogpt, compiled", "1.25 x", "1 to 1.5", ">= 1.3 x", "MISSED",
    )  # fmt: skip
    assert figures["speedup over nanogpt"].met is True
    assert figures["speedup over plain"].cells()[2:] == ("1.25 to 1.75", "", "")
    assert figures["megagpt: step"].cells()[1] == "2 s"
    assert figures["megagpt: speed"].cells()[1] == "4,096 tokens/s"
    assert [figure.name for figure in main_figures(list(figures.values()))] == list(train.targets)[::-1]


def test_a_result_that_no_reader_knows_shows_its_judged_figures():
    (figure,) = figures_of(measurement(Entry("new", "New", "new --fast")))
    assert figure.cells() == ("something else", "5 s", "2.5 to 10", "<= 6 s", "met")
    assert aligned([figure]) == [
        "figure          measured  range      target",
        "something else  5 s       2.5 to 10  <= 6 s  met",
    ]


def test_the_summary_has_what_was_measured(tmp_path: Path):
    write_all(tmp_path / "runs")
    names = [figure.name.partition(":")[0] for figure in summary(ENTRIES, tmp_path / "runs")]
    assert list(dict.fromkeys(names)) == [entry.name for entry in ENTRIES]
    assert summary(ENTRIES, tmp_path / "none") == []


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"--only b,c: choose from a$"):
        _chosen([Entry("a", "A", "data")], "a, b,c")


def test_what_was_measured_by_the_same_command_is_kept(tmp_path: Path):
    lines: list[str] = []
    entry = Entry("data", "Data", "no-such-command")
    words = entry.arguments()
    (tmp_path / "data.json").write_text(json.dumps(measurement(entry, command=command_of(words))))
    assert run_suite([entry], tmp_path, None, fresh=False, report=lines.append) == []
    assert lines == ["[1/1] data: kept, measured 2026-03-04T05:06:07+00:00"]


@pytest.mark.parametrize("content", [None, "{", "[]", "7"])
def test_what_is_damaged_or_of_another_command_is_measured_anew(content: str | None, tmp_path: Path):
    entry = Entry("data", "Data", "data --repeats 2")
    path = tmp_path / "data.json"
    path.write_text(content or json.dumps(measurement(entry, command=command_of(["data", "--repeats", "3"]))))
    assert date_measured(path, entry.arguments()) is None


@pytest.mark.slow
def test_others_are_measured_after_one_that_fails(tmp_path: Path):
    lines: list[str] = []
    bad, good = entries = [Entry("bad", "Bad", "train nowhere.yaml"), Entry("good", "Good", FAST)]
    assert run_suite(entries, tmp_path, None, fresh=False, report=lines.append) == ["bad"]
    assert lines[0] == "[1/2] bad: tools.benchmark train nowhere.yaml"
    log = tmp_path / "bad.log"
    assert re.fullmatch(rf"\[1/2\] bad: FAILED: nowhere.yaml.*; see {re.escape(str(log))}", lines[1])
    assert {file.name for file in tmp_path.iterdir()} == {"bad.log", "good.json"}
    result = json.loads((tmp_path / "good.json").read_text())
    assert (result["command"], result["benchmark"]) == (command_of(good.arguments()), "corpus")
    assert [figure.name for figure in summary([bad, good], tmp_path)] == ["good: signatures, one core"]
    assert run_suite([good], tmp_path, None, fresh=False, report=lines.append) == []
    assert lines[-1] == f"[1/1] good: kept, measured {result['date']}"


def start(*arguments: object, scratch: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tools.benchmark", "all", *map(str, arguments)]
    environment = os.environ | {"TMPDIR": str(scratch), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=CHECKOUT
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "error: terminated\n")],
)
def test_an_interrupt_ends_the_measurement_and_is_one_line(number: int, code: int, line: str, tmp_path: Path):
    scratch, output = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    with start("--only", "data", "--output", output, scratch=scratch) as process:
        until = time.monotonic() + 120
        while not any(scratch.glob("megagpt_benchmark_*")) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, line)
    assert said == "[1/1] data: tools.benchmark data\n"
    assert list(scratch.iterdir()) == []
    assert list(output.iterdir()) == []


@pytest.mark.slow
def test_the_command_lists_and_refuses():
    listed = run_module("tools.benchmark", "all", "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [entry.name for entry in ENTRIES]
    assert all(re.match(r"\S+ +python -m tools\.benchmark \w", line) for line in listed)
    for options, message in (
        (["--only", "nothing"], "error: --only nothing: choose from "),
        (["--nanogpt", "none.py"], "error: --nanogpt none.py: no such file; give the model.py of a checkout"),
        (["--output", __file__], f"error: --output {__file__}"),
    ):
        done = run_module("tools.benchmark", "all", *options)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(message)
