"""The launch command as users start it: alone, by torchrun, by MPI; errors are one line with the right exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagpt.config import save_config
from megagpt.config.schema import RunConfig
from megagpt.data.indexed import IndexedDataset
from megagpt.training import run_folder
from megagpt.training.checkpoint import load_weights
from megagpt.training.metrics import read_metrics
from tests.distributed.jobs import losses, refusal, tiny_config, train_and_report
from tests.distributed.launched import start
from tests.forked import run_module

ONE_PROCESS = [sys.executable, "-m", "launch.train"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "launch.train",
]
MPIEXEC = [str(Path(sys.executable).with_name("mpiexec")), "-n", "2", *ONE_PROCESS]


def run(command: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [*command, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def config_file(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("launch") / "config.yaml"
    save_config(tiny_config(corpus, path.parent / "run", train={"steps": 6}), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["alone", "torchrun", "mpiexec"])
def test_every_launcher_trains_the_same_run(launcher, config_file, tmp_path, one_rank, corpus):
    command = {"alone": ONE_PROCESS, "torchrun": TORCHRUN, "mpiexec": MPIEXEC}[launcher]
    if launcher == "mpiexec" and not Path(MPIEXEC[0]).exists():
        pytest.skip("no mpiexec in this environment; the mpi extra brings one")
    done = run(command, config_file, f"train.run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    ranks = 1 if launcher == "alone" else 2
    assert f"x {ranks} ranks" in done.stdout
    assert done.stdout.count("step 6/6  loss") == 1
    assert sorted(path.name for path in (tmp_path / "run/logs").iterdir()) == [f"rank_{r}.log" for r in range(ranks)]
    reference = losses(one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "ref", train={"steps": 6}))[0])
    assert losses(list(read_metrics(tmp_path / "run/metrics.jsonl"))) == pytest.approx(reference, abs=1e-5)


@pytest.mark.slow
def test_a_run_that_compiles_nothing_imports_no_compiler_and_looks_for_none(config_file, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "launch.train"]
    done = run(command, config_file, f"train.run_dir={tmp_path / 'run'}", "train.steps=5")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "deepspeed.runtime.engine"} <= imported
    assert not imported & {"torch._inductor.compile_fx", "deepspeed.ops.op_builder.all_ops"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["override train.stepz=3", "did you mean train.steps?"]),
        (["train.device=cuda"], ["sees no GPU (", "train.device=cuda", "set train.device=cpu"]),
        (["train.precision=fp16"], ["train.precision", "fp16 needs a GPU"]),
    ],
)
def test_wrong_configuration_is_one_line_and_exit_code_2(overrides, words, config_file):
    done = run_module("launch.train", config_file, *overrides)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_missing_data_is_told_once_by_all_ranks_together(config_file, tmp_path):
    job = start(config_file, tmp_path / "run", "data.train.0.path=/nowhere/train")
    assert job.wait() == [1, 1]
    output = job.output(0) + job.output(1)
    assert output.count("error: /nowhere/train.idx: no such file") == 1
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("sections", "code", "words"),
    [
        ({"train": {"micro_batch_size": 8}}, 2, ["micro_batch_size: 8 does not divide a rank's share of 4"]),
        ({"data": {"validation": [{"path": "/nowhere/validation"}]}}, 1, ["/nowhere/validation.idx: no such file"]),
        ({"model": {"vocab_size": 64}}, 1, ["holds token id", "64 ids"]),
        ({"train": {"run_dir": "/proc/run"}}, 1, ["/proc/run"]),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 2, ["section deepspeed", "parallel.zero_stage"]),
        ({"deepspeed": {"zero_optimization": {"reduce_bucket_size": "x"}}}, 2, ["section deepspeed", "reduce_bucket"]),
    ],
)
def test_what_cannot_be_trained_is_refused_on_every_rank(sections, code, words, two_ranks, corpus, tmp_path):
    answers = two_ranks.run(refusal, tiny_config(corpus, tmp_path / "run", **sections))
    message, exit_code = answers[0]
    assert (exit_code, "\n" in message) == (code, False), message
    assert all(word in message for word in words), message


def test_tokenizer_larger_than_the_model_is_refused(one_rank, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    tokenizer = {"name": "gpt2", "vocab_sha256": "0" * 64, "vocab_size": 50257, "eod_id": 50256}
    train = IndexedDataset(corpus / "train")
    splits = {
        "train": {"documents": train.num_documents, "sequences": len(train), "tokens": train.num_tokens},
    }
    manifest = {"format_version": 1, "tokenizer": tokenizer, "splits": splits}
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    message, code = one_rank.run(refusal, tiny_config(tmp_path / "data", tmp_path / "run"))[0]
    assert code == 2
    assert "tokenizer gpt2 has 50257 ids, but the model knows 97" in message


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_non_finite_gradients_are_skipped_counted_and_leave_the_weights_alone(
    zero_stage, precision, grad_clip, two_ranks, corpus, tmp_path
):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        train={"precision": precision, "steps": 4},
        optimizer={"lr": 1e30, "grad_clip": grad_clip, "weight_decay": 0.0},
        schedule={"name": "constant", "warmup_steps": 0},
        parallel={"zero_stage": zero_stage},
        data={"validation": []},
        checkpoint={"every": 1, "keep": 4},
    )
    records = [r for r in two_ranks.run(train_and_report, config)[0] if r["kind"] == "train"]
    assert [record["skipped_steps"] for record in records] == [0, 1, 2, 3]
    assert records[-1]["grad_norm"] is None  # inf
    folder = tmp_path / "run/checkpoints"
    first, last = load_weights(folder / "step_00000001"), load_weights(folder / "step_00000004")
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_mirrors_are_written(one_rank, corpus, tmp_path):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        train={"steps": 6},
        logging={"tensorboard": True, "wandb": True, "wandb_mode": "offline"},
        checkpoint={"every": 3},
    )
    one_rank.run(train_and_report, config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 8})})
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")  # as if the run had been killed after step 3
    one_rank.run(train_and_report, longer)
    events.Reload()
    truth = [r["loss"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if r["kind"] == "train"]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(truth, rel=1e-6)
    offline = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(offline) == 2
    assert len({path.name for path in offline}) == 1  # one run, of which the second start is a part
    assert offline[0].stat().st_size > 1000


def test_validation_datasets_of_equal_names_are_all_evaluated(one_rank, corpus, tmp_path):
    for name in ("x", "y"):
        shutil.copytree(corpus, tmp_path / name / "corpus")
    sources = [{"path": str(tmp_path / name / "corpus/validation")} for name in ("x", "y")]
    config = tiny_config(corpus, tmp_path / "run", data={"validation": sources})
    records = [r for r in one_rank.run(train_and_report, config)[0] if r["kind"] == "validation"]
    assert [record["dataset"] for record in records] == ["x/corpus/validation", "y/corpus/validation"]
    assert records[0]["loss"] == records[1]["loss"]


def missing_on_rank_1(config) -> tuple[str, int]:
    """As `refusal`, but rank 1 cannot see the validation data."""
    if dist.get_rank() == 1:
        sources = [{"path": "/nowhere/validation"}]
        config = RunConfig.model_validate(
            config.model_dump() | {"data": config.data.model_dump() | {"validation": sources}}
        )
    return refusal(config)


def test_what_one_rank_alone_cannot_find_ends_all_ranks_and_names_that_rank(two_ranks, corpus, tmp_path):
    answers = two_ranks.run(missing_on_rank_1, tiny_config(corpus, tmp_path / "run"))
    assert answers[0] == answers[1]
    assert "/nowhere/validation.idx: no such file" in answers[0][0]
    assert answers[0][0].endswith("(on rank 1 only)")


def test_a_second_run_in_the_same_folder_is_refused_with_the_first_ones_name(one_rank, corpus, tmp_path):
    with run_folder.locked(tmp_path / "run"):
        message, code = one_rank.run(refusal, tiny_config(corpus, tmp_path / "run"))[0]
    assert code == 1
    assert f"another run is writing to it (process {os.getpid()} on" in message
    assert one_rank.run(refusal, tiny_config(corpus, tmp_path / "run"))[0] == ("trained", 0)
