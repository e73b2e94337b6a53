"""Where a run continues, and whether it may: the checkpoint is chosen and compared with the configuration.

The run folder's own newest checkpoint always wins, so that a requeued command line, whatever its `checkpoint.resume`,
goes on where it was stopped.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megagpt.config.schema import RunConfig
from megagpt.data.history import BlendHistory, continue_history
from megagpt.errors import AgreedError, UsageError
from megagpt.training.checkpoint import (
    CheckpointManifest,
    complete_checkpoints,
    damage_of,
    find_checkpoint,
    newest_checkpoint,
    read_manifest,
)
from megagpt.training.collective import first_answer, on_rank_0, together

logger = logging.getLogger(__name__)

# What must be as it was: the manifest's key, and what checkpoint.allow_changes calls it (None: never).
_COMPARED: dict[str, str | None] = {
    "document_mask": "document_mask",
    "seed": None,
    "global_batch_size": "batch_size",
    "rampup": "batch_size",
    "precision": "precision",
    "optimizer": None,
    "no_decay": None,
}
_AS_IT_WAS = "set it as it was, or start a new run in another train.run_dir"
_MOST_NAMED = 8  # differences of data sets in one message


class Resumption(NamedTuple):
    """Where a run continues."""

    checkpoint: Path
    manifest: CheckpointManifest
    history: BlendHistory
    """How the run goes on reading its datasets."""
    changes: list[str]
    """What differs from the run that wrote it, as checkpoint.allow_changes permits."""


def find_resumption(config: RunConfig, expected: CheckpointManifest) -> Resumption | None:
    """The checkpoint to continue from, read whole and compared with its checksums; None for a new run.

    All ranks call it and share the reading. A damaged checkpoint is passed over for the one before, unless
    checkpoint.resume names it. Raises AgreedError if none is whole, or what it holds does not fit the configuration.
    """
    damaged: set[Path] = set()
    while checkpoint := on_rank_0(lambda: choose_checkpoint(config, damaged)):
        problem = first_answer(damage_of(checkpoint, dist.get_rank(), dist.get_world_size()))
        if problem is None:
            return together(lambda: _fitting(checkpoint, expected, config.checkpoint.allow_changes))
        if config.checkpoint.resume != "auto":
            raise AgreedError(problem, exit_code=1)
        logger.warning("not using %s", problem)
        damaged.add(checkpoint)
    return None


def _fitting(checkpoint: Path, expected: CheckpointManifest, allowed: Collection[str]) -> Resumption:
    manifest = read_manifest(checkpoint)
    changes = compare(checkpoint, manifest, expected, allowed)
    history, differences = continue_history(manifest.data, manifest.consumed_samples, expected.data)
    if refused := [found for found in differences if found.kind not in allowed]:
        kinds = dict.fromkeys(found.kind for found in refused)
        texts = ", ".join(found.text for found in refused[:_MOST_NAMED])
        texts += f" and {len(refused) - _MOST_NAMED} more" if len(refused) > _MOST_NAMED else ""
        permission = _permission(None if "seed" in kinds else ", ".join(kinds))
        raise UsageError(f"cannot resume from {checkpoint}: {texts}; {_AS_IT_WAS}{permission}")
    return Resumption(checkpoint, manifest, history, changes + [difference.text for difference in differences])


def choose_checkpoint(config: RunConfig, damaged: Collection[Path] = ()) -> Path | None:
    """The newest checkpoint to continue from, None for a new run. Raises UserError if there are only damaged ones.

    damaged: checkpoints that are known to be so, beside those whose files are missing or too short.
    """
    run_dir, resume = Path(config.train.run_dir), config.checkpoint.resume
    own = complete_checkpoints(run_dir / "checkpoints")
    if resume == "never":
        if own or (run_dir / "metrics.jsonl").exists():
            raise UsageError(
                f"checkpoint.resume=never, but {run_dir} already holds a run; "
                "choose another train.run_dir, or resume=auto to continue that run"
            )
        return None
    if resume == "auto":
        return newest_checkpoint(run_dir / "checkpoints", damaged)
    return _named_checkpoint(Path(resume), run_dir, own)


def _named_checkpoint(named: Path, run_dir: Path, own: list[Path]) -> Path:
    """The checkpoint that checkpoint.resume names, unless the run has gone on from it already."""
    checkpoint = find_checkpoint(named)
    if not own:
        return checkpoint
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None, "newest_checkpoint raises if checkpoints exist and none is whole"
    if checkpoint.resolve() == newest.resolve():
        return newest
    if checkpoint.resolve().parent == newest.resolve().parent:
        raise UsageError(
            f"checkpoint.resume={named}, but {newest} is newer; move the newer checkpoints away first, "
            "or resume into another train.run_dir"
        )
    logger.warning("continuing from %s, not from checkpoint.resume=%s: this run has come further", newest, named)
    return newest


def compare(
    checkpoint: Path, found: CheckpointManifest, expected: CheckpointManifest, allowed: Collection[str] = ()
) -> list[str]:
    """What differs between the run that wrote `checkpoint` and this one, as far as it is allowed.

    Raises UsageError naming the first difference that is not.
    """
    changes = []
    for key, name in _COMPARED.items():
        then, now = getattr(found, key), getattr(expected, key)
        if then == now:
            continue
        change = f"{key} was {then} and is now {now}"
        if name not in allowed:
            raise UsageError(f"cannot resume from {checkpoint}: {change}; {_AS_IT_WAS}{_permission(name)}")
        changes.append(change)
    done = found.step if expected.schedule.unit == "steps" else found.consumed_samples * expected.seq_len
    if difference := expected.schedule.difference(found.schedule, done):
        if "schedule" not in allowed:
            as_planned = f"schedule.decay_{expected.schedule.unit}={found.schedule.fall[1]}"
            raise UsageError(
                f"cannot resume from {checkpoint}: {difference}; set it as it was (a longer run keeps the planned "
                f"curve by {as_planned}){_permission('schedule')}"
            )
        changes.append(difference)
    changed = [
        f"model.{key} was {then} and is now {expected.model.get(key)}"
        for key, then in found.model.items()
        if then != expected.model.get(key)
    ]
    if changed:
        raise UsageError(f"cannot resume from {checkpoint}: {', '.join(changed)}")
    return changes


def _permission(name: str | None) -> str:
    return f", or say that it is meant by checkpoint.allow_changes=[{name}]" if name else ""
