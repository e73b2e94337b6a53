"""python -m tools.generate as a user meets it: output, messages, exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_module
from tests.unit.inference.runs import CONFIG, write_run

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "run"
    write_run(path, 10, 20)
    return path


def generate(*arguments, stdin=b""):
    return run_module("tools.generate", *arguments, stdin=stdin)


def test_prints_prompt_and_continuation_the_same_for_the_same_seed(run_dir):
    arguments = (run_dir, "--prompt", "Añ", "--max-tokens", 20)
    first, second = generate(*arguments, "--samples", 2), generate(*arguments)
    assert (first.returncode, first.stderr) == (0, "")
    text = first.stdout
    head, one, two = text.partition("--- sample 2 of 2 ---\n")[0], *text.split("--- sample 2 of 2 ---\n")
    assert head == one
    assert one.startswith("--- sample 1 of 2 ---\nAñ")
    assert two.startswith("Añ")
    assert one.removeprefix("--- sample 1 of 2 ---\n") == second.stdout


def test_reads_the_prompt_from_standard_input_without_its_last_line_end(run_dir):
    done = generate(run_dir, "--prompt-file", "-", "--max-tokens", 1, "--temperature", 0, stdin=b"two\nlines\n")
    given = generate(run_dir, "--prompt", "two\nlines", "--max-tokens", 1, "--temperature", 0)
    assert done.returncode == 0
    assert done.stdout == given.stdout
    assert done.stdout.startswith("two\nlines")


def test_output_that_the_terminal_cannot_show_is_replaced_and_a_full_disk_is_one_line(run_dir):
    command = [sys.executable, "-m", "tools.generate", str(run_dir), "--prompt", "Añ", "--max-tokens", "5"]
    shared = {"cwd": ROOT, "stderr": subprocess.PIPE, "timeout": 120, "check": False}
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(command, stdout=subprocess.PIPE, env=ascii_only, **shared)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert shown.stdout.startswith(b"A?")
    with open("/dev/full", "wb") as full:
        failed = subprocess.run(command, stdout=full, **shared)
    assert (failed.returncode, failed.stderr) == (1, b"error: cannot write the output: No space left on device\n")


def test_says_when_the_context_ends_first(run_dir):
    done = generate(run_dir, "--prompt", "x" * 40, "--max-tokens", 100)
    assert (done.returncode, done.stderr) == (0, "note: the model's context ends after 9 new tokens\n")


def test_stop_strings_and_penalties_change_the_continuation_and_sliding_goes_on(run_dir, tmp_path):
    arguments = ("--prompt", "x" * 40, "--max-tokens", 60)
    write_run(tmp_path / "rope", 1, model=CONFIG.model_copy(update={"position": "rope"}))
    free = generate(tmp_path / "rope", *arguments, "--slide")
    assert (free.returncode, free.stderr) == (0, "")
    assert len(free.stdout.encode("utf-8")) > 60
    stop = free.stdout[45]
    stopped = generate(tmp_path / "rope", *arguments, "--slide", "--stop", stop)
    assert stopped.stdout == "x" * 40 + free.stdout[40 : free.stdout.index(stop, 40)] + "\n"
    penalized = generate(tmp_path / "rope", *arguments, "--slide", "--repetition-penalty", 1.5, "--min-p", 0.001)
    assert penalized.stdout != free.stdout


def write_prompts(path, count):
    path.write_text("".join(json.dumps({"id": index, "prompt": "ab" * index}) + "\n" for index in range(count)))
    return path


def test_prompts_of_a_file_are_completed_and_what_is_there_is_kept(run_dir, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = (run_dir, "--output", output, "--max-tokens", 8, "--logprobs", "--prompts")
    first = generate(*arguments, write_prompts(tmp_path / "in.jsonl", 3), "--batch-size", 2)
    assert (first.returncode, first.stdout) == (0, "")
    assert first.stderr == f"3 of 3 lines were to do here; {output} is complete\n"
    kept = output.read_text()
    second = generate(*arguments, write_prompts(tmp_path / "in.jsonl", 5))
    assert second.stderr == f"2 of 5 lines were to do here; {output} is complete\n"
    assert output.read_text().startswith(kept)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(record["id"], len(record["logprobs"])) for record in records] == [
        (i, records[i]["tokens"]) for i in range(5)
    ]
    other = generate(*arguments, tmp_path / "in.jsonl", "--seed", 5)
    assert (other.returncode, other.stderr.splitlines()[0].partition("; ")[0]) == (
        2,
        f"error: {output}: was begun with seed 0, not 5",
    )


def test_processes_of_torchrun_share_the_prompts(run_dir, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", 5)
    arguments = ["--prompts", str(prompts), "--max-tokens", "8", "--device", "cpu", "--output"]
    alone = generate(run_dir, *arguments, tmp_path / "alone.jsonl")
    assert alone.returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*torchrun, "tools.generate", str(run_dir), *arguments, str(tmp_path / "two.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "two.jsonl is complete" in done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_scores_a_text_and_the_prompts_of_a_file(run_dir, tmp_path):
    one = generate(run_dir, "--score", "--prompt", "abab" * 30)
    assert (one.returncode, one.stderr) == (0, "")
    assert one.stdout.startswith("119 tokens, 119 bytes: loss ")
    assert one.stdout.endswith(" bits per byte (context 48, stride 24)\n")
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(json.dumps({"id": "a", "prompt": "abab" * 30}) + "\n")
    many = generate(run_dir, "--score", "--prompts", prompts, "--output", tmp_path / "scores.jsonl")
    assert many.returncode == 0, many.stderr
    record = json.loads((tmp_path / "scores.jsonl").read_text())
    assert f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.4g}, " in one.stdout


def test_a_chat_answers_each_line_and_goes_on_after_one_that_is_too_long(tmp_path):
    write_run(tmp_path / "run", 1, model=CONFIG.model_copy(update={"max_seq_len": 120}))
    said = b"hello\n" + b"x" * 200 + b"\nwhy?\n"
    done = generate(tmp_path / "run", "--chat", "--max-tokens", 4, "--template", "plain", stdin=said)
    assert done.returncode == 0
    assert done.stdout.count("\n") >= 2
    assert done.stderr == "> > note: the prompt has 200 tokens; this model reads 1 to 120: change the prompt\n> > \n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/such/run"], 1, "no/such/run: no such run folder or checkpoint"),
        (["RUN", "--checkpoint", 15], 1, "step_00000015: no such run folder or checkpoint"),
        (["RUN", "--temperature", -1], 2, "temperature must be 0 or more, but it is -1.0"),
        (["RUN", "--top-k", 0], 2, "top-k must be 1 or more, but it is 0"),
        (["RUN", "--top-p", 2], 2, "top-p must be above 0 and at most 1, but it is 2.0"),
        (["RUN", "--samples", 0], 2, "--samples"),
        (["RUN", "--dtype", "int8"], 2, "--dtype"),
        (["RUN", "--prompt", "x" * 49], 2, "the prompt has 49 tokens; this model reads 1 to 48"),
        (["RUN", "--prompt", "x", "--prompt-file", "y"], 2, "--prompt and --prompt-file: give one of them"),
        (["RUN", "--prompt-file", "no/such/file"], 1, "--prompt-file no/such/file: No such file or directory"),
        (["RUN", "--prompt-file", "-"], 1, "--prompt-file standard input: byte 2 is not UTF-8"),
        (["RUN", "--prompts", "x"], 2, "--prompts: needs --output"),
        (
            ["RUN", "--output", "x"],
            2,
            "--output: does nothing with one prompt; it is for --prompts and --score --prompts",
        ),
        (["RUN", "--score", "--top-k", 3], 2, "--top-k: does nothing with --score; it is for one prompt and --prompts"),
        (["RUN", "--chat", "--score"], 2, "--chat and --score: give one of them"),
        (["RUN", "--chat", "--template", "no/such"], 2, "template no/such: No such file"),
        (["RUN", "--score", "--prompt", "x"], 2, "the text has 1 tokens; it takes 2"),
        (["RUN", "--slide"], 2, "sliding: this model has learned 48 positions"),
        (["RUN", "--stop", ""], 2, "--stop: a stop string must not be empty"),
        ([], 2, "MODEL"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_their_exit_code(run_dir, arguments, code, message):
    done = generate(*(run_dir if argument == "RUN" else argument for argument in arguments), stdin=b"ab\xff")
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
