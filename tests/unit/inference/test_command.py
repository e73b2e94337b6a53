"""python -m tools.generate as a user meets it: output, messages, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_module
from tests.unit.inference.runs import write_run

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
