"""The command: its errors, its output, and that neither workers nor kills change a byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.forked import run_module
from tests.unit.corpus.test_pipeline import contents
from tests.unit.corpus.texts import document, edited, write_jsonl

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tools.preprocess", *map(str, arguments)]


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 MB: lines, their near-copies, a Parquet file of many row groups, and a few files of text."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(11)
    texts = [document(rng, rng.randrange(20, 600)) for _ in range(1000)]
    texts += [edited(text, rng, 1) for text in texts[:200]]
    write_jsonl(folder / "a.jsonl", texts[:600])
    write_jsonl(folder / "b.jsonl", texts[600:])
    rows = [document(rng, 300) for _ in range(300)]
    pq.write_table(pa.table({"text": rows}), folder / "c.parquet", row_group_size=10)
    for number in range(50):
        (folder / f"{number}.txt").write_text(document(rng, 300))
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker makes of it, uninterrupted."""
    output = tmp_path_factory.mktemp("expected") / "out"
    result = run("--input", corpus, "--output", output, "--tokenizer", "bytes", "--workers", 1)
    assert (result.returncode, result.stderr) == (0, "")
    return contents(output)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_makes_the_same_bytes_and_tells_what_it_did(
    corpus: Path, expected: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    output = tmp_path / "out"
    arguments = ("--input", corpus, "--output", output, "--tokenizer", "bytes", "--workers", workers)
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert contents(output) == expected
    assert list(tmp_path.iterdir()) == [output]
    counts = json.loads(expected["manifest.json"])["counts"]
    lines = dict(
        line.rsplit(maxsplit=1) for line in result.stdout.splitlines() if line.startswith(("documents", "rem"))
    )
    assert lines["documents in"] == "1,550"
    assert lines["removed: near-duplicates"] == str(counts["removed_near"])
    assert counts["removed_near"] > 150
    assert "MB/s" in result.stdout
    again = run(*arguments)
    assert again.returncode == 0
    assert "already finished by an earlier run of the same plan; nothing to do" in again.stdout


def test_an_interrupt_ends_the_run_quietly_and_keeps_what_was_done(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("execution: {chunk_mb: 0.1}\n")
    arguments = ("--config", tmp_path / "config.yaml", "--input", corpus, "--output", tmp_path / "out", "--workers", 2)
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: bool(list(tmp_path.glob("out.work/*/extract/0*"))))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert list(tmp_path.glob("out.work/*/extract/0*"))


@pytest.mark.parametrize("seconds", [0, 0.1, 0.3])
def test_an_interrupt_while_the_workers_start_is_as_quiet(corpus: Path, tmp_path: Path, seconds: float) -> None:
    process = start(corpus, tmp_path)
    wait_until(lambda: len(children_of(process.pid)) >= 2)  # multiprocessing's resource tracker and fork server
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "error: interrupted\n")


def test_a_request_to_end_ends_the_run_with_its_workers_in_one_line(corpus: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path)
    wait_until(lambda: bool(list(tmp_path.glob("out.work/*/*/.0*"))))
    workers = [int(path.name.rpartition(".")[2]) for path in tmp_path.glob("out.work/*/*/.0*")]
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (143, "error: terminated; run the same command again to go on\n")
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    assert not (tmp_path / ".out.lock").exists()


