"""What one rank can say before training: software, code, GPU, memory, limits, disk, data files, and what it measured.

A `Report` travels as JSON from every rank to rank 0. What is the same for all ranks of a node (`Machine`) is found by
its first rank alone. Nothing here waits for another rank.
"""

import hashlib
import importlib.metadata
import os
import platform
import resource
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from launch.environment import resolves
from megagpt.data.indexed import bin_path, idx_path
from megagpt.errors import UserError
from megagpt.scaling.device_check import DeviceCheck
from megagpt.scaling.fabric import Collective, Exchange

if TYPE_CHECKING:
    import torch

    from megagpt.config.schema import RunConfig

_CODE = ("megagpt", "launch", "tools")
_NVIDIA_SMI_SECONDS = 10.0
_MOST_WRITTEN_BYTES = 1 << 32  # by all nodes together: a shared file system must bear it
_WRITTEN_BYTES = {"cuda": 1 << 26, "cpu": 1 << 24}  # by one node


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Gpu(_Facts):
    """The GPU of one rank, before this program used memory of it."""

    name: str
    uuid: str
    total_bytes: int
    free_bytes: int


class GpuState(_Facts):
    """What nvidia-smi says of one GPU; None: it says nothing."""

    uuid: str
    driver: str
    uncorrected_errors: int | None
    """ECC errors since the driver was loaded."""
    slowed_down: bool | None
    """Whether the hardware has lowered its clock: heat or power."""


class GpuProcess(_Facts):
    """What uses a GPU, by nvidia-smi."""

    uuid: str
    pid: int
    bytes: int


class Disk(_Facts):
    """Where the run will write, as this node sees it."""

    folder: str
    """train.run_dir, or the nearest folder above it that exists."""
    free_bytes: int
    write_bytes_per_second: float | None
    """Of one file with fsync, while all nodes write; None: it cannot."""
    error: str = ""


class Machine(_Facts):
    """What all ranks of a node share."""

    code: dict[str, str]
    """Start of the SHA-256 of each Python file of the checkout."""
    memory_bytes: int
    """Available, of the host."""
    shared_memory_bytes: int
    """Free in /dev/shm."""
    open_files: int
    """Largest number of open files; 0: no limit."""
    locked_memory_bytes: int
    """Most memory that may be locked; 0: no limit."""
    infiniband: bool
    resolves_rank_0: bool
    """Whether the name of rank 0's host resolves here."""
    interface: str
    """Network interface of gloo."""
    gpus: list[GpuState]
    gpu_processes: list[GpuProcess]
    nvidia_smi_error: str = ""
    disk: Disk
    data: dict[str, int | str]
    """Bytes of each data file, or why it cannot be read."""


class Phase(_Facts):
    """Where a rank is."""

    order: int
    text: str
    alone: bool
    """Whether it waits for no other rank there."""
    seconds: float = 0.0
    """How long already."""


class Report(_Facts):
    """All that is known of one rank."""

    rank: int
    host: str
    pid: int
    state: Literal["done", "failed", "unfinished"] = "unfinished"
    phase: Phase
    error: str = ""
    software: dict[str, str] = {}
    """Versions, hash of the configuration and, of the first rank of a node, of the code."""
    gpu: Gpu | None = None
    machine: Machine | None = None
    """Of the first rank of a node."""
    device_check: DeviceCheck | None = None
    clock: float | None = None
    """Seconds since 1970 at a moment that was the same for all ranks."""
    sees_run_dir: bool | None = None
    """Whether what rank 0 wrote into train.run_dir is there."""
    within_node: Collective | None = None
    exchanges: list[Exchange] = []
    collectives: list[Collective] = []


def software(config_text: str, code: dict[str, str]) -> dict[str, str]:
    """The versions and hashes that must agree everywhere; code: empty, or as from `code_hashes`."""
    import torch

    nccl = torch.cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else ()
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, nccl)) or "none",
        "deepspeed": importlib.metadata.version("deepspeed"),
        "configuration": _short_hash(config_text) if config_text else "none",
    }
    return versions | ({"code": _short_hash(repr(sorted(code.items())))} if code else {})


