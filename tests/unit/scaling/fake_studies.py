"""Studies whose step times are known: real folders, with metrics written by a formula instead of by a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megagpt.scaling.experiments import EntryFolder, StoredStudy, StudyFolder
from megagpt.scaling.study import Kind, StudyConfig, load_study, plan
from megagpt.training.metrics import Record
from tests.unit.training.fake_runs import write_records

MODEL = {"vocab_size": 128, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_seq_len": 16}


def write_config(folder: Path, name: str = "tiny.yaml", **sections: Any) -> Path:
    """A run's configuration, with a dataset of which only the index exists, empty."""
    (folder / "train.idx").touch()
    tree = {"model": MODEL, "data": {"train": [{"path": str(folder / "train")}]}, "train": {"global_batch_size": 64}}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    (folder / name).write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / name


def write_study(folder: Path, **keys: Any) -> Path:
    """A study of that configuration."""
    tree = {"configs": [str(write_config(folder))], "ranks": [1, 2, 4, 8], "steps": 30, "discard_steps": 10} | keys
    (folder / "study.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder / "study.yaml"


def create(folder: Path, kind: Kind, study: StudyConfig) -> StudyFolder:
    """The folder of a study of which nothing has run."""
    entries = plan(study, kind)
    stored = StoredStudy(kind=kind, launcher="torchrun", source="study.yaml", versions={}, study=study,
                         entries=[entry.name for entry in entries])  # fmt: skip
    folder.mkdir(exist_ok=True)
    return StudyFolder.create(folder, stored, entries)


def records(ranks: int, seconds: list[float], tokens: int, first: int = 0, **start: Any) -> list[Record]:
    """A start and a train record a step, whose wall times are given."""
    found: list[Record] = [
        {"kind": "start", "step": first, "time": 0.0, "world_size": ranks, "device": "a chip", "continues_from": None}
        | start
    ]
    for step, wall in enumerate(seconds, start=first + 1):
        found.append({
            "kind": "train", "step": step, "time": float(step), "tokens": step * tokens, "loss": 3.0, "lr": 1e-3,
            "step_seconds": wall, "data_seconds": 0.05 * wall, "forward_backward_seconds": 0.7 * wall,
            "optimizer_seconds": 0.2 * wall, "tokens_per_second": tokens / wall, "mfu": 0.4 / wall,
            "peak_memory_bytes": 2**30, "straggler_ratio": 1.1,
        })  # fmt: skip
    return found


def finish(entry: EntryFolder, seconds: list[float], **start: Any) -> None:
    """Let a run have finished with these wall times of its steps."""
    attempt, config = entry.begin(), entry.stored.run_config()
    written = records(entry.stored.ranks, seconds, config.train.global_batch_size * config.seq_len, **start)
    stop = {"kind": "stop", "step": written[-1]["step"], "time": 99.0, "reason": "finished"}
    write_records(entry.run_dir(attempt), [*written, stop])
    entry.end(attempt, 0, keep_checkpoints=False)


def measured_study(
    folder: Path, kind: Kind, seconds: Callable[[EntryFolder], float], noise: float = 0.01, seed: int = 0, **keys: Any
) -> StudyFolder:
    """A finished study; the first steps of each run take ten times as long.

    seconds: mean of a step by run. noise: of single steps, relative.
    """
    study = load_study(write_study(folder, **keys))
    made, random = create(folder / "output", kind, study), np.random.default_rng(seed)
    for entry in made.entries:
        factors = 1 + noise * random.standard_normal(study.steps)
        factors[: study.discard_steps] *= 10
        finish(entry, list(seconds(entry) * factors))
    return made
