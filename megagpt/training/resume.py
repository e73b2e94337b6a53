"""Where a run continues, and whether it may: the checkpoint is chosen and compared with the configuration.

The run folder's own newest checkpoint always wins, so that a requeued command line goes on where it was stopped also if
its `checkpoint.resume` names another run's checkpoint, be that still there or not.
"""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megagpt.config.compatibility import weight_differences
from megagpt.config.schema import ModelConfig, RunConfig
from megagpt.data.history import BlendHistory, continue_history
from megagpt.errors import AgreedError, UsageError
from megagpt.training.checkpoint import (
    CheckpointManifest,
    complete_checkpoints,
    damage_of,
    find_checkpoint,
    newest_checkpoint,
    read_manifest,
    rescue,
    set_aside,
)
from megagpt.training.collective import first_answer, on_rank_0, together
from megagpt.training.horizon import horizon
from megagpt.training.schedule import Schedule

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
    schedule: Schedule
    """The learning rates from here on."""
    changes: list[str]
    """What differs from the run that wrote it, as checkpoint.allow_changes permits."""


def find_resumption(config: RunConfig, expected: CheckpointManifest, resume: str | None = None) -> Resumption | None:
    """The checkpoint to continue from, read whole and compared with its checksums; None for a new run.

    All ranks call it and share the reading. resume: instead of config.checkpoint.resume. A damaged checkpoint of the
    run is set aside, and the one before is used; one that `resume` names is refused. Raises AgreedError if none is
    whole, or what it holds does not fit the configuration.
    """
    resume = resume or config.checkpoint.resume
    checkpoints = Path(config.train.run_dir) / "checkpoints"
    on_rank_0(lambda: rescue(checkpoints))
    damaged: set[Path] = set()
    while checkpoint := on_rank_0(lambda: choose_checkpoint(config, resume, damaged)):
        problem = first_answer(together(lambda: damage_of(checkpoint, dist.get_rank(), dist.get_world_size())))
        if problem is None:
            on_rank_0(lambda: _set_aside_later_ones(checkpoint, checkpoints))
            return together(lambda: _fitting(checkpoint, config, expected))
        if checkpoint.parent != checkpoints or Path(resume).resolve() == checkpoint.resolve():
            raise AgreedError(problem, exit_code=1)
        logger.warning("not using %s", problem)
        damaged.add(checkpoint)
    return None


def _set_aside_later_ones(chosen: Path, checkpoints: Path) -> None:
    """What was passed over must neither count as the newest again nor push out good ones."""
    own = complete_checkpoints(checkpoints)
    for path in own[own.index(chosen) + 1 :] if chosen in own else []:
        set_aside(path)


def _fitting(checkpoint: Path, config: RunConfig, expected: CheckpointManifest) -> Resumption:
    manifest, allowed = read_manifest(checkpoint), config.checkpoint.allow_changes
    expected = expected.model_copy(update={"schedule": Schedule.of(config, horizon(config, manifest))})
    changes = compare(checkpoint, manifest, expected, allowed)
    history, differences = continue_history(manifest.data, manifest.consumed_samples, expected.data)
    if refused := [found for found in differences if found.kind not in allowed]:
        kinds = dict.fromkeys(found.kind for found in refused)
        texts = ", ".join(found.text for found in refused[:_MOST_NAMED])
        texts += f" and {len(refused) - _MOST_NAMED} more" if len(refused) > _MOST_NAMED else ""
        permission = _permission(None if "seed" in kinds else ", ".join(kinds))
        raise UsageError(f"cannot resume from {checkpoint}: {texts}; {_AS_IT_WAS}{permission}")
    texts_of_all = changes + [difference.text for difference in differences]
    return Resumption(checkpoint, manifest, history, expected.schedule, texts_of_all)


def choose_checkpoint(config: RunConfig, resume: str, damaged: Collection[Path] = ()) -> Path | None:
    """The newest checkpoint to continue from, None for a new run. Raises UserError if there are only damaged ones.

    damaged: checkpoints that are known to be so, beside those whose files are missing or too short.
    """
    run_dir = Path(config.train.run_dir)
    own = complete_checkpoints(run_dir / "checkpoints")
    if resume == "never":
        if own or (run_dir / "metrics.jsonl").exists():
            raise UsageError(
                f"checkpoint.resume=never, but {run_dir} already holds a run; "
                "choose another train.run_dir, or resume=auto to continue that run"
            )
        return None
    newest = newest_checkpoint(run_dir / "checkpoints", damaged)
    return newest if resume == "auto" else _named_checkpoint(Path(resume), newest)


def _named_checkpoint(named: Path, newest: Path | None) -> Path:
    """The checkpoint that checkpoint.resume names, unless the run has gone on from it already, to `newest`."""
    if newest is None:
        return find_checkpoint(named)
    if named.resolve() == newest.resolve():
        return newest
    if named.resolve().parent == newest.resolve().parent:
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
    done = found.step if expected.schedule.unit == "steps" else found.consumed_tokens
    if difference := expected.schedule.difference(found.schedule, done):
        if "schedule" not in allowed:
            length = expected.schedule.kept_by(found.schedule)
            kept = f" (schedule.decay_{expected.schedule.unit}={length} keeps the planned curve)" if length else ""
            raise UsageError(
                f"cannot resume from {checkpoint}: {difference}; set it as it was{kept}{_permission('schedule')}"
            )
        changes.append(difference)
    before, here = (ModelConfig.model_validate(manifest.model) for manifest in (found, expected))
    changed = weight_differences(before, here)
    if before.mup_base_width != here.mup_base_width:  # the same weights, but other learning rates
        changed["mup_base_width"] = before.mup_base_width, here.mup_base_width
    if changed:
        texts = ", ".join(f"model.{key} was {then} and is now {now}" for key, (then, now) in changed.items())
        raise UsageError(f"cannot resume from {checkpoint}: {texts}; give the model as it was")
    return changes


def _permission(name: str | None) -> str:
    return f", or say that it is meant by checkpoint.allow_changes=[{name}]" if name else ""
