"""A checkpoint holds what was trained, or is known as damaged and passed over; those that are kept are the newest."""

import json
import os

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.training.checkpoint import complete_checkpoints, load_weights, newest_checkpoint
from megagpt.training.metrics import read_metrics
from tests.distributed.jobs import (
    losses,
    refusal,
    tiny_config,
    train_and_report,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_read_from_a_checkpoint_are_those_that_were_trained(
    precision, zero_stage, tied, two_ranks, corpus, tmp_path
):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        parallel={"zero_stage": zero_stage},
        model={"tie_embeddings": tied, "hidden_size": 44},  # 97 x 44 and the biases of 44 need padding on two ranks
        train={"precision": precision},
    )
    records = two_ranks.run(train_and_report, config)[0]
    checkpoint = tmp_path / "run/checkpoints/step_00000020"
    weights = load_weights(checkpoint)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    model = GPT(config.model)
    model.load_state_dict(weights)
    stream = torch.frombuffer(bytearray((corpus / "validation.bin").read_bytes()), dtype=torch.uint16).long()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 32):
            total += model(stream[start:-1][None, :32], stream[start + 1 :][None, :32]).item()
    (validation,) = [record for record in records if record["kind"] == "validation"]
    tolerance = {"fp32": {"abs": 1e-5}, "bf16": {"rel": 0.005}}[precision]
    assert validation["loss"] == pytest.approx(total / (len(stream) - 1), **tolerance)
    if zero_stage > 0 and (zero_stage, precision) != (1, "bf16"):  # which DeepSpeed's own tool does not read
        reference = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed")
        assert reference.keys() == weights.keys()
        assert all(torch.equal(reference[name], weights[name]) for name in weights)


def test_damaged_checkpoint_is_passed_over_for_the_one_before(one_rank, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", checkpoint={"every": 8})
    whole = losses(one_rank.run(train_and_report, config)[0])
    newest = tmp_path / "run/checkpoints/step_00000020"
    shard = next((newest / "deepspeed").glob("*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size - 1)
    assert newest_checkpoint(tmp_path / "run/checkpoints").name == "step_00000016"
    assert losses(one_rank.run(train_and_report, config)[0]) == whole


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_one_flipped_byte_is_noticed_and_the_checkpoint_before_is_used(zero_stage, two_ranks, corpus, tmp_path):
    config = tiny_config(
        corpus, tmp_path / "run", train={"steps": 6}, parallel={"zero_stage": zero_stage}, checkpoint={"every": 4}
    )
    whole = losses(two_ranks.run(train_and_report, config)[0])
    newest = tmp_path / "run/checkpoints/step_00000006"
    shard = max((newest / "deepspeed").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    named = tiny_config(
        corpus, tmp_path / "run", parallel={"zero_stage": zero_stage}, checkpoint={"resume": str(newest)}
    )
    message, code = two_ranks.run(refusal, named)[0]
    assert code == 1
    assert f"{shard.relative_to(newest)} is not what was written" in message
    with pytest.raises(UserError, match="checksum differs"):
        load_weights(newest)
    assert losses(two_ranks.run(train_and_report, config)[0]) == whole
    assert load_weights(newest)  # the run came to this step again, and wrote it anew


def test_run_whose_checkpoints_are_all_damaged_does_not_start_anew_over_them(one_rank, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", checkpoint={"every": 10})
    one_rank.run(train_and_report, config)
    for checkpoint in complete_checkpoints(tmp_path / "run/checkpoints"):
        (checkpoint / "manifest.json").write_text("{")
    message, code = one_rank.run(refusal, config)[0]
    assert code == 1
    assert "every checkpoint in it is damaged" in message


def test_a_damaged_checkpoint_never_counts_as_the_newest_again(one_rank, corpus, tmp_path):
    folder = tmp_path / "run/checkpoints"
    one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "run", checkpoint={"every": 5, "keep": 3}))
    (folder / "step_00000020/manifest.json").write_text("{")
    shorter = tiny_config(
        corpus,
        tmp_path / "run",
        train={"steps": 17},
        checkpoint={"every": 2, "keep": 2, "allow_changes": ["schedule"]},
    )
    one_rank.run(train_and_report, shorter)  # from step 15
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000016", "step_00000017"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000016", "step_00000017"]


def test_a_kill_while_a_checkpoint_is_replaced_by_itself_leaves_one_of_them(one_rank, corpus, tmp_path):
    folder = tmp_path / "run/checkpoints"
    config = tiny_config(corpus, tmp_path / "run", checkpoint={"every": 12, "keep": 1})
    whole = losses(one_rank.run(train_and_report, config)[0])
    (folder / "step_00000020").rename(folder / ".replacing_step_00000020")  # the moment between two renames
    assert one_rank.run(refusal, config)[0] == ("trained", 0)
    assert losses(list(read_metrics(tmp_path / "run/metrics.jsonl"))) == whole
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000020"]


def test_only_the_newest_checkpoints_are_kept_and_latest_names_the_last(one_rank, corpus, tmp_path):
    one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "run", checkpoint={"every": 5, "keep": 2}))
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000015", "step_00000020"]
    assert (folder / "latest").read_text() == "step_00000020\n"
    manifest = json.loads((folder / "step_00000020/manifest.json").read_text())
    on_disk = {
        str(p.relative_to(folder / "step_00000020")) for p in (folder / "step_00000020").rglob("*") if p.is_file()
    }
    assert on_disk == {"manifest.json", *manifest["files"]}
