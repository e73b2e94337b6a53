"""python -m launch.train: what every rank of a training run executes, whoever started it."""

import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.environment import ProcessEnvironment, discover, is_first_task, log_folder
from launch.process import joined
from launch.signals import StopSignals
from megagpt.config import load_config
from megagpt.config.schema import RunConfig
from megagpt.errors import AgreedError, UserError
from megagpt.training.supervision import REQUEUE
from tools.command import fail, run_command, single_command

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("megagpt.launch")

PROGRAM = "python -m launch.train"


def main(
    config: Annotated[str, typer.Argument(help="Configuration of the run, a YAML file: configs/small.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
    ] = None,
) -> None:
    """Train a GPT, continuing from the run folder's newest checkpoint if there is one.

    The same command serves one process, one node and a cluster:

        python -m launch.train configs/small.yaml train.steps=200

        torchrun --nproc-per-node 8 -m launch.train configs/gpt2_124m.yaml

        mpiexec -n 8 python -m launch.train configs/gpt2_124m.yaml

    SIGTERM and SIGUSR1 end the run after the step under way, with a checkpoint and exit code 85 (start it again to go
    on); without progress for faults.step_timeout seconds it ends with 86. Every key is in docs/configuration.md.
    """
    signals = StopSignals()
    try:
        place = discover()
        run_config = load_config(config, overrides or [])
    except UserError as error:  # found by all ranks
        sys.exit(fail(str(error), error.exit_code) if is_first_task() else error.exit_code)
    logs = log_folder(Path(run_config.train.run_dir))
    try:
        _log_to_file(logs, place)
        with joined(place, run_config.train) as (place, device):
            sys.exit(_train(run_config, place, device, signals, logs))
    except AgreedError as error:
        sys.exit(fail(str(error), error.exit_code) if place.rank == 0 else error.exit_code)
    except UserError as error:
        # Found before the ranks have met, so most likely by all of them: once a node is enough.
        sys.exit(fail(_from(place) + str(error), error.exit_code) if place.local_rank == 0 else error.exit_code)


def _train(
    config: RunConfig, place: ProcessEnvironment, device: "torch.device", signals: StopSignals, logs: Path
) -> int:
    """Train and return the exit code. What all ranks agreed on is told by rank 0, what one found alone by that one."""
    from rich.console import Console

    from launch.supervisor import ProcessSupervisor
    from megagpt.training.run import train

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if place.rank == 0 and place.world_size > 1:
        where = f"rank 0 is at {place.master_addr}, port {place.master_port}"
        console.print(f"ranks    {place.world_size}, started by {place.launcher}; {where}")
    supervisor = ProcessSupervisor(place, signals, logs, config.faults.step_timeout)
    try:
        outcome = train(config, device, console, supervisor)
    except AgreedError as error:
        supervisor.close("done")
        return fail(str(error), error.exit_code) if place.rank == 0 else error.exit_code
    except UserError as error:
        logger.error("%s", error)
        supervisor.close("failed", str(error))
        return fail(_from(place) + str(error), error.exit_code)
    except Exception as error:
        logger.exception("rank %d of %d failed", place.rank, place.world_size)
        if loss := supervisor.explain() if place.world_size > 1 else None:
            supervisor.end(loss)
        supervisor.close("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        raise  # Python prints the traceback
    supervisor.close("done")
    return REQUEUE if outcome == "stopped" else 0


def _from(place: ProcessEnvironment) -> str:
    return f"[rank {place.rank} on {socket.gethostname()}] " if place.rank else ""


def _log_to_file(folder: Path, place: ProcessEnvironment) -> None:
    """Everything that is logged goes to this rank's file; warnings of rank 0 also to stderr."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank_{place.rank}.log", encoding="utf-8")
    except OSError as error:
        raise UserError(f"train.run_dir: cannot write {folder}: {error.strerror}") from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(file)
    if place.rank == 0:
        stderr = logging.StreamHandler()
        stderr.setLevel(logging.WARNING)
        stderr.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        stderr.addFilter(lambda record: record.name.startswith("megagpt") and record.levelno == logging.WARNING)
        root.addHandler(stderr)


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