def code_hashes(root: Path) -> dict[str, str]:
    """The start of the SHA-256 of every Python file of the program, by its path in the checkout."""
    files = [file for folder in _CODE for file in sorted((root / folder).rglob("*.py"))]
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()[:8] for file in files}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def gpu_of(device: "torch.device") -> Gpu | None:
    """The GPU of this rank; None on a CPU."""
    import torch

    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(name=properties.name, uuid=str(properties.uuid), total_bytes=total, free_bytes=free)


def machine(
    config: "RunConfig | None", run_dir: Path, device_type: str, nodes: int, rank_0_host: str, code: dict[str, str]
) -> Machine:
    """What this node is like; a file of some MB is written, measured and deleted."""
    import psutil

    states, trouble = gpu_states() if device_type == "cuda" else ([], "")
    processes = gpu_processes() if states else []
    return Machine(
        code=code,
        memory_bytes=psutil.virtual_memory().available,
        shared_memory_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0,
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory_bytes=_limit(resource.RLIMIT_MEMLOCK),
        infiniband=Path("/sys/class/infiniband").exists(),
        resolves_rank_0=resolves(rank_0_host),
        interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
        gpus=states,
        gpu_processes=processes,
        nvidia_smi_error=trouble,
        disk=disk(run_dir, min(_WRITTEN_BYTES[device_type], _MOST_WRITTEN_BYTES // nodes)),
        data=data_files(config),
    )


def gpu_states() -> tuple[list[GpuState], str]:
    """Every GPU of this host by nvidia-smi, and what is wrong with it; nothing where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:  # in some containers
        return [], ""
    fields = "uuid,driver_version,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown"
    lines, trouble = _nvidia_smi(f"--query-gpu={fields}")
    return [
        GpuState(
            uuid=uuid.removeprefix("GPU-"),
            driver=driver,
            uncorrected_errors=int(errors) if errors.isdigit() else None,
            slowed_down={"Active": True, "Not Active": False}.get(slowed_down),
        )
        for uuid, driver, errors, slowed_down in lines
    ], trouble


def _nvidia_smi(query: str) -> tuple[list[list[str]], str]:
    """The rows of its answer, and what is wrong with it."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi does not answer within {_NVIDIA_SMI_SECONDS:.0f} s"
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return [], f"nvidia-smi fails: {lines[0] if lines else f'exit code {done.returncode}'}"
    return [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line.strip()], ""


def gpu_processes() -> list[GpuProcess]:
    """What computes on this host's GPUs, as far as nvidia-smi tells (it may not see out of a container)."""
    lines, _ = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    rows = [line for line in lines if len(line) == 3 and line[1].isdigit() and line[2].isdigit()]
    return [GpuProcess(uuid=row[0].removeprefix("GPU-"), pid=int(row[1]), bytes=int(row[2]) << 20) for row in rows]


def existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def disk(run_dir: Path, nbytes: int) -> Disk:
    """Free space where the run will write, and the speed of one file of `nbytes`, which is deleted again."""
    folder = existing(run_dir)
    probe = folder / f".preflight-{secrets.token_hex(8)}"
    block = secrets.token_bytes(min(nbytes, 1 << 20))
    free, rate, error = shutil.disk_usage(folder).free, None, ""
    try:
        start = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(nbytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        rate = nbytes // len(block) * len(block) / (time.perf_counter() - start)
    except OSError as reason:
        error = reason.strerror or str(reason)
    finally:
        probe.unlink(missing_ok=True)
    return Disk(folder=str(folder), free_bytes=free, write_bytes_per_second=rate, error=error)


def data_files(config: "RunConfig | None") -> dict[str, int | str]:
    """Every data file of the run with its bytes, or why it cannot be read."""
    if config is None:
        return {}
    prefixes = [source.path for source in (*config.data.train, *config.data.validation)]
    files: Iterable[Path] = [path(prefix) for prefix in prefixes for path in (bin_path, idx_path)]
    return {str(file): _readable_size(file) for file in files}


def _readable_size(file: Path) -> int | str:
    try:
        with file.open("rb") as opened:
            opened.read(1)
            return os.fstat(opened.fileno()).st_size
    except OSError as error:
        return (error.strerror or str(error)).lower()


def _limit(kind: int) -> int:
    soft = resource.getrlimit(kind)[0]
    return 0 if soft == resource.RLIM_INFINITY else soft


def one_line(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
