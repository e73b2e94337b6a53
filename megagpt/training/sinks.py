"""Mirrors of metrics.jsonl for people: a line on the console, Weights & Biases, TensorBoard."""

import importlib
import netrc
import socket
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megagpt.errors import UserError
from megagpt.training.metrics import Record

_STRAGGLER = 1.5  # own time over the median rank's, from which the console names the slowest rank


class ConsoleSink:
    """One line a record; on a terminal with a progress bar below the lines."""

    def __init__(self, total_steps: int, first_step: int, console: Console) -> None:
        self._console, self._total = console, total_steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("training", total=total_steps, completed=first_step, eta="")
        self._progress.start()

    def write(self, record: Record) -> None:
        self._console.print(describe(record, self._total))
        if record["kind"] == "train":
            eta = f"{duration(record['eta_seconds'])} left"
            self._progress.update(self._task, completed=record["step"], eta=eta)

    def close(self, completed: bool) -> None:
        self._progress.stop()


def describe(record: Record, total_steps: int) -> str:
    """The console line of a record."""
    step = f"step {record['step']:>{len(str(total_steps))}}/{total_steps}"
    if record["kind"] == "validation":
        bits = f", {record['bits_per_byte']:.3f} bits a byte" if record["bits_per_byte"] else ""
        return (
            f"{step}  {record['dataset']}: loss {record['loss']:.4f}, perplexity {record['perplexity']:.2f}{bits} "
            f"({record['targets']:,} tokens in {record['seconds']:.1f} s)"
        )
    if record["kind"] == "checkpoint":
        return (
            f"{step}  saved {record['path']} in {record['seconds']:.1f} s, of which training stood still for "
            f"{record['stall_seconds']:.1f} s"
        )
    if record["kind"] == "sample":
        return f"{step}  {record['prompt']}|{record['text']}"
    if record["kind"] == "event":
        return f"{step}  {record['event']}: {record['message']}"
    if record["kind"] == "start":
        return f"{step}  starts on {record['world_size']} rank{'s' * (record['world_size'] > 1)}"
    if record["kind"] == "stop":
        return f"{step}  stops: {record['reason']}"
    mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
    skipped = f"  skipped {record['skipped_steps']}" if record["skipped_steps"] else ""
    slow = record["straggler_ratio"]
    straggler = f"  rank {record['slowest_rank']} is {slow:.1f}x slow" if slow > _STRAGGLER else ""
    return (
        f"{step}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{record['step_seconds']:.3f} s/step  {record['tokens_per_second']:,.0f} tokens/s{mfu}  "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB{skipped}{straggler}  {duration(record['eta_seconds'])} left"
    )


def duration(seconds: float) -> str:
    """Seconds as people read them: 42s, 12m05s, 3h07m, 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _flat(record: Record) -> dict[str, float]:
    """Numbers of a record under the names that both services show: train/loss, validation/<dataset>/loss."""
    prefix = f"validation/{record['dataset']}" if record["kind"] == "validation" else record["kind"]
    numbers = {}
    for key, value in record.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if key not in ("step", "time") and isinstance(number, int | float) and not isinstance(number, bool):
                numbers[f"{prefix}/{key}/{name}".rstrip("/")] = number
    return numbers


class WandbSink:
    """Weights & Biases; the run's id is kept in run_dir/wandb_id, so that resumes draw one curve."""

    def __init__(self, run_dir: Path, project: str, mode: str, config: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        if mode == "auto":
            settings = wandb.setup().settings
            account = settings.api_key or _in_netrc(settings.base_url)
            mode = "online" if account and _answers(settings.base_url) else "offline"
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=run_dir.name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=config,
                settings=wandb.Settings(silent=True),
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb does not start: {error}; choose logging.wandb_mode=offline") from error
        # Records may come late, and steps again after a rollback: wandb's own step may only grow.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        self._run.log(_flat(record) | {"step": record["step"]})

    def close(self, completed: bool) -> None:
        self._run.finish(exit_code=0 if completed else 1)


def _in_netrc(url: str) -> bool:
    """Whether `wandb login` has left an account for the service."""
    try:
        return netrc.netrc().authenticators(urlsplit(url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _answers(url: str) -> bool:
    """Whether a TCP connection to the service opens within three seconds."""
    parts = urlsplit(url)
    if not parts.hostname:
        return False
    try:
        socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), 3).close()
    except OSError:
        return False
    return True


class TensorBoardSink:
    """Event files in run_dir/tensorboard."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged of the steps that will be done again is hidden.
        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def write(self, record: Record) -> None:
        for name, value in _flat(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self, completed: bool) -> None:
        self._writer.close()
