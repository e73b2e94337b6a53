"""python -m tools.plan as its user runs it."""

import json
import re

import pytest

from megagpt.config import load_config
from megagpt.model.counts import parameter_count
from tests.forked import run_module

CONFIG = "configs/llama_8b.yaml"


def run(*arguments):
    return run_module("tools.plan", *arguments)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A plan with everything that the command can do."""
    folder = tmp_path_factory.mktemp("plan")
    arguments = ["--gpus", "64,128,100", "--tokens", "300B", "--price", "2.5", "--search"]
    done = run(CONFIG, *arguments, "--json", folder / "plan.json", "--html", folder / "plan.html",
               "train.micro_batch_size=1")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, json.loads((folder / "plan.json").read_text()), (folder / "plan.html").read_text()


def test_it_says_memory_time_cost_and_failures(planned):
    text, numbers, _ = planned
    for words in (
        "8,030,261,248",
        "optimizer (fp32 weights, moments)",
        "MFU",
        "goodput",
        "largest micro-batch",
        "cost",
    ):
        assert words in text
    assert numbers["parameters"] == parameter_count(load_config(CONFIG).model)
    assert numbers["fits"] is (numbers["memory_bytes"]["total"] <= numbers["memory_bytes"]["device"])


def test_days_and_cost_follow_from_the_step(planned):
    _, numbers, _ = planned
    assert numbers["steps"] == -(-300_000_000_000 // numbers["tokens_per_step"])
    assert numbers["training_seconds"] == pytest.approx(numbers["steps"] * numbers["step_seconds"]["total"])
    assert numbers["seconds"] == pytest.approx(numbers["training_seconds"] / numbers["reliability"]["goodput"])
    assert numbers["cost"] == pytest.approx(numbers["seconds"] / 3600 * 64 * 2.5)


def test_options_are_ranked_and_each_is_a_configuration_that_fits(planned, tmp_path):
    _, numbers, _ = planned
    rates = [option["tokens_per_second_per_gpu"] for option in numbers["options"]]
    assert rates == sorted(rates, reverse=True)
    device = numbers["memory_bytes"]["device"]
    for option in (numbers["options"][0], numbers["options"][-1]):
        assert option["memory_bytes"] <= device
        file = tmp_path / "again.json"
        done = run(CONFIG, "--gpus", 64, "--json", file, *option["overrides"])
        assert done.returncode == 0, done.stderr
        again = json.loads(file.read_text())
        assert again["memory_bytes"]["total"] == option["memory_bytes"]
        assert again["step_seconds"]["total"] == pytest.approx(option["step_seconds"])


def test_every_option_is_a_configuration_that_is_accepted(tmp_path):
    file, whole = tmp_path / "plan.json", "train.compile_scope=model"
    for more in ([], [whole]):
        done = run(CONFIG, "--gpus", 64, "--search", "--json", file, *more)
        assert done.returncode == 0, done.stderr
        stages = set()
        for option in json.loads(file.read_text())["options"]:
            stages.add(load_config(CONFIG, [*more, *option["overrides"]]).parallel.zero_stage)
        assert (3 in stages) == (not more)
    assert re.search(r" 1 in [24] ", done.stdout)


def test_blocks_that_are_checkpointed_are_told():
    done = run(CONFIG, "--gpus", 64, "train.activation_checkpointing=true", "train.activation_checkpointing_every=4")
    assert "activation checkpointing of one block in 4" in " ".join(done.stdout.split())


def test_curves_keep_the_batch_or_let_it_grow(planned):
    _, numbers, _ = planned
    strong, weak = numbers["curves"]["strong"], numbers["curves"]["weak"]
    assert [point["gpus"] for point in strong] == [64, 100, 128]
    assert strong[0]["global_batch"] == strong[2]["global_batch"] == weak[0]["global_batch"]
    assert weak[2]["global_batch"] == 2 * weak[0]["global_batch"]
    assert "cannot be divided among 100 GPUs" in strong[1]["problem"]
    assert strong[2]["step_seconds"] < strong[0]["step_seconds"]


def test_the_page_needs_nothing_else(planned):
    *_, page = planned
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "Layouts that fit" in page
    assert "Strong scaling" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1oo-sxm"], "unknown device 'h1oo-sxm'; nearest: h100"),
        (["--gpus", "eight"], "--gpus 'eight': write a whole number"),
        (["--gpus", "7"], "cannot be divided among 7"),
        (["--network", "400"], "network '400' is no rate"),
        (["--storage", "fast"], "--storage 'fast' is no rate"),
        (["--tokens", "1.5"], "--tokens '1.5': write a whole number"),
        (["--mtbf", "12"], "--mtbf '12' is no duration"),
        (["train.stpes=3"], "did you mean train.steps?"),
        (["train.precision=fp16", "--gpu", "h100", "--gpus", "3"], "cannot be divided among 3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words):
    done = run(CONFIG, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*\n", done.stderr)
    assert words in done.stderr


def test_a_model_too_large_for_a_cluster_names_the_smallest_that_could():
    arguments = ["configs/llama_70b.yaml", "--gpu", "l4", "--host-memory", "200G", "data.seq_len=512"]
    done = run(*arguments, "--gpus", "2")
    assert (done.returncode, done.stdout) == (2, "")
    least = int(re.search(r"smallest cluster that could has (\d+) GPUs", done.stderr)[1])
    assert run(*arguments, "--gpus", least // 2).returncode == 2
    more = run(*arguments, "--gpus", least, "train.micro_batch_size=1", "train.global_batch_size=1024", "--search")
    assert more.returncode == 0, more.stderr
    assert "the first one: parallel.zero_stage=3" in more.stdout


def test_a_model_that_fits_nowhere_is_an_error():
    done = run(CONFIG, "--gpu", "l4", "--gpus", "8", "model.max_seq_len=1048576", "data.seq_len=1048576")
    assert done.returncode == 2
    assert "no number of L4 can train this model" in done.stderr


def test_what_does_not_fit_is_said_with_the_micro_batch_that_does():
    done = run(CONFIG, "--gpus", "64", "train.micro_batch_size=8")
    assert done.returncode == 0
    assert "does not fit: " in done.stdout
    assert "largest micro-batch that fits: " in done.stdout
