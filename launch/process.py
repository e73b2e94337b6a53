"""Turns this process into one rank of the job: environment, device, threads, process group."""

import logging
import os
import resource
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from launch.environment import ProcessEnvironment
from megagpt.config import check_precision
from megagpt.config.schema import TrainConfig
from megagpt.errors import UsageError

if TYPE_CHECKING:
    import torch


@contextmanager
def joined(place: ProcessEnvironment, train: TrainConfig) -> Iterator["torch.device"]:
    """The device of this rank, inside the job's process group (NCCL on GPUs, gloo on CPUs).

    Raises UsageError for what the machine cannot do, before any rank waits for another. torch and DeepSpeed are
    imported here, after the variables that they read at import are set.
    """
    os.environ.update(place.variables())
    _allow_many_connections()
    if train.deterministic:
        _be_deterministic()
    chosen = _choose_device(place, train.device, train.precision)
    os.environ["DS_ACCELERATOR"] = chosen.type
    import torch.distributed as dist

    from megagpt.training.engine import init_process_group

    _send_to_log("DeepSpeed")
    init_process_group(chosen.type)
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def _allow_many_connections() -> None:
    """A connection to every rank and group: for large jobs the usual 1,024 open files are too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _be_deterministic() -> None:
    """Fixed order of additions in cuBLAS, NCCL and torch's kernels; an operation that has none raises by name."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    os.environ.setdefault("NCCL_PROTO", "Simple")
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _choose_device(place: ProcessEnvironment, wanted: str, precision: str) -> "torch.device":
    """The device of this rank; on a CPU also the number of threads."""
    import torch

    use_cuda = torch.cuda.is_available() if wanted == "auto" else wanted == "cuda"
    if not use_cuda:
        check_precision(precision, "cpu")
        torch.set_num_threads(cpu_threads(os.environ, len(os.sched_getaffinity(0)), place.local_world_size))
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # One visible GPU for several ranks of a node: the launcher has bound each rank to its own.
    index = 0 if visible == 1 and bound_to_own_gpu(os.environ) else place.local_rank
    if index >= visible:
        raise UsageError(
            f"local rank {place.local_rank} needs GPU {index}, but torch sees {visible} on {socket.gethostname()}; "
            "start one rank a GPU, or set train.device=cpu"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes it for the device's number
    check_precision(precision, "cuda", bf16_supported=torch.cuda.is_bf16_supported(including_emulation=False))
    return device


def bound_to_own_gpu(environ: Mapping[str, str]) -> bool:
    """Whether Slurm gave each task GPUs of its own (--gpus-per-task, --gpu-bind): each sees its own as number 0."""
    return any(name in environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_GPUS_BIND"))


def cpu_threads(environ: Mapping[str, str], cores: int, local_world_size: int) -> int:
    """Threads of one rank on a CPU: its share of the cores this process may use, unless OMP_NUM_THREADS says otherwise.

    torchrun sets OMP_NUM_THREADS=1 for several ranks by itself; that is not taken for the user's word.
    """
    said = environ.get("OMP_NUM_THREADS", "")
    by_torchrun = said == "1" and "TORCHELASTIC_RUN_ID" in environ and local_world_size > 1
    if said.isdigit() and not by_torchrun:
        return int(said)
    return max(1, cores // local_world_size)


def _send_to_log(name: str) -> None:
    """A library's messages and everyone's warnings belong into the log files, not between the console's lines."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True
    logging.captureWarnings(True)
