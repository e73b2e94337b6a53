"""Where a run continues, and whether it may: the checkpoint is chosen and compared with the configuration.

The run folder's own newest checkpoint always wins, so that a requeued command line, whatever its `checkpoint.resume`,
goes on where it was stopped.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from megagpt.config.schema import Change, RunConfig
from megagpt.errors import UsageError
from megagpt.training.checkpoint import (
    CheckpointManifest,
    complete_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    read_manifest,
)

logger = logging.getLogger(__name__)

_COMPARED = (
    *("seq_len", "document_mask", "seed", "global_batch_size", "data_fingerprint"),
    *("precision", "no_decay"),
)
_ADVICE = {
    "data_fingerprint": "the datasets or their weights changed; give data.train as it was, or start a new run",
}


def choose_checkpoint(config: RunConfig, expected: CheckpointManifest) -> Path | None:
    """The checkpoint to continue from, None for a new run. Raises UserError if it does not fit the configuration."""
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
        checkpoint = newest_checkpoint(run_dir / "checkpoints")
    else:
        checkpoint = _named_checkpoint(Path(resume), run_dir, own)
    if checkpoint:
        _compare(checkpoint, read_manifest(checkpoint), expected, config.checkpoint.allow_changes)
    return checkpoint


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


def _compare(
    checkpoint: Path, found: CheckpointManifest, expected: CheckpointManifest, allowed: Sequence[Change]
) -> None:
    """Raise UsageError naming what differs between the run that wrote `checkpoint` and this one."""
    for key in _COMPARED:
        if key == "precision" and key in allowed:
            continue
        then, now = getattr(found, key), getattr(expected, key)
        if then != now:
            advice = _ADVICE.get(key, "set it as it was, or start a new run in another train.run_dir")
            raise UsageError(f"cannot resume from {checkpoint}: {key} was {then} and is now {now}; {advice}")
    changed = [
        f"model.{key} was {then} and is now {expected.model.get(key)}"
        for key, then in found.model.items()
        if then != expected.model.get(key)
    ]
    if changed:
        raise UsageError(f"cannot resume from {checkpoint}: {', '.join(changed)}")
