"""python -m tools.scaling simulate as its user runs it."""

import json
import re

import pytest

from megagpt.planning.failures import goodput
from megagpt.planning.simulation.job import PARTS
from tests.forked import run_module

CONFIG = "configs/llama_8b.yaml"
# 16 nodes, a failure in 6.25 hours
SMALL = ["--gpus", "128", "--mtbf", "100h", "--days", "5", "--runs", "4"]


def run(*arguments):
    return run_module("tools.scaling", "simulate", *arguments)


def numbers(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """What a simulation with everything prints, and its folder."""
    folder = tmp_path_factory.mktemp("simulation") / "out"
    done = run(CONFIG, *SMALL, "--output", folder, "--slow-nodes", "0.05", "--preempted-every", "2d")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, folder


def test_scenarios_stand_side_by_side_with_intervals(simulated):
    text, folder = simulated
    scenarios = numbers(folder)["scenarios"]
    assert [(one["asynchronous"], one["spares"] > 0) for one in scenarios] == [
        (False, False), (False, True), (True, False), (True, True)
    ]  # fmt: skip
    for one in scenarios:
        assert one["name"] in text
        assert one["goodput"]["low"] < one["goodput"]["value"] < one["goodput"]["high"]
        assert one["goodput"]["value"] == pytest.approx(sum(one["goodputs"]) / 4)
        assert sum(part["value"] for part in one["parts"].values()) == pytest.approx(1.0)
    for part in PARTS:
        assert (part in text) is any(one["parts"][part]["value"] for one in scenarios)


def test_asynchronous_checkpoints_and_spares_gain(simulated):
    synchronous, spared, asynchronous, both = (one["gain"]["value"] for one in numbers(simulated[1])["scenarios"])
    assert synchronous == 0
    assert 0 < spared < both
    assert 0 < asynchronous < both


def test_the_closed_form_is_the_planners(simulated):
    found = numbers(simulated[1])
    synchronous, one = found["closed_form"][0], found["scenarios"][1]
    assert not synchronous["asynchronous"]
    assert synchronous["closed_form"] == pytest.approx(
        goodput(one["every_seconds"], one["stall_seconds"], 600.0, 100 * 3600.0 / 16)
    )


def test_the_page_needs_nothing_else_and_the_pictures_lie_beside_it(simulated):
    text, folder = simulated
    page = (folder / "simulation.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert {file.name for file in folder.glob("*.png")} == {"time.png", "interval.png", "spares.png", "progress.png"}
    assert text.splitlines()[-1] == str(folder / "simulation.html")


def test_a_seed_gives_the_same_numbers_and_another_one_others(simulated, tmp_path):
    arguments = (CONFIG, *SMALL, "--slow-nodes", "0.05", "--preempted-every", "2d")
    printed = simulated[0].splitlines()[:-1]
    assert run(*arguments).stdout.splitlines() == printed
    assert run(*arguments, "--seed", "1").stdout.splitlines() != printed


def test_without_spares_there_is_nothing_to_compare_them_with():
    done = run(CONFIG, *SMALL, "--spares", "0", "--synchronous", "--fewer-nodes", "--checkpoint-every", "30min")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^ (\w+, no spares(?: \(this run\))?) +([\d.]+ min) ", done.stdout, re.MULTILINE) == [
        ("synchronous, no spares (this run)", "30 min"), ("asynchronous, no spares", "30 min")
    ]  # fmt: skip
    assert "the run goes on with fewer nodes" in done.stdout
    assert re.search(r"^ fewer nodes ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1oo-sxm"], "unknown device 'h1oo-sxm'; nearest: h100"),
        (["--gpus", "many"], "--gpus 'many': write a whole number"),
        (["--gpus", "100"], "cannot be divided among 100"),
        (["--mtbf", "12"], "--mtbf '12' is no duration"),
        (["--repair", "soon"], "--repair 'soon' is no duration"),
        (["--detection", "5"], "--detection '5' is no duration"),
        (["--checkpoint-every", "100"], "--checkpoint-every '100' is no duration"),
        (["--preempted-every", "x"], "--preempted-every 'x' is no duration"),
        (["--storage", "fast"], "--storage 'fast' is no rate"),
        (["--restart", "4min"], "--restart 4 min is less than --detection 5 min and reading the checkpoint"),
        (["--storage", "100MB/s"], "in 18.7 min: give --restart 24min or more"),
        (["--gpus", "512", "--mtbf", "1min"], "failures to play"),
        (["--runs", "1"], "--runs"),
        (["--days", "0"], "--days"),
        (["--jitter", "-1"], "--jitter"),
        (["--slow-nodes", "2"], "--slow-nodes"),
        (["--slow-factor", "0.5"], "--slow-factor"),
        (["--gpus", "8", "train.global_batch_size=512", "train.micro_batch_size=64"], "does not fit: "),
        (["train.stpes=3"], "did you mean train.steps?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words):
    done = run(CONFIG, "--gpus", "128", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*\n", done.stderr)
    assert words in done.stderr


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(CONFIG, *SMALL, "--days", "1", "--output", tmp_path / "file")
    assert done.returncode == 1
    assert re.fullmatch(r"error: [^\n]*cannot be written[^\n]*\n", done.stderr)
