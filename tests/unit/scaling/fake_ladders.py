"""Ladders whose losses are known: real folders, with metrics written by a law instead of by runs."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megagpt.scaling.experiments import EntryFolder, StoredStudy, StudyFolder
from megagpt.scaling.laws.law import Law
from megagpt.scaling.laws.study import LawsConfig, load_laws, plan_laws, rung
from tests.unit.scaling.fake_studies import write_config
from tests.unit.training.fake_runs import write_records

SIZES = {
    f"w{width}": {"model.hidden_size": width, "model.num_attention_heads": width // 16} for width in (32, 64, 128, 256)
}
LAW = Law(E=1.5, A=40.0, B=60.0, alpha=0.35, beta=0.3)


def write_ladder(folder: Path, **keys: Any) -> Path:
    """A study of four sizes on four budgets, with datasets of which only the indices exist, empty."""
    (folder / "validation.idx").touch()
    config = write_config(
        folder, data={"train": [{"path": str(folder / "train")}], "validation": [{"path": str(folder / "validation")}]}
    )
    tree = {"config": str(config), "sizes": SIZES, "flops": [1e12, 4e12, 1.6e13, 6.4e13], "lr": 1e-2} | keys
    (folder / "ladder.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder / "ladder.yaml"


def create_ladder(folder: Path, study: LawsConfig) -> StudyFolder:
    """The folder of a ladder of which nothing has run."""
    entries = plan_laws(study)
    stored = StoredStudy(kind="laws", launcher="torchrun", source="ladder.yaml", versions={"torch": "2"}, study=study,
                         entries=[entry.name for entry in entries])  # fmt: skip
    folder.mkdir(exist_ok=True)
    return StudyFolder.create(folder, stored, entries)


def finish_run(entry: EntryFolder, loss: float, step: int | None = None) -> None:
    """Let a run have finished with this validation loss, of its last step unless another is given."""
    attempt, config = entry.begin(), entry.stored.run_config()
    steps = config.train.steps
    last = {"kind": "validation", "step": step or steps, "time": 9.0, "dataset": "validation", "loss": loss}
    write_records(entry.run_dir(attempt), [
        {"kind": "start", "step": 0, "time": 0.0, "world_size": 1, "device": "a chip", "continues_from": None},
        last | {"step": 1, "loss": 9.0},
        last,
        {"kind": "stop", "step": steps, "time": 10.0, "reason": "finished"},
    ])  # fmt: skip
    entry.end(attempt, 0, keep_checkpoints=False)


def finished_ladder(folder: Path, noise: float = 2e-3, seed: int = 0, law: Law = LAW, **keys: Any) -> StudyFolder:
    """A finished ladder; noise: of log losses."""
    study = load_laws(write_ladder(folder, **keys))
    made, random = create_ladder(folder / "output", study), np.random.default_rng(seed)
    for entry in made.entries:
        one = rung(study, entry.stored.curve, entry.stored.run_config())
        finish_run(entry, float(law.loss(one.parameters, one.tokens)) * float(np.exp(noise * random.normal())))
    return made
