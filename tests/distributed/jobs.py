"""What the ranks of a test do: whole training runs through the library's front door, on small random corpora."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from megagpt.config.schema import RunConfig
from megagpt.data.indexed import IndexedDatasetWriter
from megagpt.errors import UserError
from megagpt.training.metrics import read_metrics
from megagpt.training.run import train

VOCAB_SIZE = 97


def write_dataset(prefix: Path, tokens: int, seed: int = 0) -> None:
    """A token dataset with something to learn: noisy counting modulo the vocabulary, in documents of 50-150 tokens."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 2, 5], size=tokens, p=[0.8, 0.15, 0.05])
    stream = (np.cumsum(steps) % VOCAB_SIZE).astype(np.uint16)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        start = 0
        while start < tokens:
            length = min(int(rng.integers(50, 150)), tokens - start)
            writer.add_document(stream[start : start + length])
            start += length


def tiny_config(corpus: Path, run_dir: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """A two-layer model on corpus/train; `sections` change it: tiny_config(c, r, train={"steps": 5})."""
    tree: dict[str, Any] = {
        "model": {
            "vocab_size": VOCAB_SIZE,
            "num_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 4,
            "max_seq_len": 32,
        },
        "data": {"train": [{"path": str(corpus / "train")}], "validation": [{"path": str(corpus / "validation")}]},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 5},
        "train": {
            "run_dir": str(run_dir),
            "steps": 20,
            "global_batch_size": 8,
            "precision": "fp32",
            "device": "cpu",
            "compile": False,
        },
        "logging": {"every": 1},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return RunConfig.model_validate(tree)


def train_and_report(config: RunConfig) -> list[dict[str, Any]]:
    """Run `config` in this process group; the records of its metrics.jsonl."""
    train(config, torch.device("cpu"), Console(quiet=True))
    return list(read_metrics(Path(config.train.run_dir) / "metrics.jsonl"))


def losses(records: list[dict[str, Any]]) -> list[float]:
    """Training loss by step."""
    return [record["loss"] for record in records if record["kind"] == "train"]


def exact_numbers(run_dir: Path, after: int = 0) -> list[tuple[float, ...]]:
    """What must not change by a single bit, for each training step after step `after`."""
    records = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train" and r["step"] > after]
    return [(record["step"], *(record[key] for key in ("loss", "grad_norm", "lr", "tokens"))) for record in records]


def refusal(config: RunConfig) -> tuple[str, int]:
    """The message and exit code with which this process group refuses `config`."""
    try:
        train(config, torch.device("cpu"), Console(quiet=True))
    except UserError as error:
        return str(error), error.exit_code
    return "trained", 0


def train_in_fp16(config: RunConfig) -> list[dict[str, Any]]:
    """As `train_and_report`, in fp16 on a CPU: slow and nothing for users, but the loss scale is the same code."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True  # type: ignore[method-assign]
    try:
        return train_and_report(config)
    finally:
        accelerator.is_fp16_supported = supported  # type: ignore[method-assign]
