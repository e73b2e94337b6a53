"""How a run moves through its data: batch ramp-up, schedules in tokens, and what may change at a resume."""

import shutil
from pathlib import Path

import pytest

from megagpt.config.schema import RunConfig
from tests.distributed.jobs import losses, refusal, tiny_config, train_and_report, write_dataset
from tests.distributed.launched import records

RAMP = {"global_batch_size": 12, "rampup_start": 4, "rampup_samples": 48, "steps": 14}


def trained(run_dir: Path) -> list[dict]:
    return records(run_dir, "train")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_ramp_up_gives_the_same_losses_for_all_ranks_and_goes_on_after_a_resume(
    zero_stage, one_rank, two_ranks, corpus, tmp_path
):
    def config(name: str, steps: int = 14, **checkpoint: object) -> RunConfig:
        return tiny_config(
            corpus,
            tmp_path / name,
            train=RAMP | {"steps": steps},
            schedule={"warmup_tokens": 32 * 40, "decay_tokens": 32 * 100},
            parallel={"zero_stage": zero_stage},
            data={"validation": []},
            checkpoint=checkpoint,
        )

    one_rank.run(train_and_report, config("one"))
    two_ranks.run(train_and_report, config("whole"))
    for last in (13, 14):  # saved at step 5, in the ramp-up and in the warm-up
        two_ranks.run(train_and_report, config("cut", steps=last, every=5, keep=9))
        for late in (10, 13):
            shutil.rmtree(tmp_path / f"cut/checkpoints/step_{late:08d}", ignore_errors=True)
    whole = trained(tmp_path / "whole")
    assert [record["batch_size"] for record in whole] == [4] * 6 + [8] * 3 + [12] * 5
    assert [record["tokens"] // 32 for record in whole] == [4, 8, 12, 16, 20, 24, 32, 40, 48, 60, 72, 84, 96, 108]
    # Warm-up over 40 sequences: a step's rate is that of the tokens it reaches.
    assert [record["lr"] for record in whole[:8]] == pytest.approx(
        [3e-3 * min(1, n / 40) for n in (4, 8, 12, 16, 20, 24, 32, 40)]
    )
    assert losses(trained(tmp_path / "cut")) == losses(whole)
    assert losses(trained(tmp_path / "one")) == pytest.approx(losses(whole), abs=1e-5)


def test_a_run_is_as_long_as_its_tokens_say(one_rank, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", train={"tokens": 32 * 8 * 6 - 5})
    one_rank.run(train_and_report, config)
    assert [record["step"] for record in trained(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert records(tmp_path / "run", "stop")[-1]["reason"] == "finished"


def test_a_run_ends_at_its_tokens_also_if_batch_and_sequence_change_on_the_way(one_rank, corpus, tmp_path):
    """160 sequences of 32 tokens: 10 steps of 8, then 5 of 4 with half the length, then the rest in steps of 16."""
    allowed = {"allow_changes": ["batch_size", "seq_len"], "every": 5, "keep": 9}
    schedule = {"warmup_tokens": 640, "name": "linear", "min_lr_ratio": 0.0}

    def run(batch: int, seq_len: int, cut: int | None = None) -> list[dict]:
        config = tiny_config(
            corpus,
            tmp_path / "run",
            train={"tokens": 160 * 32, "global_batch_size": batch},
            data={"seq_len": seq_len, "validation": []},
            schedule=schedule,
            checkpoint=allowed,
        )
        one_rank.run(train_and_report, config)
        for path in (tmp_path / "run/checkpoints").glob("step_*") if cut else ():
            if int(path.name.removeprefix("step_")) > cut:
                shutil.rmtree(path)
        return trained(tmp_path / "run")

    run(8, 32, cut=10)
    run(4, 16, cut=15)
    found = run(16, 32)
    tokens = [8 * 32 * n for n in range(1, 11)] + [2560 + 64 * n for n in range(1, 6)]
    tokens += [2880 + 512 * n for n in range(1, 6)]  # the last step goes beyond 5,120, as steps are whole
    assert [record["tokens"] for record in found] == tokens
    rates = [record["lr"] for record in found]
    assert rates[3:] == sorted(rates[3:], reverse=True)  # no jump back into warm-up
    assert rates[-1] < 0.15 * max(rates)


def test_a_ramp_up_that_the_ranks_cannot_divide_is_refused(two_ranks, corpus, tmp_path):
    sizes = {"global_batch_size": 9, "rampup_start": 3, "rampup_samples": 30}
    message, code = two_ranks.run(refusal, tiny_config(corpus, tmp_path / "run", train=sizes))[0]
    assert code == 2
    assert "a step of the ramp-up has 3 sequences, which 2 ranks" in message


@pytest.fixture(scope="module")
def cut(one_rank, corpus, tmp_path_factory) -> Path:
    """A run of 10 steps with a constant learning rate, to go on from."""
    run_dir = tmp_path_factory.mktemp("cut") / "run"
    one_rank.run(train_and_report, constant(corpus, run_dir, train={"steps": 10}))
    return run_dir


def constant(corpus: Path, run_dir: Path, **sections: dict) -> RunConfig:
    return tiny_config(corpus, run_dir, schedule={"name": "constant", "warmup_steps": 2}, **sections)


def test_a_blend_may_change_in_the_middle_if_that_is_said_and_repeats_no_sample(one_rank, corpus, cut, tmp_path):
    write_dataset(tmp_path / "code", 9_000, seed=3)
    sources = [
        {"path": str(corpus / "train"), "weight": 0.5, "name": "web"},
        {"path": str(tmp_path / "code"), "weight": 0.5, "name": "code"},
    ]
    changed = {"data": {"train": sources}, "checkpoint": {"resume": str(cut)}}
    message, code = one_rank.run(refusal, constant(corpus, tmp_path / "refused", **changed))[0]
    assert code == 2
    assert "code: new" in message
    changed["checkpoint"]["allow_changes"] = ["data"]
    found = one_rank.run(train_and_report, constant(corpus, tmp_path / "run", **changed))[0]
    events = [record["message"] for record in found if record["kind"] == "event"]
    assert "code: new" in events
    epochs = [record["epochs"] for record in found if record["kind"] == "train"]
    samples = {"web": (20_000 - 32) // 32, "code": (9_000 - 32) // 32}
    # 80 samples of web before, then four of each in every step.
    assert epochs[0] == pytest.approx({"web": 84 / samples["web"], "code": 4 / samples["code"]})
    assert epochs[-1] == pytest.approx({"web": 120 / samples["web"], "code": 40 / samples["code"]})


@pytest.mark.parametrize(
    ("sections", "name", "told"),
    [
        ({"data": {"seq_len": 16}}, "seq_len", "seq_len: 16, was 32"),
        ({"data": {"document_mask": True}}, "document_mask", "document_mask was False and is now True"),
        ({"train": {"global_batch_size": 16}}, "batch_size", "global_batch_size was 8 and is now 16"),
        ({"train": {"precision": "bf16"}}, "precision", "precision was fp32 and is now bf16"),
        ({"optimizer": {"lr": 1e-3}}, "schedule", "optimizer.lr was 0.003 and is now 0.001"),
    ],
)
def test_what_a_resume_changes_must_be_allowed_by_name_and_is_logged(
    sections, name, told, one_rank, corpus, cut, tmp_path
):
    named = {"resume": str(cut)}
    message, code = one_rank.run(refusal, constant(corpus, tmp_path / "refused", checkpoint=named, **sections))[0]
    assert code == 2
    assert told in message
    assert f"checkpoint.allow_changes=[{name}]" in message
    named["allow_changes"] = [name]
    found = one_rank.run(train_and_report, constant(corpus, tmp_path / "run", checkpoint=named, **sections))[0]
    assert any(told in record["message"] for record in found if record["kind"] == "event")
    assert [record["step"] for record in found if record["kind"] == "train"] == list(range(11, 21))
    assert losses(found)[0] < 3.9  # it went on, not anew: a new run begins at 4.6
