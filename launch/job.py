"""python -m launch.job: what a Slurm batch script asks before and after training; it acts on the answers itself.

`begin CONFIG [section.key=value ...]` checks the configuration, notes the start in RUN/logs/JOBID/restarts.jsonl, and
prints that folder and how many of the job's nodes to use; `end CONFIG CODE [...]` notes the end and prints what to do:
done, requeue, stop or hold. The lines of restarts.jsonl are described in megagpt/training/attempts.py.

A job that is requeued again and again without getting anywhere holds resources for nothing: after three restarts that
found no newer checkpoint it is held, with the reason, until somebody releases it. Slurm requeues by itself too, after a
node's failure, so `begin` looks at that as well as `end`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from launch.environment import log_folder
from megagpt.config import check_batches, load_config
from megagpt.config.schema import RunConfig
from megagpt.errors import ConfigError, UsageError, UserError
from megagpt.training.checkpoint import complete_checkpoints
from megagpt.training.supervision import HANG, LOST, REQUEUE
from tools.command import run_command

PROGRAM = "python -m launch.job"
HOLD = 87
"""Exit code of `begin`: do not start again, hold the job."""

MAX_RESTARTS = 3
"""Restarts of a job without a newer checkpoint, after which it is held."""

Decision = Literal["done", "requeue", "stop", "hold"]

Config = Annotated[str, typer.Argument(help="Configuration of the run, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to it.")]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Keep the books of a Slurm job that trains; the scripts in slurm/ call it.

    Example: python -m launch.job begin configs/small.yaml train.steps=2000
    """


@app.command()
def begin(
    config: Config,
    overrides: Overrides = None,
    tasks: Annotated[int, typer.Option(min=1, help="Processes a node.")] = 1,
) -> None:
    """Check the configuration, note the start, print the folder of the job's logs and how many of its nodes to use.

    Those are all of them if the batch can be cut for that many, else as many as it can be cut for. Exit code 87: the
    job was restarted three times without a newer checkpoint; hold it.
    """
    run_config = load_config(config, overrides or [])
    run_dir, logs = _folders(run_config, os.environ)
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    used = usable_nodes(run_config, allocated, tasks)
    job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    step, events = newest_step(run_dir), read_events(logs)
    if reason := reason_to_hold(events, step):
        _note(logs, event="end", job=job, restart=restart, code=HOLD, decision="hold", reason=reason)
        raise _HoldError(reason)
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    _note(logs, event="start", job=job, restart=restart, step=step, nodes=nodes)
    if restart:
        print(f"restart {restart} of job {job} on {nodes}, from step {step}", file=sys.stderr)
    if used < allocated:
        batch = run_config.train.global_batch_size
        why = f"a batch of {batch} sequences cannot be cut for {allocated * tasks} ranks"
        print(f"{allocated - used} of {allocated} nodes stay idle: {why}, but for {used * tasks}", file=sys.stderr)
    print(logs, used)


@app.command()
def end(config: Config, code: Annotated[int, typer.Argument(help="Exit code.")], overrides: Overrides = None) -> None:
    """Note the end of training and print what to do now: done, requeue, stop or hold."""
    run_dir, logs = _folders(load_config(config, overrides or []), os.environ)
    events = read_events(logs)
    decision, reason = decide(code, events, newest_step(run_dir))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    _note(
        logs,
        event="end",
        job=os.environ["SLURM_JOB_ID"],
        restart=restart,
        code=code,
        decision=decision,
        reason=reason,
    )
    if decision == "hold":
        print(f"error: {reason}", file=sys.stderr)
    print(decision)


def decide(code: int, events: Sequence[Mapping[str, Any]], step: int) -> tuple[Decision, str]:
    """What follows from the exit code of training; step: of the newest checkpoint now."""
    stopped_by = code - 128
    if code == 0:
        return "done", "finished"
    # srun gives the highest code of all tasks: a process killed on a node that answers would have made it 137.
    if code in (REQUEUE, LOST) or stopped_by in (signal.SIGTERM, signal.SIGUSR1):  # the latter: before it could listen
        reason = reason_to_hold(events, step)
        return ("hold", reason) if reason else ("requeue", "a node was lost" if code == LOST else "asked to stop")
    if code == HANG:
        return "stop", "hang"
    if stopped_by > 0:
        return "stop", f"killed by {_signal_name(stopped_by)}"
    return "stop", f"exit code {code}"


def reason_to_hold(events: Sequence[Mapping[str, Any]], step: int) -> str:
    """Why the job, with its newest checkpoint of `step`, should not be started again; empty: it should."""
    starts = 0
    for event in reversed(events):
        if event["event"] == "start" and event["step"] == step:
            starts += 1
        elif event["event"] == "start" or event["decision"] == "hold":
            break
    if starts <= MAX_RESTARTS:
        return ""
    return (
        f"{MAX_RESTARTS} restarts without progress: the newest checkpoint is still that of step {step}, so the job is "
        "held. See why in its logs (is the time limit shorter than checkpoint.every?), then scontrol release or scancel"
    )


def newest_step(run_dir: Path) -> int:
    """Steps of the newest complete checkpoint, 0 if there is none."""
    found = complete_checkpoints(run_dir / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def read_events(logs: Path) -> list[dict[str, Any]]:
    """What was noted so far; a last line that a power cut has cut off is left out."""
    file = logs / "restarts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class _HoldError(UserError):
    exit_code = HOLD


def usable_nodes(config: RunConfig, nodes: int, tasks: int) -> int:
    """The largest number of nodes, of `nodes`, over which each batch of the run can be cut.

    tasks: processes a node. Raises ConfigError if there is none, for all nodes.
    """
    problem: ConfigError | None = None
    for used in range(nodes, 0, -1):
        try:
            check_batches(config.train.batches, config.train.micro_batch_size, used * tasks)
        except ConfigError as error:
            problem = problem or error
        else:
            return used
    assert problem is not None, "there is at least one node"
    raise problem


def _folders(config: RunConfig, environ: Mapping[str, str]) -> tuple[Path, Path]:
    if "SLURM_JOB_ID" not in environ:
        raise UsageError("SLURM_JOB_ID is not set: this command is for the batch scripts of slurm/")
    run_dir = Path(config.train.run_dir)
    return run_dir, log_folder(run_dir, environ)


def _note(logs: Path, **event: object) -> None:
    try:
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "restarts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time()} | event) + "\n")
    except OSError as error:
        raise UserError(f"train.run_dir: cannot write {logs}: {error.strerror}") from error


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1):  # for training; books are kept in a moment, and must be
        signal.signal(number, signal.SIG_IGN)
    run_command(app, PROGRAM)
