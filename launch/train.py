"""python -m launch.train: what every rank of a training run executes, whoever started it."""

import logging
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch.environment import ProcessEnvironment, discover
from launch.process import joined
from megagpt.config import load_config
from megagpt.config.schema import RunConfig
from megagpt.errors import AgreedError, UserError
from tools.command import fail, run_command, single_command

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

    Every key of the configuration is in docs/configuration.md.
    """
    place = discover()
    try:
        _run(load_config(config, overrides or []), place)
    except UserError as error:
        sys.exit(_report(error, place))


def _run(config: RunConfig, place: ProcessEnvironment) -> None:
    _log_to_file(Path(config.train.run_dir) / "logs", place)
    with joined(place, config.train.device, config.train.precision) as device:
        from rich.console import Console

        from megagpt.training.run import train

        try:
            train(config, device, Console(highlight=False, markup=False, soft_wrap=True))
        except UserError:
            raise
        except Exception:  # Python prints the traceback; the log keeps it
            logging.getLogger("megagpt").exception("rank %d of %d failed", place.rank, place.world_size)
            raise


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
        stderr.addFilter(lambda record: record.name.startswith("megagpt") and not record.exc_info)
        root.addHandler(stderr)


def _report(error: UserError, place: ProcessEnvironment) -> int:
    """Print the error where it helps: what all ranks agreed on once, what each found alone once a node."""
    if place.rank == 0:
        return fail(str(error), error.exit_code)
    if not isinstance(error, AgreedError) and place.local_rank == 0:
        return fail(f"[rank {place.rank} on {socket.gethostname()}] {error}", error.exit_code)
    return error.exit_code


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
