"""Who am I: rank, local rank, world size, rendezvous address - from torchrun, DeepSpeed, Slurm, MPI or nothing.

`discover` is a pure function of the environment variables (and, for MPI and Slurm, of one question to the launcher),
so each launcher's rules can be read and tested alone. A partial or contradictory environment is an error that says
which variables do not fit: a job that starts N worlds of size one would train N models in silence.
"""

import importlib
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import UsageError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Ports below the ephemeral range, spread by job id so that two jobs on a node rarely meet.
_FIRST_PORT, _PORTS = 20_000, 10_000


@dataclass(frozen=True)
class ProcessEnvironment:
    """One process's place in the job; ranks count from 0, the address is where rank 0 listens."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """The five variables that torch.distributed's and DeepSpeed's `env://` rendezvous read, and the local size."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def discover(environ: Mapping[str, str] = os.environ) -> ProcessEnvironment:
    """This process's place in the job. Raises UsageError for an environment that contradicts itself."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        place = _from_torchrun(environ)
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        place = _from_open_mpi(environ)
    elif "MPI_LOCALRANKID" in environ:  # Hydra's own; srun --mpi=pmi2 sets the PMI_ variables too, but not this one
        place = _from_hydra(environ)
    elif _integer(environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        place = _from_slurm(environ)
    elif "PMI_SIZE" in environ and "SLURM_PROCID" not in environ:
        place = _from_hydra(environ)
    elif _integer(environ, "SLURM_NTASKS", default=1) > 1 and "SLURM_STEP_NUM_TASKS" not in environ:
        raise UsageError(
            f"this is the batch script of a Slurm job of {environ['SLURM_NTASKS']} tasks, of which it is none; "
            "start the command with srun (or one process of it with srun --ntasks=1)"
        )
    else:
        place = ProcessEnvironment("none", 0, 0, 1, 1, "127.0.0.1", free_port())
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.local_world_size <= place.world_size):
        raise UsageError(
            f"{place.launcher}: rank {place.rank} of {place.world_size} and local rank {place.local_rank} of "
            f"{place.local_world_size} contradict each other; check what sets these variables"
        )
    return place


def _from_torchrun(environ: Mapping[str, str]) -> ProcessEnvironment:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        present = [name for name in _TORCHRUN if name in environ]
        raise UsageError(
            f"{', '.join(present)} set but {', '.join(missing)} missing in the environment; "
            "set all five (torchrun and the deepspeed launcher do) or none"
        )
    return ProcessEnvironment(
        launcher="torchrun",
        rank=_integer(environ, "RANK"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", default=_integer(environ, "WORLD_SIZE")),
        master_addr=environ["MASTER_ADDR"],
        master_port=_integer(environ, "MASTER_PORT"),
    )


def _from_open_mpi(environ: Mapping[str, str]) -> ProcessEnvironment:
    world_size = _integer(environ, "OMPI_COMM_WORLD_SIZE")
    address, port = _mpi_rendezvous(environ, world_size)
    return ProcessEnvironment(
        launcher="Open MPI",
        rank=_integer(environ, "OMPI_COMM_WORLD_RANK"),
        local_rank=_integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=world_size,
        local_world_size=_integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        master_addr=address,
        master_port=port,
    )


def _from_hydra(environ: Mapping[str, str]) -> ProcessEnvironment:
    """MPICH's mpiexec (Hydra) and Intel MPI: PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS."""
    world_size = _integer(environ, "PMI_SIZE")
    rank = _integer(environ, "PMI_RANK")
    address, port = _mpi_rendezvous(environ, world_size)
    return ProcessEnvironment(
        launcher="MPICH",
        rank=rank,
        local_rank=_integer(environ, "MPI_LOCALRANKID", default=rank),
        world_size=world_size,
        local_world_size=_integer(environ, "MPI_LOCALNRANKS", default=world_size),
        master_addr=address,
        master_port=port,
    )


def _from_slurm(environ: Mapping[str, str]) -> ProcessEnvironment:
    """One task a rank under srun; the address is the first host of the job, the port comes from the job id."""
    nodelist = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    local_sizes = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
    return ProcessEnvironment(
        launcher="Slurm",
        rank=_integer(environ, "SLURM_PROCID"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_world_size=_local_size(local_sizes, _integer(environ, "SLURM_NODEID")),
        master_addr=environ.get("MASTER_ADDR") or _first_host(nodelist),
        master_port=_integer(
            environ,
            "MASTER_PORT",
            default=port_of_step(
                _integer(environ, "SLURM_JOB_ID", default=0), _integer(environ, "SLURM_STEP_ID", default=0)
            ),
        ),
    )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's compressed list, one number a node: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts.extend([int(count)] * (int(times.rstrip(")")) if times else 1))
    return counts


def _local_size(counts: str, node: int) -> int:
    try:
        return tasks_per_node(counts)[node]
    except (ValueError, IndexError):
        raise UsageError(f"Slurm: task counts {counts!r} say nothing of node {node}; check what sets them") from None


def port_of_step(job_id: int, step_id: int) -> int:
    """The rendezvous port of a Slurm job step: the same on every node without asking anyone."""
    return _FIRST_PORT + (31 * job_id + step_id) % _PORTS


def _first_host(nodelist: str) -> str:
    if not any(character in nodelist for character in "[,"):
        return nodelist or socket.gethostname()
    if shutil.which("scontrol") is None:
        raise UsageError(f"Slurm: cannot expand the node list {nodelist!r} without scontrol; set MASTER_ADDR")
    answer = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=False)
    if answer.returncode or not answer.stdout.strip():
        raise UsageError(
            f"Slurm: scontrol show hostnames {nodelist!r} failed: {answer.stderr.strip()}; set MASTER_ADDR"
        )
    return answer.stdout.split()[0]


def _mpi_rendezvous(environ: Mapping[str, str], world_size: int) -> tuple[str, int]:
    """Rank 0's address and a free port of its, told to all by MPI, unless MASTER_ADDR and MASTER_PORT are set."""
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")
    try:
        mpi = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"started by MPI with {world_size} ranks, but mpi4py does not load ({error}); "
            "install the mpi extra (pip install -e '.[mpi]') or set MASTER_ADDR and MASTER_PORT"
        ) from error
    world = mpi.COMM_WORLD
    if world.Get_size() != world_size:
        raise UsageError(
            f"the launcher started {world_size} ranks, but MPI's world has {world.Get_size()}: mpiexec and mpi4py's "
            "MPI library are not of the same kind; use the mpiexec of this environment (.venv/bin/mpiexec)"
        )
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    return world.bcast((address, free_port()) if world.Get_rank() == 0 else None, root=0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is not None:
            return default
        raise UsageError(f"{name} is missing in the environment although other variables of its launcher are set")
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name}={text!r} in the environment is not a whole number") from None
