"""python -m tools.convert as a user meets it: output, messages, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.inference.runs import CONFIG, write_run

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("command") / "run"
    write_run(path, 10)
    write_run(path.parent / "sinusoidal", 10, model=CONFIG.model_copy(update={"position": "sinusoidal"}))
    return path


def tool(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.convert", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_says_what_was_written_and_how_it_was_verified(run_dir, tmp_path):
    done = tool(run_dir, tmp_path / "hf", "--to", "hf", "--dtype", "bf16", "--max-shard-size", "40KB")
    assert (done.returncode, done.stderr) == (0, "")
    first, tokenizer, verified, rounding = done.stdout.splitlines()
    assert first.startswith(f"{run_dir}/checkpoints/step_00000010 -> {tmp_path}/hf: 28 tensors")
    assert tokenizer == "  tokenizer: bytes"
    assert "verified on random and real tokens: weights bit-identical" in verified
    assert "top-1 agreement 100.00%" in verified
    assert "rounding of the weights alone changes logits by: max" in rounding
    assert (tmp_path / "hf/model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no/such/run", "OUT", "--to", "hf"], 1, "no/such/run: no such run folder or checkpoint"),
        (["RUN", "OUT"], 2, "--to"),
        (["RUN", "OUT", "--to", "hf", "--max-shard-size", "5 apples"], 2, "--max-shard-size '5 apples': give a number"),
        (["SIN", "OUT", "--to", "hf"], 2, "GPT-2 cannot express model.position sinusoidal (it has learned)"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_errors_are_one_line_with_their_exit_code(run_dir, arguments, code, message, tmp_path):
    places = {"RUN": run_dir, "SIN": run_dir.parent / "sinusoidal", "OUT": tmp_path / "out"}
    done = tool(*(places.get(argument, argument) for argument in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []
