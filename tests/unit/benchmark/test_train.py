"""The comparison of training steps, on a tiny model, as a user starts it."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock, patch

import psutil
import pytest
import torch
import yaml

from megagpt.benchmark import train as benchmark
from megagpt.benchmark.fresh import turns
from megagpt.config.schema import RunConfig
from megagpt.data.loader import Batch
from megagpt.errors import UsageError, UserError
from megagpt.training.engine import Engine
from megagpt.training.step import StepResult
from tests.distributed.ranks import Ranks
from tools.benchmark import train

TINY = (
    "model: {vocab_size: 101, num_layers: 1, hidden_size: 16, num_attention_heads: 2, max_seq_len: 32}\n"
    "data: {train: [{path: nowhere}]}\n"
    "train: {device: cpu, compile: false, global_batch_size: 4, micro_batch_size: 2, precision: bf16}\n"
)


def test_a_step_is_compared_with_the_plain_loop_and_transformers(tmp_path: Path):
    config, output = tmp_path / "tiny.yaml", tmp_path / "out.json"
    config.write_text(TINY)
    command = [sys.executable, "-m", "tools.benchmark", "train", str(config), "--steps", "3", "--transformers"]
    command += ["--against", "parallel.zero_stage=2 optimizer.grad_clip=0", "--unfused"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    variant = "parallel.zero_stage=2 optimizer.grad_clip=0"
    names = {"megagpt", "plain", "plain, unfused AdamW", "transformers", "transformers, compiled", variant}
    assert set(result["step_seconds"]) == names
    assert set(result["speedup_over"]) == names - {"megagpt"}
    assert result["tokens_per_step"] == 4 * 32
    parts = result["parts_seconds"]
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["matrix products"] > 0
    assert parts["AdamW"] > 0
    for name, seconds in result["step_seconds"].items():
        assert result["tokens_per_second"][name] == pytest.approx(128 / seconds)
    assert re.search(r"^speedup over transformers, compiled +[\d.]+ x +[\d.]+ to [\d.]+$", done.stdout, re.MULTILINE)


def test_what_a_peer_cannot_express_is_refused_before_anything_starts():
    with pytest.raises(UsageError, match=r"^cannot compare: nanoGPT .*position"):
        train("configs/small.yaml", ["model.position=rope"], nanogpt=Path("model.py"))


def test_a_variant_must_have_the_same_batch():
    with pytest.raises(
        UsageError, match=r"--against 'train\.global_batch_size=16': train\.global_batch_size must be that"
    ):
        train("configs/small.yaml", against=["train.global_batch_size=16"])


@pytest.mark.slow
def test_two_ranks_are_compared_with_one_process_that_has_all_cpus(tmp_path: Path):
    config, output = tmp_path / "tiny.yaml", tmp_path / "out.json"
    config.write_text(TINY)
    command = [sys.executable, "-m", "tools.benchmark", "train", str(config), "--steps", "2", "--ranks", "2"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(output.read_text())
    assert (result["ranks"], result["tokens_per_step"]) == (2, 4 * 32)
    assert set(result["step_seconds"]) == {"megagpt", "plain"}
    steps = [line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert steps == ["step 0", "step 1", "step 2"]


def test_ranks_share_the_batch_and_only_rank_0_runs_the_plain_loop():
    ranks = Ranks(2)
    try:
        first, second = ranks.run(_threads_while_comparing)
    finally:
        ranks.stop()
    # One that compiles, two of which the second counts, one that is profiled; of 4 sequences in micro-batches of 2 each
    # rank has one.
    assert first == {"engine": [(1, 1)] * 4, "plain": 3, "asked": [("plain", len(os.sched_getaffinity(0)))]}
    assert second == {"engine": [(1, 1)] * 4, "plain": 0, "asked": []}


def _threads_while_comparing() -> dict[str, object]:
    """On a rank: micro-batches and threads of each step of a contender."""
    config = RunConfig.model_validate(
        {
            "model": {"vocab_size": 101, "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
            "data": {"train": [{"path": "nowhere"}], "seq_len": 8},
            "train": {"device": "cpu", "compile": False, "global_batch_size": 4, "micro_batch_size": 2},
        }
    )
    seen: list[tuple[int, int]] = []
    step, plain = benchmark.Engine.step, MagicMock()

    def engine_step(engine: Engine, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        seen.append((len(micro_batches), torch.get_num_threads()))
        return step(engine, micro_batches, learning_rate)

    with patch.object(benchmark.Engine, "step", engine_step), patch.object(benchmark, "turns") as process:
        process.return_value.__enter__.return_value = plain
        benchmark.compare(config, 1, torch.device("cpu"), benchmark.Peers(), lambda line: None)
    asked = [(call.args[2]["name"], call.args[3]) for call in process.call_args_list]
    return {"engine": seen, "plain": plain.call_count, "asked": asked}


def test_a_loop_of_another_process_has_its_threads_and_prints_nothing_between_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    notes = tmp_path / "notes"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # is this process's
    with turns(__name__, "_noting_threads", {"file": str(notes)}, 2, "plain") as turn:
        turn()
        turn()
        assert notes.read_text() == "2\n" * 2


def _noting_threads(arguments: dict[str, str]) -> Callable[[], None]:
    def note() -> None:
        print("not an answer", flush=True)
        with open(arguments["file"], "a", encoding="ascii") as notes:
            notes.write(f"{torch.get_num_threads()}\n")

    return note


def test_a_loop_that_fails_in_its_process_says_why():
    with (
        turns(__name__, "_failing", {"words": "no such tensor"}, 1, "nanogpt") as turn,
        pytest.raises(UserError, match=r"^nanogpt failed: RuntimeError: no such tensor$"),
    ):
        turn()


def _failing(arguments: dict[str, str]) -> Callable[[], None]:
    def fail() -> None:
        raise RuntimeError(arguments["words"])

    return fail


@pytest.mark.parametrize("how", ["plain", "plain, unfused AdamW", "transformers", "transformers, compiled"])
def test_every_loop_in_plain_torch_lowers_the_loss_of_its_batch(how: str):
    config = RunConfig.model_validate(yaml.safe_load(TINY)).model_dump(mode="json")
    step = benchmark.loop_of({"config": config, "name": how, "nanogpt": None})
    losses = [step() for _ in range(5)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_an_interrupt_ends_all_ranks(tmp_path: Path):
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    command = [sys.executable, "-m", "tools.benchmark", "train", str(config), "--steps", "1000000", "--ranks", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("step 0")
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert len(ranks) == 3, "two ranks, and the plain loop's process"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_ranks_that_do_not_divide_the_batch_are_refused_before_anything_starts():
    with pytest.raises(UsageError, match=r"32 sequences cannot be divided among 3 ranks"):
        train("configs/small.yaml", ranks=3)
