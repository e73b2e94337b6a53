"""Steps that are not finite change nothing and wait for nobody; losses that jump are named, and may be undone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.data.loader import Batch, TrainingData
from megagpt.training.checkpoint import complete_checkpoints, load_weights
from megagpt.training.engine import Engine
from megagpt.training.faults import robust_score
from tests.distributed.jobs import VOCAB_SIZE, losses, refusal, tiny_config, train_and_report, train_in_fp16
from tests.distributed.launched import manifest, records


class HostReads(TorchDispatchMode):
    """Counts how often the host asks a tensor for its value, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.where: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            import traceback

            self.where.append("".join(traceback.format_stack(limit=6)[:-1]))
        return function(*args, **(kwargs or {}))


def host_reads(config) -> list[str]:
    """Where the host reads a tensor in the third step of an engine, whose batch has a loss that is not finite."""
    engine = Engine(config, 2, 2, torch.device("cpu"))
    tokens = torch.randint(VOCAB_SIZE, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    for _ in range(2):
        engine.step([batch[:2], batch[2:]], 1e-3).read()
    with torch.no_grad(), HostReads() as reads, torch.enable_grad():
        result = engine.step([batch[:2], batch[2:]], 1e-3)
    assert math.isfinite(result.read().loss)
    engine.close()
    return reads.where


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_never_waits_for_the_device(zero_stage, precision, one_rank, corpus, tmp_path):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        parallel={"zero_stage": zero_stage},
        train={"precision": precision, "micro_batch_size": 2, "global_batch_size": 4},
    )
    assert one_rank.run(host_reads, config)[0] == []


def train_on_bad_windows(config, windows: dict[tuple[int, int], str]) -> list[dict]:
    """As train_and_report, where some windows of samples are random noise; one called "wait" makes later ones so."""
    read = TrainingData.read

    def noisy(self, start: int, count: int) -> Batch:
        batch = read(self, start, count)
        for (first, last), kind in windows.items():
            rows = [row for row in range(count) if first <= start + row < last]
            if rows and kind == "noise":
                noise = torch.from_numpy(np.random.default_rng(first).integers(0, VOCAB_SIZE, (len(rows), 32)))
                batch.input_ids[rows], batch.targets[rows] = noise, noise.flip(1)
        return batch

    TrainingData.read = noisy  # type: ignore[method-assign]
    try:
        return train_and_report(config)
    finally:
        TrainingData.read = read  # type: ignore[method-assign]


def spiky(corpus: Path, run_dir: Path, **faults: object):
    return tiny_config(
        corpus,
        run_dir,
        schedule={"name": "constant", "warmup_steps": 5},
        train={"steps": 60},
        checkpoint={"every": 10},
        data={"validation": []},
        faults={"spike_window": 16, "spike_threshold": 8.0, **faults},
    )


BAD = (8 * 47, 8 * 48)  # the samples of step 48


def test_a_loss_spike_is_logged_with_the_samples_of_its_batch(two_ranks, corpus, tmp_path):
    found = two_ranks.run(train_on_bad_windows, spiky(corpus, tmp_path / "run"), {BAD: "noise"})[0]
    (spike,) = [record for record in found if record["kind"] == "event"]
    assert (spike["event"], spike["step"], spike["samples"]) == ("spike", 48, list(BAD))
    assert spike["score"] > 8
    assert len(losses(found)) == 60


def test_a_rollback_goes_on_as_if_the_bad_batch_had_never_been(two_ranks, corpus, tmp_path):
    config = spiky(corpus, tmp_path / "run", spike_action="rollback")
    found = two_ranks.run(train_on_bad_windows, config, {BAD: "noise"})[0]
    trained = [record for record in found if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(1, 61))
    (event,) = [record for record in found if record["kind"] == "event"]
    assert (event["event"], event["step"], event["samples"]) == ("rollback", 40, list(BAD))
    newest = complete_checkpoints(tmp_path / "run/checkpoints")[-1]
    assert manifest(newest)["skipped_samples"] == [list(BAD)]
    assert manifest(newest)["rollbacks"] == 1
    assert manifest(newest)["consumed_samples"] == 8 * 61

    # The reference: a run that never saw the batch, since a resume left it out from the beginning.
    reference = spiky(corpus, tmp_path / "reference")
    windows = {BAD: "noise"}
    two_ranks.run(train_on_bad_windows, reference.model_copy(update={"train": _steps(reference, 40)}), windows)
    path = tmp_path / "reference/checkpoints/step_00000040/manifest.json"
    path.write_text(path.read_text().replace('"skipped_samples": []', f'"skipped_samples": [[{BAD[0]}, {BAD[1]}]]'))
    expected = losses(two_ranks.run(train_on_bad_windows, reference, windows)[0])
    assert [record["loss"] for record in trained] == expected

    again = two_ranks.run(train_on_bad_windows, _longer(config, 70), windows)[0]  # a resume remembers what to skip
    assert losses(again)[:60] == expected


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_two_bad_batches_are_both_left_out_after_two_rollbacks_to_one_checkpoint(resume, one_rank, corpus, tmp_path):
    other = (8 * 48, 8 * 49)
    config = spiky(corpus, tmp_path / "run", spike_action="rollback")
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"resume": resume})})
    found = one_rank.run(train_on_bad_windows, config, {BAD: "noise", other: "noise"})[0]
    assert [record["step"] for record in found if record["kind"] == "train"] == list(range(1, 61))
    assert [r["samples"] for r in found if r.get("event") == "rollback"] == [list(BAD), list(other)]
    newest = complete_checkpoints(tmp_path / "run/checkpoints")[-1]
    assert manifest(newest)["skipped_samples"] == [list(BAD), list(other)]


