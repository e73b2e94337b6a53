"""Training on a GPU: what gloo on CPUs cannot show. Every run goes through the launch command, as a user's does."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from megagpt.config import save_config
from megagpt.config.schema import OptimizerConfig
from megagpt.model import GPT, initialize_weights, parameter_kind, stacked_heights
from megagpt.training.checkpoint import find_checkpoint, load_weights
from megagpt.training.metrics import read_metrics
from megagpt.training.optimizer import build_optimizer, parameter_groups
from tests.distributed.jobs import losses, tiny_config, write_dataset
from tests.unit.model.configs import LLAMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def launched(config_file: Path, *overrides: str) -> list[dict]:
    command = [sys.executable, "-m", "launch.train", str(config_file), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    run_dir = next(word.removeprefix("train.run_dir=") for word in overrides if word.startswith("train.run_dir="))
    return list(read_metrics(Path(run_dir) / "metrics.jsonl"))


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_dataset(folder / "train", 20_000)
    write_dataset(folder / "validation", 3_001, seed=1)
    save_config(tiny_config(folder, folder / "run", train={"device": "cuda"}), folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def cpu_losses(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("cpu") / "run"
    return losses(launched(config_file, "train.device=cpu", f"train.run_dir={run_dir}"))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_losses_on_the_gpu_are_those_of_the_cpu(zero_stage, precision, config_file, cpu_losses, tmp_path):
    settings = [f"train.precision={precision}", f"parallel.zero_stage={zero_stage}", "train.micro_batch_size=2"]
    records = launched(config_file, *settings, f"train.run_dir={tmp_path / 'run'}")
    if precision == "fp16":  # steps are skipped until the loss scale fits, so only the course can be compared
        assert records[-1]["reason"] == "finished"
        assert min(losses(records)) < cpu_losses[0] - 0.5
    else:
        assert losses(records) == pytest.approx(cpu_losses, rel=1e-4 if precision == "fp32" else 0.01)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_model_that_is_compiled_as_a_whole_has_the_losses_of_the_cpu(zero_stage, config_file, cpu_losses, tmp_path):
    settings = ["train.compile=true", "train.compile_scope=model", "train.precision=bf16"]
    settings += [f"parallel.zero_stage={zero_stage}", "train.micro_batch_size=2"]
    records = launched(config_file, *settings, f"train.run_dir={tmp_path / 'run'}")
    assert losses(records) == pytest.approx(cpu_losses, rel=0.01)


def test_compiled_run_resumes_bit_identical_and_reports_its_use_of_the_gpu(config_file, tmp_path):
    settings = ["train.precision=bf16", "train.compile=true", "model.dropout=0.1", "checkpoint.every=10"]
    whole = launched(config_file, *settings, f"train.run_dir={tmp_path / 'whole'}")
    cut = [*settings, "schedule.decay_steps=15", f"train.run_dir={tmp_path / 'cut'}"]
    launched(config_file, *cut, "train.steps=10")
    assert losses(launched(config_file, *cut)) == losses(whole)
    last = [record for record in whole if record["kind"] == "train"][-1]
    assert 0 < last["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
    assert last["mfu"] is None or 0 < last["mfu"] < 1


@pytest.mark.parametrize(
    ("zero_stage", "scope"), [(0, "block"), (1, "block"), (2, "block"), (3, "block"), (1, "model")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(zero_stage, scope, precision, tmp_path):
    command = [sys.executable, "-m", "tests.gpu.step_without_sync", str(zero_stage), precision, scope, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_non_finite_steps_change_nothing(zero_stage, config_file, tmp_path):
    settings = ["optimizer.lr=1e30", "optimizer.weight_decay=0", "schedule.name=constant", "schedule.warmup_steps=0"]
    settings += ["train.precision=bf16", f"parallel.zero_stage={zero_stage}", "checkpoint.every=1", "train.steps=4"]
    records = launched(config_file, *settings, "checkpoint.keep=9", f"train.run_dir={tmp_path / 'run'}")
    assert [record["skipped_steps"] for record in records if record["kind"] == "train"] == [0, 1, 2, 3]
    weights = [load_weights(tmp_path / f"run/checkpoints/step_0000000{step}") for step in (1, 4)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_deterministic_runs_repeat_each_other_bit_for_bit(config_file, tmp_path):
    settings = ["train.deterministic=true", "train.precision=bf16", "train.compile=true", "model.dropout=0.1"]
    runs = [launched(config_file, *settings, f"train.run_dir={tmp_path / name}") for name in ("one", "two")]
    assert losses(runs[0]) == losses(runs[1])


def test_losses_with_offload_are_those_without(config_file, cpu_losses, tmp_path):
    settings = ["parallel.zero_stage=3", "parallel.offload_optimizer=true", "parallel.offload_parameters=true"]
    records = launched(config_file, *settings, f"train.run_dir={tmp_path / 'run'}")
    assert losses(records) == pytest.approx(cpu_losses, rel=1e-4)


@pytest.mark.parametrize(("then", "now"), [(2, 0), (0, 3)])
def test_fp16_run_goes_on_at_another_zero_stage_with_its_loss_scale(then, now, config_file, tmp_path):
    settings = ["train.precision=fp16", "checkpoint.every=10"]
    whole = launched(config_file, *settings, f"parallel.zero_stage={then}", f"train.run_dir={tmp_path / 'whole'}")
    checkpoint = tmp_path / "whole/checkpoints/step_00000010"
    moved = launched(
        config_file,
        *settings,
        f"parallel.zero_stage={now}",
        f"train.run_dir={tmp_path / 'moved'}",
        f"checkpoint.resume={checkpoint}",
    )
    assert losses(moved) == pytest.approx(losses(whole)[10:], rel=0.01)
    skipped = [record["skipped_steps"] for record in (*whole, *moved) if record["kind"] == "train"]
    assert skipped[20:] == skipped[10:20]  # a scale that began anew would be too high, and skip steps


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_trains_on_the_gpu_as_on_the_cpu(precision, zero_stage, config_file, tmp_path):
    settings = ["optimizer.name=muon", f"train.precision={precision}", f"parallel.zero_stage={zero_stage}"]
    gpu = launched(config_file, *settings, f"train.run_dir={tmp_path / 'gpu'}")
    cpu = launched(config_file, *settings, "train.device=cpu", f"train.run_dir={tmp_path / 'cpu'}")
    assert losses(gpu) == pytest.approx(losses(cpu), rel=1e-4 if precision == "fp32" else 0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_muon_step_does_not_wait_for_the_device(found_inf, precision):
    settings = OptimizerConfig(name="muon")
    model = GPT(LLAMA)
    initialize_weights(model, 0)
    model.to("cuda")
    groups = parameter_groups(model, settings, parameter_kind, partial(stacked_heights, config=LLAMA))
    optimizer = build_optimizer(groups, settings, precision)
    optimizer.found_inf = torch.full((), found_inf, device="cuda")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf if found_inf else 0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) == bool(found_inf)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "settings", [["parallel.zero_stage=1"], ["parallel.zero_stage=3", "parallel.offload_parameters=true"]]
)
def test_weights_to_start_from_arrive_in_the_master_weights_unrounded(settings, precision, config_file, tmp_path):
    launched(config_file, f"train.run_dir={tmp_path / 'source'}")
    still = ["optimizer.lr=1e-30", "schedule.warmup_steps=0", "train.steps=1", f"train.precision={precision}"]
    source = f"train.init_from={tmp_path / 'source'}"
    launched(config_file, *settings, *still, source, f"train.run_dir={tmp_path / 'run'}")
    before, after = (load_weights(find_checkpoint(tmp_path / name)) for name in ("source", "run"))
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-29