def start(corpus: Path, folder: Path) -> "subprocess.Popen[str]":
    """A run of many small tasks, in a process group of its own."""
    (folder / "config.yaml").write_text("execution: {chunk_mb: 0.1}\n")
    arguments = ("--config", folder / "config.yaml", "--input", corpus, "--output", folder / "out", "--workers", 2)
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_paths_that_look_like_markup_or_are_no_text_are_shown_and_used(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "[bold] [/red] :smile:" / "a\x7f: b.jsonl", ["one", "broken"])
    output = tmp_path / "[/x] :smile:"
    result = run("--input", tmp_path / "[bold] [/red] :smile:", "--output", output, "--tokenizer", "bytes")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"written: {output};" in result.stdout
    odd = tmp_path / "odd\udcff\n"
    result = run("--input", tmp_path / "[bold] [/red] :smile:", "--output", odd, "--tokenizer", "bytes")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"written: {str(odd)!r};" in result.stdout
    assert (odd / "train.bin").is_file()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--output", "OUT"], 2, "input: required, but not given"),
        (["--input", "IN"], 2, "output: required, but not given"),
        (["--input", "IN", "--output", "OUT", "--filters"], 2, "No such option: --filters"),
        (["--input", "IN", "--output", "OUT", "--format", "word"], 2, "format: expected auto, text, jsonl"),
        (["--input", "IN", "--output", "OUT", "--split", "test"], 2, "--split test: give a name and a share"),
        (["--input", "IN", "--output", "OUT", "--split", "a=.1", "--split", "a=.2"], 2, "a has a share of 0.1 already"),
        (["--input", "IN", "--output", "OUT", "--split", "train=0.1"], 2, "a split cannot be called 'train'"),
        (["--input", "IN", "--output", "OUT", "--decontaminate", "no.jsonl"], 1, "no.jsonl: no such file"),
        (["--input", "IN", "--output", "OUT", "--dedup", "fuzzy"], 2, "'fuzzy' is not one of"),
        (["--input", "IN", "--output", "OUT", "--workers", "0"], 2, "workers: expected a whole number above 0"),
        (["--input", "IN", "--output", "OUT", "--threshold", "2"], 2, "dedup.threshold: expected a number above 0"),
        (
            ["--input", "IN", "--output", "OUT", "--validation-fraction", "1"],
            2,
            "expected a number at least 0 and below 1",
        ),
        (["--input", "IN", "--output", "OUT", "--max-bad", "-1"], 2, "max_bad: expected a number at least 0"),
        (["--input", "IN", "--output", "OUT", "--tokenizer", "gtp2"], 2, "did you mean gpt2?"),
        (["--input", "IN", "--output", ""], 2, "--output '': is no folder that a dataset could become"),
        (["--input", "IN", "--output", "OUT", "--work-dir", "OUT/work"], 2, "OUT/work: lies in --output"),
        (["--input", "IN", "--output", "OUT", "--config", "no.yaml"], 2, "no.yaml: cannot read the configuration file"),
        (
            ["--input", "IN", "--output", "OUT", "--config", "WRONG"],
            2,
            "dedup.treshold: unknown key; did you mean dedup.threshold?",
        ),
        (["--input", "nowhere/*.jsonl", "--output", "OUT"], 1, "input nowhere/*.jsonl: no such file, folder or match"),
        (["--input", "IN", "--output", "IN/0.txt"], 1, "exists, and is not a token dataset"),
        (["--input", "BAD", "--output", "OUT"], 1, "1 of 2 documents cannot be read (50.0%, more than --max-bad 0.01)"),
        (["--input", "BAD", "--output", "OUT", "--text-key", "body"], 1, "missing key (no key 'body' among 'text')"),
        (
            ["--input", "IN/c.parquet", "--output", "OUT", "--text-key", "body"],
            1,
            "c.parquet, row 0: missing column (no column 'body' among 'text'",
        ),
        (["--input", "IN", "--output", "/proc/out"], 1, "output /proc/out: cannot be written: "),
        (["--input", "IN", "--output", "OUT", "--work-dir", "/proc/work"], 1, "work folder /proc/work/"),
    ],
)
def test_each_mistake_has_one_line_and_its_exit_code(
    corpus: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nbroken\n')
    (tmp_path / "wrong.yaml").write_text("dedup: {treshold: 0.7}\n")
    names = {
        "IN/0.txt": corpus / "0.txt",
        "IN/c.parquet": corpus / "c.parquet",
        "IN": corpus,
        "OUT": tmp_path / "out",
        "OUT/work": tmp_path / "out/work",
        "BAD": tmp_path / "bad.jsonl",
        "WRONG": tmp_path / "wrong.yaml",
    }
    if "IN/0.txt" in arguments:
        arguments = ["--input", str(corpus / "*.jsonl"), *arguments[2:]]
    arguments = ["--tokenizer", "bytes", *(str(names.get(argument, argument)) for argument in arguments)]
    result = run_module("tools.preprocess", *arguments)
    assert result.returncode == code
    assert message.replace("OUT/", f"{tmp_path}/out/") in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_says_all_and_flags_override_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"], key="body")
    (tmp_path / "config.yaml").write_text(
        f"input: ['{tmp_path}/a.jsonl']\noutput: {tmp_path}/from_file\ntext_key: body\ntokenizer: bytes\n"
        "dedup: {method: exact}\nvalidation_fraction: 0.4\n"
    )
    result = run("--config", tmp_path / "config.yaml", "--output", tmp_path / "from_flag", "--validation-fraction", 0)
    assert (result.returncode, result.stderr) == (0, "")
    config = json.loads((tmp_path / "from_flag/manifest.json").read_text())["config"]
    assert (config["text_key"], config["dedup"]["method"], config["validation_fraction"]) == ("body", "exact", 0)
    assert not (tmp_path / "from_file").exists()


def test_inputs_as_a_shell_expands_them_are_all_read(corpus: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    files = sorted(corpus.iterdir())
    result = run("--input", *files, "--output", tmp_path / "out", "--tokenizer", "bytes")
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "out/train.bin").read_bytes() == expected["train.bin"]


def test_help_has_an_example() -> None:
    result = run_module("tools.preprocess", "--help")
    assert result.returncode == 0
    assert "Example: python -m tools.preprocess --input" in result.stdout
