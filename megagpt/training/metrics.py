"""metrics.jsonl, the truth of a run, and its mirrors: console, Weights & Biases, TensorBoard.

One JSON object a line, with `kind`:
  train       step, tokens, loss, lr, grad_norm, step_seconds, data_seconds, tokens_per_second, mfu, skipped_steps,
              peak_memory_bytes, eta_seconds
  validation  step, dataset, loss, perplexity, targets, seconds
  checkpoint  step, path, seconds

A number that is not finite (the loss of a step that overflowed) is null.

tokens_per_second counts all ranks. mfu = tokens_per_second x flops_per_token / (ranks x peak), with flops_per_token
from megagpt.model.counts (forward and backward, full s x s attention, no recomputation) and the peak from
megagpt.scaling.devices; null where the peak is unknown.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megagpt.data.atomic import replace_file
from megagpt.errors import UserError

Record = dict[str, Any]


class Sink(Protocol):
    """Where records go; exists on rank 0 only."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self, completed: bool) -> None:
        """Finish, so that nothing taken is lost. completed: whether the run came to its last step."""


class JsonLines:
    """Appends records to metrics.jsonl, each written through at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(_without_nan(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self, completed: bool) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _without_nan(record: Record) -> Record:
    """JSON has no NaN and no infinity: null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of metrics.jsonl; a last line cut short by a kill is left out. Raises UserError on other damage."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline followed: the write was interrupted
                return
            record = None
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            raise UserError(f"{path}:{number}: not a record of metrics; the file is damaged")
        yield record


def drop_records_after(path: Path, step: int) -> int:
    """Remove what a killed run logged after the checkpoint it now continues from; returns how many lines that were."""
    if not path.exists():
        return 0
    records = list(read_metrics(path))
    kept = [record for record in records if record["step"] <= step]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return len(records) - len(kept)
