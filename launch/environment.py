"""Who am I: rank, local rank, world size, where rank 0 is - from torchrun, DeepSpeed, Slurm, MPI or nothing.

`discover` is a pure function of the environment variables (and, for MPI and Slurm, of one question to the launcher),
so each launcher's rules can be read and tested alone. A partial or contradictory environment is an error that says
which variables do not fit: a job that starts N worlds of size one would train N models in silence. Where rank 0 is
comes as candidates, addresses and ports, best first; launch/meeting.py tries them.
"""

import importlib
import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UsageError

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Ports below the ephemeral range, spread by job id so that two jobs on a node rarely meet.
_FIRST_PORT, _PORTS = 20_000, 10_000
_PORTS_TRIED = 16


@dataclass(frozen=True)
class ProcessEnvironment:
    """One process's place in the job; ranks count from 0."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    addresses: tuple[str, ...]
    """Names and numbers under which rank 0's host may be reached, best first."""
    ports: tuple[int, ...]
    """Where rank 0 may listen, best first."""
    job: str = ""
    """What tells this start of this job from all others; empty: the launcher has a store at the address already."""

    @property
    def master_addr(self) -> str:
        """The best address of rank 0."""
        return self.addresses[0]

    @property
    def master_port(self) -> int:
        """The best port."""
        return self.ports[0]

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
        place = ProcessEnvironment("none", 0, 0, 1, 1, ("127.0.0.1",), (free_port(),))
    if not (0 <= place.rank < place.world_size and 0 <= place.local_rank < place.local_world_size <= place.world_size):
        raise UsageError(
            f"{place.launcher}: rank {place.rank} of {place.world_size} and local rank {place.local_rank} of "
            f"{place.local_world_size} contradict each other; check what sets these variables"
        )
    return place


