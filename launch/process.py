"""Turns this process into one rank of the job: environment, device, threads, process group."""

import logging
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.environment import ProcessEnvironment
from launch.meeting import MEETING_SECONDS, shared_store
from launch.roll_call import Presence, gloo_interface, granted_gpus, here, roll_call
from megagpt.config import check_precision
from megagpt.config.schema import TrainConfig
from megagpt.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store


@dataclass(frozen=True)
class Meeting:
    """All ranks have met: this one's place as it turned out, its device, the store of all, who they are."""

    place: ProcessEnvironment
    device: "torch.device"
    store: "Store"
    everybody: list[Presence]


@contextmanager
def joined(
    place: ProcessEnvironment, train: TrainConfig, timeout: float = MEETING_SECONDS
) -> Iterator[tuple[ProcessEnvironment, "torch.device"]]:
    """The device of this rank, inside the job's process group (NCCL on GPUs, gloo on CPUs); `place` as it turned out.

    timeout: seconds to wait for the other ranks. Raises AgreedError on all ranks for what one of them cannot do or what
    does not fit together. torch and DeepSpeed are imported here, after the variables that they read at import are set.
    """
    if train.deterministic:
        _be_deterministic()
    meeting = meet(place, train, timeout)
    place, device = meeting.place, meeting.device
    import torch.distributed as dist

    from megagpt.training.engine import init_process_group

    _send_to_log("DeepSpeed")
    init_process_group(device.type, meeting.store, place.rank, place.world_size)
    try:
        yield place, device
    finally:
        dist.destroy_process_group()


def meet(place: ProcessEnvironment, train: TrainConfig, timeout: float = MEETING_SECONDS) -> Meeting:
    """Wait for all ranks and judge the roll call; sets the variables that torch and DeepSpeed read at import.

    timeout and errors as for `joined`, which goes on from here.
    """
    _allow_many_connections()
    # torch's C++ warns of every host whose address has no name, which is no trouble; its errors stay.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    device, problem = None, None
    try:
        device = _choose_device(place, train.device, train.precision)
    except UsageError as error:
        problem = error
    with shared_store(place, timeout) as (place, store):
        everybody = roll_call(place, store, here(place, device_id(device), visible_gpus(), problem), timeout)
    assert device is not None
    os.environ.update(place.variables())
    os.environ["DS_ACCELERATOR"] = device.type
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed takes it for the device's number
    if interface := gloo_interface(place, everybody):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return Meeting(place, device, store, everybody)


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

    visible = visible_gpus()
    if wanted == "cpu" or (wanted == "auto" and not visible and not granted_gpus(os.environ)):
        check_precision(precision, "cpu")
        torch.set_num_threads(cpu_threads(os.environ, len(os.sched_getaffinity(0)), place.local_world_size))
        return torch.device("cpu")
    if not visible:
        count = granted_gpus(os.environ)
        given = f"Slurm gave this job {count} on this node" if count else "train.device=cuda"
        reason = (
            "its driver does not answer: try nvidia-smi"
            if torch.version.cuda or torch.version.hip
            else "it is a build without CUDA"
        )
        raise UsageError(
            f"torch {torch.__version__} sees no GPU ({reason}), but {given}; for CPUs set train.device=cpu"
        )
    # Launchers let a rank see all GPUs of its host or only its own; the roll call finds two ranks on one.
    device = torch.device("cuda", place.local_rank % visible)
    torch.cuda.set_device(device)
    check_precision(precision, "cuda", bf16_supported=torch.cuda.is_bf16_supported(including_emulation=False))
    return device


def visible_gpus() -> int:
    """How many GPUs torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_id(device: "torch.device | None") -> str:
    """cpu, or the UUID of a GPU."""
    import torch

    if device is None or device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


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