def test_a_spike_soon_after_a_resume_is_found_as_in_an_uninterrupted_run(one_rank, corpus, tmp_path):
    one_rank.run(train_on_bad_windows, _longer(spiky(corpus, tmp_path / "run"), 45), {BAD: "noise"})
    found = one_rank.run(train_on_bad_windows, spiky(corpus, tmp_path / "run"), {BAD: "noise"})[0]
    assert [(r["event"], r["step"]) for r in found if r["kind"] == "event"] == [("spike", 48)]


def _steps(config, steps: int):
    return config.train.model_copy(update={"steps": steps})


def _longer(config, steps: int):
    return config.model_copy(update={"train": _steps(config, steps)})


def test_a_spike_at_a_step_that_is_due_for_a_checkpoint_goes_back_to_the_one_before(two_ranks, corpus, tmp_path):
    bad = (8 * 49, 8 * 50)
    config = spiky(corpus, tmp_path / "run", spike_action="rollback")
    found = two_ranks.run(train_on_bad_windows, config, {bad: "noise"})[0]
    assert [(r["step"], r["samples"]) for r in found if r.get("event") == "rollback"] == [(40, list(bad))]
    assert [r["step"] for r in found if r["kind"] == "checkpoint"] == [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_fp16_with_an_offloaded_optimizer_steps_again_after_an_overflow(zero_stage, two_ranks, corpus, tmp_path):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        train={"precision": "fp16", "device": "auto", "steps": 25, "micro_batch_size": 2},
        parallel={"zero_stage": zero_stage, "offload_optimizer": True},
        deepspeed={"fp16": {"initial_scale_power": 24}},
    )
    found = [r for r in two_ranks.run(train_in_fp16, config)[0] if r["kind"] == "train"]
    assert 0 < found[-1]["skipped_steps"] < 20
    assert found[-1]["loss"] < found[0]["loss"] - 0.2


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_fp16_may_skip_as_many_steps_as_the_configuration_says(zero_stage, two_ranks, corpus, tmp_path):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        optimizer={"lr": 1e30},
        schedule={"name": "constant", "warmup_steps": 0},
        train={"precision": "fp16", "device": "auto", "steps": 40},
        data={"validation": []},
        faults={"max_skipped_steps": 25},
    )
    with pytest.raises(AssertionError, match="had a loss or gradient that is not finite; stopped with a checkpoint"):
        two_ranks.run(train_in_fp16, config)


def test_rollbacks_have_a_limit(one_rank, corpus, tmp_path):
    config = spiky(corpus, tmp_path / "run", spike_action="rollback", max_rollbacks=0)
    with pytest.raises(AssertionError, match="robust standard deviations too high, again after 0 rollbacks"):
        one_rank.run(train_on_bad_windows, config, {BAD: "noise"})


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_steps_that_stay_non_finite_stop_the_run_with_a_checkpoint_of_before(zero_stage, two_ranks, corpus, tmp_path):
    """A learning rate that breaks the model at step 3: the gradients of all later steps are not finite."""
    config = tiny_config(
        corpus,
        tmp_path / "run",
        optimizer={"lr": 1e30, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_steps": 0},
        parallel={"zero_stage": zero_stage},
        data={"validation": []},
        checkpoint={"every": 2},
        faults={"max_skipped_steps": 5},
    )
    message, code = two_ranks.run(refusal, config)[0]
    assert code == 1
    assert "steps 2 to 7 had a loss or gradient that is not finite; stopped with a checkpoint of step 1" in message
    (checkpoint,) = complete_checkpoints(tmp_path / "run/checkpoints")
    assert checkpoint.name == "step_00000001"
    found = manifest(checkpoint)
    assert (found["consumed_samples"], found["consumed_tokens"], found["skipped_steps"]) == (8, 8 * 32, 0)
    one_step = tiny_config(
        corpus,
        tmp_path / "one",
        optimizer={"lr": 1e30, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_steps": 0},
        parallel={"zero_stage": zero_stage},
        train={"steps": 1},
        data={"validation": []},
    )
    two_ranks.run(train_and_report, one_step)
    expected, found = load_weights(tmp_path / "one/checkpoints/step_00000001"), load_weights(checkpoint)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    events = records(tmp_path / "run", "event")
    assert [(event["event"], event["step"], event["samples"]) for event in events] == [("skipped", 2, [8, 16])]


@given(st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=60), st.floats(-1e3, 1e3))
def test_the_robust_score_is_the_textbook_formula(others, value):
    median = np.median(others)
    spread = max(1.4826 * np.median(np.abs(np.array(others) - median)), 1e-4 * abs(median), 1e-12)
    assert robust_score(value, others) == pytest.approx((value - median) / spread)
