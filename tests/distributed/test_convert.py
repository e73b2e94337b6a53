"""What several ranks trained, in transformers' world and back: the same bits, the same perplexity, no padding."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from megagpt.convert import open_source
from megagpt.data.loader import ValidationData
from megagpt.data.manifest import FileChecksum
from megagpt.errors import UserError
from megagpt.training.checkpoint import CheckpointManifest, find_checkpoint, load_weights, verify_checksums
from megagpt.training.metrics import read_metrics
from tests.distributed.jobs import VOCAB_SIZE, losses, refusal, tiny_config, train_and_report
from tests.unit.convert.models import Malicious, converted

BATCH = {"global_batch_size": 12}
PADDED = {"vocab_multiple_of": 32}  # 97 ids in 128 rows


def last_validation_loss(run_dir: Path) -> float:
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "validation"][-1]


@pytest.fixture(scope="module", params=[{"hidden_size": 44}, {"hidden_size": 44, **PADDED}], ids=["plain", "padded"])
def run(request, three_ranks, corpus, tmp_path_factory):
    """A run of three ranks at ZeRO stage 3, with tied weights that do not divide by three."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    config = tiny_config(corpus, run_dir, model=request.param, train=BATCH, parallel={"zero_stage": 3})
    three_ranks.run(train_and_report, config)
    return config, run_dir


def test_to_hugging_face_and_back_is_bit_identical(run, tmp_path):
    _, run_dir = run
    converted(run_dir, tmp_path / "hf", "hf", max_shard_bytes=30_000)
    converted(tmp_path / "hf", tmp_path / "ours", "megagpt")
    expected = load_weights(find_checkpoint(run_dir))
    found = {name: weight.read() for name, weight in open_source(tmp_path / "ours").weights.items()}
    assert found.keys() == expected.keys()
    assert found["embedding.weight"].shape == (VOCAB_SIZE, 44)
    for name, weight in found.items():
        assert torch.equal(weight, expected[name][: len(weight)]), name


@torch.no_grad()
def test_perplexity_is_the_same_in_both_worlds(run, tmp_path):
    config, run_dir = run
    converted(run_dir, tmp_path / "hf", "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True).eval()
    assert model.config.vocab_size == VOCAB_SIZE
    sizes = {"global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1}
    total = count = 0.0
    for batch in ValidationData(config.data.validation[0], config.seq_len, document_mask=False, **sizes):
        logits = model(batch.input_ids).logits
        total += F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum").item()
        count += (batch.targets != -100).sum().item()
    ours = last_validation_loss(run_dir)
    assert math.exp(total / count) == pytest.approx(math.exp(ours), rel=1e-4)
    assert ours < 4  # random weights have log(97) = 4.57


@pytest.mark.parametrize(("tied", "zero_stage"), [(True, 0), (False, 1), (True, 3)])
def test_padding_of_the_vocabulary_changes_no_loss(tied, zero_stage, two_ranks, corpus, tmp_path):
    def run(name: str, **padding: int) -> list[float]:
        model = {"tie_embeddings": tied, **padding}
        config = tiny_config(
            corpus, tmp_path / name, model=model, train={"steps": 8}, parallel={"zero_stage": zero_stage}
        )
        return losses(two_ranks.run(train_and_report, config)[0])

    assert run("padded", **PADDED) == pytest.approx(run("plain"), abs=2e-5)
    weights = load_weights(find_checkpoint(tmp_path / "padded"))
    for name in ("embedding.weight", "head.weight")[: 1 if tied else 2]:
        assert weights[name].shape == (128, 48)
        assert not weights[name][VOCAB_SIZE:].any(), "weight decay and the optimizer leave zeros alone"


def test_a_run_starts_from_weights_that_were_padded_otherwise(run, one_rank, corpus, tmp_path):
    _, run_dir = run
    config = tiny_config(
        corpus,
        tmp_path / "next",
        model={"hidden_size": 44, "vocab_multiple_of": 50},
        train={"init_from": str(run_dir), "steps": 1},
        optimizer={"lr": 1e-30},
        schedule={"warmup_steps": 0},
    )
    one_rank.run(train_and_report, config)
    assert last_validation_loss(tmp_path / "next") == pytest.approx(last_validation_loss(run_dir), abs=1e-5)


def test_a_resume_with_another_padding_is_refused_by_name(run, three_ranks, corpus):
    config, run_dir = run
    model = {"hidden_size": 44, "vocab_multiple_of": 50}
    other = tiny_config(corpus, run_dir, model=model, train=BATCH, parallel={"zero_stage": 3})
    message, code = three_ranks.run(refusal, other)[0]
    assert code == 2
    assert f"model.vocab_multiple_of was {config.model.vocab_multiple_of} and is now 50" in message


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_checkpoint_that_would_run_code_is_refused_by_all_that_read_it(zero_stage, one_rank, corpus, tmp_path):
    sections = {"parallel": {"zero_stage": zero_stage}, "schedule": {"name": "constant", "warmup_steps": 0}}
    config = tiny_config(corpus, tmp_path / "run", train={"steps": 1}, **sections)
    one_rank.run(train_and_report, config)
    checkpoint, mark = find_checkpoint(tmp_path / "run"), tmp_path / "code was run"
    (shard,) = (checkpoint / "deepspeed").glob("*model_states.pt")
    torch.save({"module": Malicious(mark)}, shard)
    manifest = CheckpointManifest.model_validate_json((checkpoint / "manifest.json").read_bytes())
    manifest.files[f"deepspeed/{shard.name}"] = FileChecksum.of(shard)
    (checkpoint / "manifest.json").write_text(manifest.model_dump_json())
    verify_checksums(checkpoint)
    longer = tiny_config(corpus, tmp_path / "run", train={"steps": 2}, **sections)
    beginning = tiny_config(corpus, tmp_path / "next", train={"init_from": str(checkpoint)})
    for start in (longer, beginning):
        message, code = one_rank.run(refusal, start)[0]
        assert code == 1
        assert "is not loaded, since it would call" in message
    with pytest.raises(UserError, match="is not loaded, since it would call"):
        converted(checkpoint, tmp_path / "hf", "hf")
    assert not mark.exists()
