"""python -m launch.train: what every rank of a training run executes, whoever started it."""

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.environment import ProcessEnvironment, discover
from megagpt.config import check_precision, load_config
from megagpt.config.schema import RunConfig
from megagpt.errors import AgreedError, UsageError, UserError
from tools.command import fail, run_command, single_command

if TYPE_CHECKING:
    import torch

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
    """Set up this process as one rank, then train. The heavy imports wait for everything that needs none of them."""
    os.environ.update(place.variables())
    _log_to_file(Path(config.train.run_dir) / "logs", place)
    import torch.distributed as dist

    device = _choose_device(config, place)
    # DeepSpeed reads this when it is first imported.
    os.environ["DS_ACCELERATOR"] = device.type
    import deepspeed
    from rich.console import Console

    from megagpt.training.engine import deepspeed_output_to_log
    from megagpt.training.run import train

    _send_to_log("DeepSpeed")
    with deepspeed_output_to_log():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
    try:
        train(config, device, Console())
    except UserError:
        raise
    except BaseException:
        logging.getLogger("megagpt").exception("rank %d of %d failed", place.rank, place.world_size)
        raise
    finally:
        dist.destroy_process_group()


def _choose_device(config: RunConfig, place: ProcessEnvironment) -> "torch.device":
    """The device of this rank; on a CPU also the number of threads. Raises UsageError for what the machine lacks."""
    import torch

    wanted = config.train.device
    use_cuda = torch.cuda.is_available() if wanted == "auto" else wanted == "cuda"
    if not use_cuda:
        check_precision(config.train.precision, "cpu")
        torch.set_num_threads(cpu_threads(os.environ, len(os.sched_getaffinity(0)), place.local_world_size))
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # One visible GPU for a rank that is not the first: the launcher has bound each rank to its own.
    index = 0 if visible == 1 and place.local_world_size > 1 and bound_to_own_gpu(os.environ) else place.local_rank
    if index >= visible:
        raise UsageError(
            f"local rank {place.local_rank} needs GPU {index}, but torch sees {visible} on {socket.gethostname()}; "
            "start one rank a GPU, or set train.device=cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(index)
    check_precision(
        config.train.precision, "cuda", bf16_supported=torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return device


def bound_to_own_gpu(environ: Mapping[str, str]) -> bool:
    """Whether Slurm gave each task GPUs of its own (--gpus-per-task, --gpu-bind): each sees its own as number 0."""
    return "SLURM_GPUS_PER_TASK" in environ or "SLURM_GPU_BIND" in environ or "SLURM_GPUS_BIND" in environ


def cpu_threads(environ: Mapping[str, str], cores: int, local_world_size: int) -> int:
    """Threads of one rank on a CPU: its share of the cores this process may use, unless OMP_NUM_THREADS says otherwise.

    torchrun sets OMP_NUM_THREADS=1 for several ranks by itself; that is not taken for the user's word.
    """
    said = environ.get("OMP_NUM_THREADS", "")
    by_torchrun = said == "1" and "TORCHELASTIC_RUN_ID" in environ and local_world_size > 1
    if said.isdigit() and not by_torchrun:
        return int(said)
    return max(1, cores // local_world_size)


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
        stderr.addFilter(logging.Filter("megagpt"))
        root.addHandler(stderr)


def _send_to_log(name: str) -> None:
    """A library's messages and everyone's warnings belong into the log files, not between the console's lines."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True
    logging.captureWarnings(True)


def _report(error: UserError, place: ProcessEnvironment) -> int:
    """Print the error where it helps: what all ranks agreed on once, what each found alone once a node."""
    if place.rank == 0:
        return fail(str(error), error.exit_code)
    if not isinstance(error, AgreedError) and place.local_rank == 0:
        return fail(f"[rank {place.rank} on {socket.gethostname()}] {error}", error.exit_code)
    return error.exit_code


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
