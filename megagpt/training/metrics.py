"""metrics.jsonl, the truth of a run, and its mirrors: console, Weights & Biases, TensorBoard.

One JSON object a line. Every one has `kind`, `step` (optimizer steps done) and `time` (seconds since 1970):
  start       world_size, device (of a rank), zero_stage, precision, micro_batch_size, continues_from (name of the
              checkpoint, or null)
  train       tokens, batch_size (sequences), loss, lr, grad_norm, step_seconds, data_seconds, forward_backward_seconds,
              optimizer_seconds, checkpoint_seconds, evaluation_seconds, tokens_per_second, tokens_per_second_per_rank,
              mfu, skipped_steps, peak_memory_bytes, goodput, straggler_ratio, slowest_rank, epochs (by dataset),
              eta_seconds
  validation  dataset, loss, perplexity, bits_per_byte (null without a tokenizer), targets, seconds
  sample      prompt, text
  checkpoint  path, seconds, stall_seconds, bytes
  event       event (spike, rollback, skipped, changed, checkpoint_failed), message; samples (start, stop), loss, score
  stop        reason (finished, SIGTERM, SIGUSR1, or failed: ...)

Seconds of a train record are means over the steps since the one before; step_seconds holds data, forward_backward and
optimizer, not checkpoint and evaluation. goodput is the time spent in steps that count (not repeated after a restart)
over the time since the run's first start. bits_per_byte is the loss of all targets, ends of documents included, over
the bytes of the text that they stand for. straggler_ratio is the slowest rank's own time, without waiting for others,
over the median rank's.

A number that is not finite (the loss of a step that overflowed) is null.

tokens_per_second counts all ranks. mfu = tokens_per_second x flops_per_token / (ranks x peak), with flops_per_token
from megagpt.model.counts (forward and backward, full s x s attention, no recomputation) and the peak from
megagpt.scaling.devices; null where the peak is unknown.
"""

import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson

from megagpt.data.atomic import replace_file
from megagpt.errors import UserError

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class Sink(Protocol):
    """Where records go; exists on rank 0 only."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self, completed: bool) -> None:
        """Finish, so that nothing taken is lost. completed: whether the run came to its last step."""


class JsonLines:
    """Appends records to metrics.jsonl, each written through at once; a full disk makes them wait for the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, record: Record) -> None:
        self._unwritten += json.dumps(_without_nan(record), allow_nan=False).encode() + b"\n"
        try:
            self._write_through()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            logger.warning("%s: the disk is full; %d bytes wait", self._path, len(self._unwritten))

    def close(self, completed: bool) -> None:
        try:
            self._write_through()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from error
        finally:
            self._file.close()

    def _write_through(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of metrics.jsonl; a last line cut short by a kill is left out. Raises UserError on other damage."""
    return (record for _, record in numbered_records(path))


def numbered_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The records as read_metrics gives them, each with the number of its line; the file is read piece by piece."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line == b"\n":
                continue
            try:
                record = _parsed(line)
            except ValueError:
                if not line.endswith(b"\n"):  # the last line, and its write was interrupted
                    return
                record = None
            if not isinstance(record, dict) or "kind" not in record or "step" not in record:
                raise UserError(f"{path}:{number}: not a record of metrics; the file is damaged")
            yield number, record


def _parsed(line: bytes) -> Any:
    """One line of JSON. orjson is four times faster, and refuses the NaN of files written before null stood for it."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


def drop_records_after(path: Path, step: int, evaluates_again: bool = False) -> int:
    """Remove what a killed run logged after the checkpoint it now continues from; returns how many lines that were.

    evaluates_again: the evaluation of `step` itself was cut off and is made again, so its records go, too.
    """
    if not path.exists():
        return 0
    records = list(read_metrics(path))
    again = ("validation", "sample") if evaluates_again else ()
    kept = [r for r in records if r["step"] < step or (r["step"] == step and r["kind"] not in again)]
    replace_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return len(records) - len(kept)
