"""A run continues exactly where its newest complete checkpoint ended, or says why it cannot."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from megagpt.config import save_config
from megagpt.training.checkpoint import complete_checkpoints, newest_checkpoint
from megagpt.training.metrics import read_metrics
from megagpt.training.saving import random_states, restore_random_states
from tests.distributed.jobs import (
    exact_numbers,
    losses,
    refusal,
    tiny_config,
    train_and_report,
    train_in_fp16,
    write_dataset,
)
from tests.distributed.launched import start


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the launcher and every rank, as a power cut would have it: torchrun's ranks lead their own groups."""
    for member in (*psutil.Process(process.pid).children(recursive=True), process):
        member.kill()
    process.communicate()


def torchrun(config_file: Path, *overrides: str) -> subprocess.Popen[str]:
    """The launch command on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "launch.train", str(config_file), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_killed_run_resumes_bit_identical_to_an_uninterrupted_one(corpus, tmp_path):
    config = tiny_config(
        corpus,
        tmp_path / "whole",
        model={"dropout": 0.1},
        train={"steps": 150, "precision": "bf16", "micro_batch_size": 2},
        parallel={"zero_stage": 2},
        checkpoint={"every": 20},
        evaluation={"every": 50, "batches": 2},
    )
    save_config(config, tmp_path / "config.yaml")
    whole = start(tmp_path / "config.yaml", tmp_path / "whole")
    assert whole.wait() == [0, 0], whole.output()

    killed_dir = tmp_path / "killed"
    killed = torchrun(tmp_path / "config.yaml", f"train.run_dir={killed_dir}")
    deadline = time.monotonic() + 120
    while len(complete_checkpoints(killed_dir / "checkpoints")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    kill_tree(killed)
    checkpoint = newest_checkpoint(killed_dir / "checkpoints")
    assert checkpoint is not None
    step = int(checkpoint.name.removeprefix("step_"))
    assert 0 < step < 150

    resumed = start(tmp_path / "config.yaml", killed_dir)
    assert resumed.wait() == [0, 0], resumed.output()
    assert f"continues from {checkpoint.name}" in resumed.output()
    assert exact_numbers(killed_dir, after=step) == exact_numbers(tmp_path / "whole", after=step)
    assert [number[0] for number in exact_numbers(killed_dir)] == list(range(1, 151))  # no step twice, none missing


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_bit_identical_at_every_zero_stage(zero_stage, precision, two_ranks, corpus, tmp_path):
    """With dropout, accumulation and a blend; cut in warm-up and again in decay, in the middle of an epoch."""
    write_dataset(tmp_path / "other", 3_000, seed=7)
    loss_scale = {"fp16": {"initial_scale_power": 30, "loss_scale_window": 2}}  # falls, then rises at every other step

    def run(run_dir: Path, steps: int) -> None:
        sources = [{"path": str(corpus / "train"), "weight": 0.7}, {"path": str(tmp_path / "other"), "weight": 0.3}]
        config = tiny_config(
            corpus,
            run_dir,
            model={"dropout": 0.1},
            data={"train": sources},
            train={"steps": steps, "precision": precision, "micro_batch_size": 2, "device": "auto"},
            schedule={"warmup_steps": 3, "decay_steps": 25},
            parallel={"zero_stage": zero_stage},
            checkpoint={"every": 4},
            evaluation={"every": 5, "batches": 1},
            deepspeed=loss_scale if precision == "fp16" and zero_stage else {},
        )
        two_ranks.run(train_in_fp16 if precision == "fp16" else train_and_report, config)

    run(tmp_path / "whole", 20)
    run(tmp_path / "cut", 3)
    run(tmp_path / "cut", 14)
    run(tmp_path / "cut", 20)
    assert exact_numbers(tmp_path / "cut") == exact_numbers(tmp_path / "whole")
    skipped = [r["skipped_steps"] for r in read_metrics(tmp_path / "whole/metrics.jsonl") if r["kind"] == "train"]
    assert (skipped[-1] > 0) == (precision == "fp16" and zero_stage > 0)


def draw_numbers(checkpoint: Path) -> tuple[list[float], list[float]]:
    """Random numbers of each kind after a checkpoint's states were restored, and the states' own continuation."""

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    torch.manual_seed(dist.get_rank())
    (checkpoint / "random").mkdir(parents=True, exist_ok=True)
    torch.save(random_states(), checkpoint / f"random/rank_{dist.get_rank():05d}.pt")
    expected = draw()
    draw()
    restore_random_states(checkpoint, dist.get_rank())
    return draw(), expected


def test_every_ranks_random_generators_go_on_where_the_checkpoint_found_them(two_ranks, tmp_path):
    found = two_ranks.run(draw_numbers, tmp_path)
    assert all(drawn == expected for drawn, expected in found)
    assert found[0] != found[1]


def test_named_checkpoint_of_another_run_is_continued_once(one_rank, corpus, tmp_path):
    whole = losses(one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "run", checkpoint={"every": 8}))[0])
    source = tmp_path / "run/checkpoints/step_00000016"
    named = {"resume": str(source), "every": 2}
    branch = losses(one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "branch", checkpoint=named))[0])
    assert branch == whole[16:]
    again = one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "branch", checkpoint=named))[0]
    assert losses(again) == branch  # it continued from its own last checkpoint: nothing was left to do


def test_a_named_checkpoint_that_is_gone_stops_a_new_run_but_not_one_that_has_come_further(one_rank, corpus, tmp_path):
    named = tiny_config(corpus, tmp_path / "run", checkpoint={"resume": "/nowhere"})
    message, code = one_rank.run(refusal, named)[0]
    assert (message, code) == ("/nowhere: no such run folder or checkpoint", 1)
    one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "run", checkpoint={"every": 8}))
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000020")
    assert one_rank.run(refusal, named)[0] == ("trained", 0)


def test_older_checkpoint_of_the_same_run_is_not_continued_over_the_newer_one(one_rank, corpus, tmp_path):
    one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "run", checkpoint={"every": 8}))
    older = tmp_path / "run/checkpoints/step_00000016"
    message, code = one_rank.run(refusal, tiny_config(corpus, tmp_path / "run", checkpoint={"resume": str(older)}))[0]
    assert code == 2
    assert "step_00000020 is newer" in message


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_optimizer_settings_changed_at_a_resume_are_those_that_are_used(zero_stage, one_rank, corpus, tmp_path):
    def run(name: str, **optimizer: object) -> list[float]:
        config = tiny_config(
            corpus, tmp_path / name, optimizer=optimizer, parallel={"zero_stage": zero_stage}, checkpoint={"every": 10}
        )
        return losses(one_rank.run(train_and_report, config)[0])

    plain = run("plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "changed")
    shutil.rmtree(tmp_path / "changed/checkpoints/step_00000020")
    shutil.copytree(tmp_path / "changed", tmp_path / "clipped")
    changed = run("changed", weight_decay=5.0, betas=[0.5, 0.5])
    assert changed[:11] == plain[:11]
    assert changed[-1] != pytest.approx(plain[-1], abs=1e-3)
    clipped = run("clipped", grad_clip=1e-6)  # far below Adam's eps: hardly a step is taken any more
    assert clipped[:11] == plain[:11]
    assert min(clipped[11:]) > min(plain[11:]) + 0.1


@pytest.mark.parametrize(
    "schedule", [{"name": "constant"}, {"name": "cosine", "decay_steps": 15}, {"name": "wsd", "decay_steps": 5}]
)
def test_finished_run_says_so_and_is_extended_as_if_planned(schedule, one_rank, corpus, tmp_path):
    def run(name: str, steps: int) -> list[float]:
        config = tiny_config(
            corpus, tmp_path / name, schedule=schedule, train={"steps": steps}, checkpoint={"every": 6}
        )
        return losses(one_rank.run(train_and_report, config)[0])

    first = run("run", 12)
    assert run("run", 12) == first
    if schedule["name"] == "wsd":  # its fall has begun: go on from before it
        shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    assert run("run", 20) == run("planned", 20)


def test_an_extension_that_the_schedule_cannot_give_says_why_and_what_to_set(one_rank, corpus, tmp_path):
    one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "run", train={"steps": 12}))
    longer = {"train": {"steps": 20}}
    message, code = one_rank.run(refusal, tiny_config(corpus, tmp_path / "run", **longer))[0]
    assert code == 2
    assert "the length of the run in steps was 12 and is now 20" in message
    assert "schedule.decay_steps=7" in message
    assert "checkpoint.allow_changes=[schedule]" in message
    planned = {"schedule": {"decay_steps": 7}}
    assert one_rank.run(refusal, tiny_config(corpus, tmp_path / "run", **longer, **planned))[0] == ("trained", 0)


@pytest.fixture(scope="module")
def finished_run(one_rank, corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    one_rank.run(train_and_report, tiny_config(corpus, run_dir, train={"steps": 6}))
    return run_dir


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"num_layers": 3}}, ["model.num_layers was 2 and is now 3"]),
        ({"train": {"seed": 5}}, ["seed was 0 and is now 5"]),
        ({"train": {"global_batch_size": 16}}, ["global_batch_size was 8 and is now 16"]),
        ({"data": {"document_mask": True}}, ["document_mask was False and is now True"]),
        ({"optimizer": {"no_decay": []}}, ["no_decay was"]),
        ({"optimizer": {"name": "muon"}}, ["optimizer was adamw and is now muon"]),
        ({"data": {"seq_len": 16}}, ["seq_len: 16, was 32", "checkpoint.allow_changes=[seq_len]"]),
        ({"train": {"precision": "bf16"}}, ["precision was fp32 and is now bf16"]),
        ({"checkpoint": {"resume": "never"}}, ["already holds a run", "choose another train.run_dir"]),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused_by_name(sections, words, one_rank, corpus, finished_run):
    message, _ = one_rank.run(refusal, tiny_config(corpus, finished_run, **sections))[0]
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_changed_data_is_refused(one_rank, corpus, finished_run, tmp_path):
    shutil.copytree(corpus, tmp_path / "grown")
    for suffix in ("bin", "idx"):
        (tmp_path / "grown" / f"train.{suffix}").write_bytes((corpus / f"validation.{suffix}").read_bytes())
    message, code = one_rank.run(refusal, tiny_config(tmp_path / "grown", finished_run))[0]
    assert code == 2
    assert "train: new" in message


def test_a_problem_on_one_rank_ends_all_ranks_with_its_message(two_ranks, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", train={"global_batch_size": 7})
    answers = two_ranks.run(refusal, config)
    assert answers[0] == answers[1]
    assert "7 sequences cannot be divided among 2 ranks" in answers[0][0]
    assert answers[0][1] == 2