def is_first_task(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process should speak where `discover` fails: the first one by any launcher's count."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")
    return next((environ[name] for name in names if name in environ), "0") in ("0", "")


def log_folder(run_dir: Path, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a run's ranks write their logs: under Slurm each job has a folder of its own."""
    return run_dir / "logs" / environ.get("SLURM_JOB_ID", "")


def _from_torchrun(environ: Mapping[str, str]) -> ProcessEnvironment:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        present = [name for name in _TORCHRUN if name in environ]
        raise UsageError(
            f"{', '.join(present)} set but {', '.join(missing)} missing in the environment; "
            "set all five (torchrun and the deepspeed launcher do) or none"
        )
    world_size = _integer(environ, "WORLD_SIZE")
    tasks = _integer(environ, "SLURM_STEP_NUM_TASKS", default=1)
    launchers = _integer(environ, "GROUP_WORLD_SIZE", default=world_size)  # of torchrun: its agents, one a node
    if launchers < tasks:
        by_torchrun = "TORCHELASTIC_RUN_ID" in environ
        what = f"torchrun was told of {launchers} node{'s' * (launchers > 1)}" if by_torchrun else "WORLD_SIZE is set"
        raise UsageError(
            f"Slurm started {tasks} tasks, but WORLD_SIZE={world_size} ({what}): they would train apart; "
            + (
                "start one torchrun a node with --nnodes, --rdzv-backend=c10d and --rdzv-endpoint"
                if by_torchrun
                else "unset RANK, WORLD_SIZE and LOCAL_RANK, then srun's own numbers count"
            )
        )
    return ProcessEnvironment(
        launcher="torchrun",
        rank=_integer(environ, "RANK"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", default=world_size),
        addresses=(environ["MASTER_ADDR"],),
        ports=(_integer(environ, "MASTER_PORT"),),
    )


def _from_open_mpi(environ: Mapping[str, str]) -> ProcessEnvironment:
    world_size = _integer(environ, "OMPI_COMM_WORLD_SIZE")
    addresses, ports, job = _mpi_rendezvous(environ, world_size)
    return ProcessEnvironment(
        launcher="Open MPI",
        rank=_integer(environ, "OMPI_COMM_WORLD_RANK"),
        local_rank=_integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=world_size,
        local_world_size=_integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        addresses=addresses,
        ports=ports,
        job=job,
    )


def _from_hydra(environ: Mapping[str, str]) -> ProcessEnvironment:
    """MPICH's mpiexec (Hydra) and Intel MPI: PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS."""
    world_size = _integer(environ, "PMI_SIZE")
    rank = _integer(environ, "PMI_RANK")
    addresses, ports, job = _mpi_rendezvous(environ, world_size)
    return ProcessEnvironment(
        launcher="MPICH",
        rank=rank,
        local_rank=_integer(environ, "MPI_LOCALRANKID", default=rank),
        world_size=world_size,
        local_world_size=_integer(environ, "MPI_LOCALNRANKS", default=world_size),
        addresses=addresses,
        ports=ports,
        job=job,
    )


def _from_slurm(environ: Mapping[str, str]) -> ProcessEnvironment:
    """One task a rank under srun; rank 0 is on the first host, the ports come from the job id."""
    nodelist = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", ""))
    local_sizes = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
    job, step = (_integer(environ, name, default=0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return ProcessEnvironment(
        launcher="Slurm",
        rank=_integer(environ, "SLURM_PROCID"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_world_size=_local_size(local_sizes, _integer(environ, "SLURM_NODEID")),
        addresses=_slurm_addresses(environ, nodelist),
        ports=(_integer(environ, "MASTER_PORT"),) if environ.get("MASTER_PORT") else ports_of_step(job, step),
        job=f"{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}",
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


def ports_of_step(job_id: int, step_id: int) -> tuple[int, ...]:
    """The ports that rank 0 of a Slurm job step tries in turn: the same on every node without asking anyone."""
    first = 31 * job_id + step_id
    return tuple(_FIRST_PORT + (first + tried) % _PORTS for tried in range(_PORTS_TRIED))


def expand_hosts(nodelist: str) -> list[str]:
    """Slurm's compressed host list: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7, login."""
    return [host for part in re.split(r",(?![^\[]*\])", nodelist) if part for host in _expand(part)]


def compress_hosts(hosts: Iterable[str]) -> str:
    """The other way round, in order, for three and more names that count up: gpu01, gpu02, gpu03 is "gpu[01-03]"."""
    runs: list[list[tuple[str, str]]] = []
    for head, digits in sorted({_split_number(host) for host in hosts}, key=lambda name: (name[0], int(name[1] or 0))):
        previous_head, previous = runs[-1][-1] if runs else ("", "")
        if digits and previous and (previous_head, str(int(previous) + 1).zfill(len(previous))) == (head, digits):
            runs[-1].append((head, digits))
        else:
            runs.append([(head, digits)])
    return ",".join(
        f"{run[0][0]}[{run[0][1]}-{run[-1][1]}]" if len(run) > 2 else ",".join(map("".join, run)) for run in runs
    )


def _split_number(host: str) -> tuple[str, str]:
    """A name without the number at its end, and that number."""
    head = host.rstrip("0123456789")
    return head, host[len(head) :]


def _expand(pattern: str) -> list[str]:
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        return [pattern]
    ranges, _, tail = rest.partition("]")
    numbers: list[str] = []
    for part in ranges.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)):
            raise UsageError(f"Slurm: cannot read the node list {pattern!r}; set MASTER_ADDR to the first node")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return [head + number + host for number in numbers for host in _expand(tail)]


def _slurm_addresses(environ: Mapping[str, str], nodelist: str) -> tuple[str, ...]:
    """MASTER_ADDR alone if it is set; else the first host's name, for names that do not resolve its address.

    That is the one Slurm itself uses for the node, and the one of the node that srun was called on, which is the first
    one for an srun in a batch script.
    """
    if environ.get("MASTER_ADDR"):
        return (environ["MASTER_ADDR"],)
    first = expand_hosts(nodelist)[0] if nodelist else socket.gethostname()
    candidates = [first, _node_address(first), environ.get("SLURM_LAUNCH_NODE_IPADDR", "")]
    return tuple(dict.fromkeys(address for address in candidates if address))


def _node_address(host: str) -> str:
    if resolves(host) or shutil.which("scontrol") is None:  # in a container, say
        return ""
    answer = subprocess.run(["scontrol", "show", "node", host], capture_output=True, text=True, check=False)
    found = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return found[1] if found else ""


def resolves(host: str) -> bool:
    """Whether this host knows an address for the name."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def _mpi_rendezvous(environ: Mapping[str, str], world_size: int) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Where rank 0 is and will listen, and a word for this start, told to all by MPI."""
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        return (environ["MASTER_ADDR"],), (_integer(environ, "MASTER_PORT"),), "mpi"
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
    addresses = ("127.0.0.1",) if len(set(hosts)) == 1 else (hosts[0], *local_addresses())
    return world.bcast((addresses, (free_port(),), secrets.token_hex(8)) if world.Get_rank() == 0 else None, root=0)


def local_addresses() -> list[str]:
    """This host's addresses as numbers, without loopback and link-local ones."""
    import psutil

    found = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]
    return [address for address in found if not address.startswith(("127.", "::1", "fe80:", "169.254."))]


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
