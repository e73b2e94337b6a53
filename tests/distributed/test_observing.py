"""What a run tells of itself: its records, the time it lost, what its model writes, its profile."""

import gzip
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megagpt.data.indexed import IndexedDatasetWriter
from megagpt.data.manifest import Manifest, SplitInfo, TokenizerInfo
from megagpt.inference.generate import generate_text
from megagpt.inference.loading import load_model
from megagpt.inference.sampling import Sampling
from megagpt.model import flops_per_token
from megagpt.tokenizer import load_tokenizer
from megagpt.training import recording
from megagpt.training.engine import Engine
from tests.distributed.jobs import refusal, tiny_config, train_and_report
from tests.distributed.launched import manifest, records

PARTS = ("data_seconds", "forward_backward_seconds", "optimizer_seconds")


def test_a_train_record_has_every_documented_number_and_they_add_up(two_ranks, corpus, tmp_path):
    config = tiny_config(
        corpus,
        tmp_path / "run",
        data={"train": [{"path": str(corpus / "train"), "name": "web"}]},
        train={"steps": 12},
        logging={"every": 4},
        evaluation={"every": 6},
        checkpoint={"every": 5, "keep": 9},
    )
    before = time.time()
    two_ranks.run(train_and_report, config)
    documented = recording.Metrics.__module__ and Path("megagpt/training/metrics.py").read_text().split('"""')[1]
    found = records(tmp_path / "run")
    for record in found:
        assert before <= record["time"] <= time.time()
        undocumented = [key for key in record if key not in documented]
        assert undocumented == [], record["kind"]
    trained = [record for record in found if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [4, 8, 12]
    for record in trained:
        assert sum(record[part] for part in PARTS) <= record["step_seconds"] * 1.01
        assert record["tokens_per_second"] == pytest.approx(8 * 32 / record["step_seconds"])
        assert record["tokens_per_second_per_rank"] == pytest.approx(record["tokens_per_second"] / 2)
        assert record["tokens"] == record["step"] * 8 * 32
        assert record["epochs"] == pytest.approx({"web": record["step"] * 8 / ((20_000 - 32) // 32)})
        assert 0 < record["goodput"] <= 1
        assert record["straggler_ratio"] >= 1
        assert record["mfu"] is None  # no peak is known of this machine
    assert trained[1]["evaluation_seconds"] > 0 == trained[0]["evaluation_seconds"]
    assert trained[1]["checkpoint_seconds"] > 0 == trained[0]["checkpoint_seconds"]
    saved = [record for record in found if record["kind"] == "checkpoint"]
    assert [record["step"] for record in saved] == [5, 10, 12]
    for record in saved:
        size = sum(path.stat().st_size for path in Path(record["path"]).rglob("*") if path.is_file())
        manifest = (Path(record["path"]) / "manifest.json").stat().st_size
        assert record["bytes"] == size - manifest
        assert 0 < record["stall_seconds"] <= record["seconds"]


def slow_on_rank_1(config) -> list[dict]:
    """As train_and_report, but the forward pass of rank 1 takes 50 ms longer."""
    step = Engine.step

    def slow(self, *arguments):
        forward = self._engine.forward
        self._engine.forward = lambda *inputs: (time.sleep(0.05 * dist.get_rank()), forward(*inputs))[1]
        try:
            return step(self, *arguments)
        finally:
            self._engine.forward = forward

    Engine.step = slow  # type: ignore[method-assign]
    try:
        return train_and_report(config)
    finally:
        Engine.step = step  # type: ignore[method-assign]


def test_the_slowest_rank_is_named(two_ranks, corpus, tmp_path):
    found = two_ranks.run(slow_on_rank_1, tiny_config(corpus, tmp_path / "run", train={"steps": 8}))[0]
    trained = [record for record in found if record["kind"] == "train"][2:]
    assert {record["slowest_rank"] for record in trained} == {1}
    assert min(record["straggler_ratio"] for record in trained) > 1.5


def test_mfu_is_flops_over_the_peak_of_all_ranks(two_ranks, corpus, tmp_path):
    config = tiny_config(corpus, tmp_path / "run", train={"steps": 6})
    found = two_ranks.run(with_peak, config, 1e9)[0]
    for record in (record for record in found if record["kind"] == "train"):
        flops = flops_per_token(config.model, 32) * 8 * 32 / record["step_seconds"]
        assert record["mfu"] == pytest.approx(flops / 2e9)


def with_peak(config, peak: float) -> list[dict]:
    """As train_and_report, on a device of this peak."""
    make = recording.Metrics.__init__
    recording.Metrics.__init__ = lambda self, sinks, _, *others: make(self, sinks, peak, *others)  # type: ignore[method-assign]
    try:
        return train_and_report(config)
    finally:
        recording.Metrics.__init__ = make  # type: ignore[method-assign]


def test_goodput_counts_the_time_between_restarts_and_steps_that_were_repeated(one_rank, corpus, tmp_path):
    def config(steps: int):
        return tiny_config(
            corpus,
            tmp_path / "run",
            schedule={"name": "constant"},
            train={"steps": steps},
            checkpoint={"every": 5},
            data={"validation": []},
        )

    one_rank.run(train_and_report, config(10))
    pause = 2.0
    time.sleep(pause)
    one_rank.run(train_and_report, config(15))
    first, last = records(tmp_path / "run", "start")[0], records(tmp_path / "run", "train")[-1]
    productive = sum(record["step_seconds"] for record in records(tmp_path / "run", "train"))
    started = manifest(tmp_path / "run/checkpoints/step_00000010")["started"]
    assert re.fullmatch(r"CPU with \d+ thread\(s\)", first["device"])
    assert 0 < first["time"] - started < 60  # the model is built in between
    assert last["time"] - first["time"] > pause
    assert last["goodput"] == pytest.approx(productive / (last["time"] - started), rel=0.01)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A dataset of real text with its tokenizer: folder with train and validation."""
    folder, tokenizer = tmp_path_factory.mktemp("texts"), load_tokenizer("gpt2")
    documents = [f"Line {n}: the quick brown fox jumps over {n} lazy dogs, naïvely." for n in range(300)]
    splits = {}
    for split, lines in (("train", documents), ("validation", documents[:20])):
        with IndexedDatasetWriter(folder / split, np.uint16) as writer:
            count = 0
            for line in lines:
                tokens = [*tokenizer.encode(line), tokenizer.eod_id]
                writer.add_document(np.array(tokens, np.uint16))
                count += len(tokens)
        splits[split] = SplitInfo(documents=len(lines), sequences=len(lines), tokens=count)
    info = TokenizerInfo(
        name="gpt2", vocab_sha256=tokenizer.vocab_sha256, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id
    )
    Manifest(tokenizer=info, splits=splits).save(folder)
    return folder


def text_config(texts: Path, run_dir: Path, **sections: dict):
    model = {"vocab_size": 50257, "num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    return tiny_config(texts, run_dir, model=model, train={"steps": 6}, **sections)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_prompts_are_continued_at_each_evaluation_as_the_saved_model_would(zero_stage, two_ranks, texts, tmp_path):
    prompts = ["Line 7: the quick", "A"]
    config = text_config(
        texts,
        tmp_path / "run",
        parallel={"zero_stage": zero_stage},
        evaluation={"every": 3, "prompts": prompts, "sample_tokens": 8},
    )
    two_ranks.run(train_and_report, config)
    found = records(tmp_path / "run", "sample")
    assert [(record["step"], record["prompt"]) for record in found] == [(3, p) for p in prompts] + [
        (6, p) for p in prompts
    ]
    loaded = load_model(tmp_path / "run", "cpu")
    for number, record in enumerate(found[2:]):
        pieces = generate_text(
            loaded.model, loaded.tokenizer, record["prompt"], Sampling(), max_new_tokens=8, seed=number
        )
        assert record["text"] == "".join(piece for (piece,) in pieces)


def test_bits_per_byte_are_those_of_the_text(two_ranks, texts, tmp_path):
    two_ranks.run(train_and_report, text_config(texts, tmp_path / "run"))
    (found,) = records(tmp_path / "run", "validation")
    stream = np.fromfile(texts / "validation.bin", np.uint16)
    text = load_tokenizer("gpt2").decode_bytes([token for token in stream[1:].tolist() if token != 50256])
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["targets"] / math.log(2) / len(text))


def test_prompts_without_a_tokenizer_are_refused(one_rank, corpus, tmp_path):
    message, code = one_rank.run(refusal, tiny_config(corpus, tmp_path / "run", evaluation={"prompts": ["x"]}))[0]
    assert code == 2
    assert "evaluation.prompts: no dataset of data.train has a manifest" in message


def test_the_profile_of_the_named_steps_is_a_trace_that_perfetto_reads(two_ranks, corpus, tmp_path):
    two_ranks.run(train_and_report, tiny_config(corpus, tmp_path / "run", train={"profile": "steps 3-4", "steps": 6}))
    (trace,) = (tmp_path / "run/profile").iterdir()
    assert trace.name == "steps_3-4.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) >= 2


def deterministic(config) -> list[dict]:
    from launch.process import _be_deterministic

    _be_deterministic()
    try:
        return train_and_report(config)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_determinism_switch_allows_all_that_training_does_and_repeats_a_run(two_ranks, corpus, tmp_path):
    def config(name: str):
        return tiny_config(
            corpus,
            tmp_path / name,
            model={"dropout": 0.1, "position": "rope", "activation": "swiglu", "norm": "rmsnorm", "bias": False},
            data={"document_mask": True},
            train={"deterministic": True, "precision": "bf16"},
            parallel={"zero_stage": 2},
        )

    first, second = (two_ranks.run(deterministic, config(name))[0] for name in ("first", "second"))
    keys = ("step", "loss", "grad_norm")
    assert [[r.get(k) for k in keys] for r in first] == [[r.get(k) for k in keys] for r in second]
