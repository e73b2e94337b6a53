"""A new run starts from the weights of another, bit for bit, and learns from masked data as a plain torch loop does."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from megagpt.config.schema import DataSource, RunConfig
from megagpt.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagpt.data.loader import TrainingData
from megagpt.data.manifest import Manifest, SplitInfo, TokenizerInfo
from megagpt.model.gpt import GPT
from megagpt.training.checkpoint import find_checkpoint, load_weights
from megagpt.training.metrics import read_metrics
from tests.distributed.jobs import VOCAB_SIZE, losses, refusal, tiny_config, train_and_report

MODEL = {"hidden_size": 44, "tie_embeddings": False}  # 97 x 44 and the biases of 44 need padding on two ranks
STAY = {"optimizer": {"lr": 1e-30}, "schedule": {"warmup_steps": 0}, "evaluation": {"every": 1}}


@pytest.fixture(scope="module")
def source(one_rank, corpus, tmp_path_factory) -> Path:
    """A run folder with weights that learned something."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    one_rank.run(train_and_report, tiny_config(corpus, run_dir, model=MODEL, parallel={"zero_stage": 2}))
    return run_dir


@pytest.fixture(scope="module")
def export(source, tmp_path_factory) -> Path:
    """The same weights as safetensors in two files, with the section `model` alone."""
    folder = tmp_path_factory.mktemp("export")
    weights = sorted(load_weights(find_checkpoint(source)).items())
    save_file(dict(weights[::2]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(weights[1::2]), folder / "model-00002-of-00002.safetensors")
    tree = yaml.safe_load((source / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": tree["model"]}))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')  # as of another library
    return folder


def finetune(corpus: Path, run_dir: Path, source: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of one step from the weights at `source`."""
    train = {"init_from": str(source), "steps": 1, **sections.pop("train", {})}
    model = MODEL | sections.pop("model", {})
    return tiny_config(corpus, run_dir, model=model, train=train, **(STAY | sections))


def validation_losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "validation"]


@pytest.mark.parametrize(("kind", "zero_stage"), [("run", 0), ("run", 1), ("run", 2), ("run", 3), ("export", 3)])
def test_first_evaluation_is_the_last_of_the_source(kind, zero_stage, two_ranks, corpus, source, export, tmp_path):
    path = {"run": source, "export": export}[kind]
    config = finetune(corpus, tmp_path / "run", path, parallel={"zero_stage": zero_stage}, train={"seed": 7})
    two_ranks.run(train_and_report, config)
    assert validation_losses(tmp_path / "run") == pytest.approx(validation_losses(source)[-1:], abs=1e-6)
    assert validation_losses(source)[-1] < 4  # and random weights have log(97) = 4.57


@pytest.mark.parametrize(
    ("zero_stage", "offload", "kind"),
    [
        (0, False, "export"),
        (1, False, "run"),
        (1, True, "export"),
        (2, False, "export"),
        (3, False, "run"),
        (3, True, "run"),
    ],
)
def test_fp32_values_become_the_master_weights_of_a_bf16_run_unrounded(
    zero_stage, offload, kind, two_ranks, corpus, source, export, tmp_path
):
    config = finetune(
        corpus,
        tmp_path / "run",
        {"run": find_checkpoint(source), "export": export}[kind],
        parallel={"zero_stage": zero_stage, "offload_optimizer": offload},
        train={"precision": "bf16"},
    )
    two_ranks.run(train_and_report, config)
    before, after = load_weights(find_checkpoint(source)), load_weights(find_checkpoint(tmp_path / "run"))
    assert before.keys() == after.keys()
    for name in before:  # a step of 1e-30 moves nothing but zeros
        assert (before[name] - after[name]).abs().max() < 1e-29, name
        if zero_stage > 0 and name.endswith("weight") and "norm" not in name:
            assert (before[name].bfloat16().float() - after[name]).abs().max() > 1e-5, "the test must see rounding"
    assert validation_losses(tmp_path / "run") == pytest.approx(validation_losses(source)[-1:], rel=0.005)


def test_a_run_that_resumes_needs_its_source_no_more(one_rank, corpus, source, tmp_path):
    def run(name: str, steps: int, path: Path) -> list[float]:
        sections = {"optimizer": {"lr": 1e-3}, "schedule": {"warmup_steps": 0, "decay_steps": 10}}
        config = finetune(corpus, tmp_path / name, path, train={"steps": steps}, **sections)
        return losses(one_rank.run(train_and_report, config)[0])

    shutil.copytree(source, tmp_path / "copy")
    whole = run("whole", 6, source)
    run("cut", 3, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    assert run("cut", 6, tmp_path / "copy") == whole


def test_a_longer_context_dropout_and_written_out_defaults_are_no_other_model(one_rank, corpus, tmp_path):
    rope = {"position": "rope", "tie_embeddings": True, "hidden_size": 48}
    one_rank.run(train_and_report, tiny_config(corpus, tmp_path / "source", model=rope, train={"steps": 5}))
    same = {"max_seq_len": 64, "dropout": 0.1, "initializer_range": 0.1, "num_kv_heads": 4, "ffn_hidden_size": 192}
    config = finetune(corpus, tmp_path / "run", tmp_path / "source", model=rope | same, data={"seq_len": 32})
    one_rank.run(train_and_report, config)
    assert validation_losses(tmp_path / "run") == pytest.approx(validation_losses(tmp_path / "source")[-1:], abs=1e-6)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_layers": 3}, ["model.num_layers is 2 there and 3 here"]),
        ({"max_seq_len": 64}, ["model.max_seq_len is 32 there and 64 here"]),
        ({"num_attention_heads": 2}, ["model.num_attention_heads is 4 there and 2 here", "model.num_kv_heads is 4"]),
        ({"activation": "gelu_tanh", "norm_eps": 1e-6}, ["model.activation is gelu there", "model.norm_eps is 1e-05"]),
    ],
)
def test_weights_of_another_model_are_refused_by_key(model, words, two_ranks, corpus, source, tmp_path):
    message, code = two_ranks.run(refusal, finetune(corpus, tmp_path / "run", source, model=model))[0]
    assert code == 2
    assert message.startswith(f"train.init_from {source}: is of another model: ")
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not (tmp_path / "run/config.yaml").exists()


def change_weights(folder: Path, change: Any) -> None:
    """Rewrite the first file of an export with its weights changed in place."""
    path = folder / "model-00001-of-00002.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda e: (e / "model-00002-of-00002.safetensors").unlink(), "has no weight blocks.0.attention.out.weight;"),
        (lambda e: change_weights(e, lambda w: w.update(extra=torch.ones(1))), "has an unknown weight extra;"),
        (
            lambda e: change_weights(e, lambda w: w.update({"norm.bias": torch.ones(3)})),
            "weight norm.bias has shape (3,) instead of (44,)",
        ),
        (
            lambda e: change_weights(e, lambda w: w.update({"norm.bias": torch.ones(44, dtype=torch.int64)})),
            "weight norm.bias is of type I64",
        ),
        (
            lambda e: shutil.copy(e / "model-00001-of-00002.safetensors", e / "model.safetensors"),
            "which a file beside it has, too",
        ),
        (
            lambda e: (e / "model-00001-of-00002.safetensors").write_bytes(b"x" * 99),
            "00001-of-00002.safetensors: cannot",
        ),
        (lambda e: (e / "config.yaml").unlink(), "has safetensors, but no config.yaml"),
        (lambda e: (e / "config.yaml").write_text("train: {steps: 3}"), "config.yaml: has no section model"),
        (lambda e: (e / "config.yaml").write_text("a: ["), "config.yaml: cannot be read: "),
        (
            lambda e: (e / "config.yaml").write_text("model: {experts: 8}"),
            "this version of megagpt does not know its model.experts",
        ),
    ],
)
def test_a_damaged_export_is_refused_with_what_is_wrong(damage, words, one_rank, corpus, export, tmp_path):
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    damage(folder)
    message, code = one_rank.run(refusal, finetune(corpus, tmp_path / "run", folder))[0]
    assert code == 1
    assert words in message
    assert str(folder) in message
    assert "\n" not in message


def test_what_holds_no_weights_and_what_is_damaged_is_refused(two_ranks, corpus, source, tmp_path):
    message, code = two_ranks.run(refusal, finetune(corpus, tmp_path / "run", tmp_path / "none"))[0]
    assert (message, code) == (f"train.init_from: {tmp_path}/none: no such run folder or checkpoint", 1)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    shard = next((find_checkpoint(copy) / "deepspeed").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    message, code = two_ranks.run(refusal, finetune(corpus, tmp_path / "run", copy))[0]
    assert (code, message.startswith("train.init_from: ")) == (1, True)
    assert "is not what was written" in message


def test_data_of_another_tokenizer_than_the_weights_is_refused(one_rank, corpus, source, tmp_path):
    info = TokenizerInfo(name="own.tiktoken", vocab_sha256="a" * 64, vocab_size=VOCAB_SIZE, eod_id=96)
    data = Path(shutil.copytree(corpus, tmp_path / "data"))
    dataset = IndexedDataset(data / "train")
    split = SplitInfo(documents=dataset.num_documents, sequences=len(dataset), tokens=dataset.num_tokens)
    Manifest(tokenizer=info, splits={"train": split}).save(data)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text(info.model_copy(update={"vocab_sha256": "b" * 64}).model_dump_json())
    message, code = one_rank.run(refusal, finetune(data, tmp_path / "run", copy))[0]
    assert code == 2
    assert "knows tokenizer own.tiktoken (bbbbbbbbbbbb...), but the data was made with own.tiktoken (aaaa" in message
    (copy / "tokenizer.json").write_text(info.model_dump_json())
    assert one_rank.run(refusal, finetune(data, tmp_path / "run", copy))[0] == ("trained", 0)


def write_masked(folder: Path, corpus: Path) -> None:
    """corpus/train with a loss mask in `folder`, and the mask as the tokens of another dataset of the same shape."""
    rng, original = np.random.default_rng(5), IndexedDataset(corpus / "train")
    with (
        IndexedDatasetWriter(folder / "train", np.uint16, loss_mask=True) as masked,
        IndexedDatasetWriter(folder / "mask_as_tokens", np.uint16) as marks,
    ):
        for number in range(original.num_documents):
            tokens = original.document(number)
            mask = (np.arange(tokens.size) >= rng.integers(0, tokens.size + 1)).astype(np.uint8)
            masked.add_document(tokens, mask)
            marks.add_document(mask.astype(np.uint16))


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_training_on_masked_data_is_a_plain_torch_loop_that_ignores_masked_targets(
    zero_stage, two_ranks, corpus, source, tmp_path
):
    write_masked(tmp_path, corpus)
    steps, batch = 8, 8
    config = finetune(
        tmp_path,
        tmp_path / "run",
        source,
        data={"validation": []},
        optimizer={"lr": 1e-3, "weight_decay": 0.0, "grad_clip": 0.0},
        schedule={"name": "constant", "warmup_steps": 0},
        train={"steps": steps, "micro_batch_size": 2},
        parallel={"zero_stage": zero_stage},
        evaluation={"every": 0},
    )
    found = losses(two_ranks.run(train_and_report, config)[0])

    model = GPT(config.model)
    model.load_state_dict(load_weights(find_checkpoint(source)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    tokens, marks = (
        TrainingData([DataSource(path=str(prefix))], 32, config.train.seed, document_mask=False)
        for prefix in (corpus / "train", tmp_path / "mask_as_tokens")
    )
    expected = []
    for step in range(steps):
        read = tokens.read(step * batch, batch)
        learned = marks.read(step * batch, batch).targets == 1
        loss = F.cross_entropy(model(read.input_ids)[learned], read.targets[learned])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found[0] - found[-1]) > 1e-3
