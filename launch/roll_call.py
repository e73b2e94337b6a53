"""Roll call: before anything is trained, every rank says where it is and what it has, and all judge it together.

What one rank cannot know alone - two ranks on one GPU, GPUs that nobody uses, a node that never came - ends the job
within seconds, with one line from rank 0. It also tells each host by which network interface it reaches the others:
gloo otherwise takes the one that the host's own name resolves to, often loopback.
"""

import json
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launch.environment import ProcessEnvironment, compress_hosts, expand_hosts
from megagpt.errors import AgreedError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_EVERYBODY = "roll_call/everybody"
_CHECK_SECONDS = 0.2
_HEAR_SECONDS = 10.0  # for the others to read what is wrong


@dataclass(frozen=True)
class Presence:
    """What one rank says of itself."""

    rank: int
    host: str
    network: str
    """The same for all processes that share network interfaces, in containers too."""
    address: str
    """Under which it speaks to rank 0, a number."""
    device: str
    """cpu, or the UUID of its GPU."""
    granted_gpus: int | None
    """GPUs that Slurm gave this step on this host, 0 also where it does not manage them; None outside Slurm."""
    visible_gpus: int = 0
    """GPUs that torch sees."""
    problem: str = ""
    """Why it cannot take part, and the exit code for that."""
    exit_code: int = 0


def here(
    place: ProcessEnvironment,
    device: str,
    visible_gpus: int = 0,
    problem: UserError | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Presence:
    """This process's presence; the fields' values that only it knows."""
    return Presence(
        rank=place.rank,
        host=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        network=network(),
        address=address_towards(place.master_addr) if place.rank else "127.0.0.1",
        device=device,
        granted_gpus=granted_gpus(environ),
        visible_gpus=visible_gpus,
        problem=str(problem or ""),
        exit_code=problem.exit_code if problem else 0,
    )


def roll_call(place: ProcessEnvironment, store: "Store", mine: Presence, timeout: float) -> list[Presence]:
    """Everybody's presence by rank; the same list on every rank. timeout: seconds.

    Raises AgreedError, on all ranks that are there, if some are missing after `timeout` or if what they say contradicts
    itself.
    """
    from torch.distributed import DistError, DistStoreError

    try:
        store.set(f"roll_call/{place.rank}", json.dumps(asdict(mine)))
        if place.rank == 0:
            store.set(_EVERYBODY, json.dumps(_collect(store, place.world_size, timeout)))
        store.wait([_EVERYBODY], timedelta(seconds=timeout + 30))
        everybody = [Presence(**fields) for fields in json.loads(store.get(_EVERYBODY))]
        heard = store.add("roll_call/heard", 1)
    except DistStoreError as error:
        raise UserError(f"rank {place.rank}: rank 0 found, but it said nothing within {timeout + 30:.0f} s") from error
    except DistError as error:  # it has ended, and told why, or was killed
        raise AgreedError(f"rank 0 is gone: {error}", 1) from error
    trouble = (missing(everybody, place.world_size, os.environ, timeout), 1)
    if not trouble[0]:
        trouble = contradiction(everybody) or ("", 0)
    if not trouble[0]:
        return everybody
    until = time.monotonic() + _HEAR_SECONDS
    while place.rank == 0 and heard < len(everybody) and time.monotonic() < until:  # the store ends with this process
        time.sleep(_CHECK_SECONDS)
        heard = store.add("roll_call/heard", 0)
    raise AgreedError(*trouble)


def _collect(store: "Store", world_size: int, timeout: float) -> list[dict[str, object]]:
    """What the ranks said that came in time."""
    until = time.monotonic() + timeout
    waiting = list(range(world_size))
    present: dict[int, dict[str, object]] = {}
    while waiting:
        for rank in waiting:
            if store.check([f"roll_call/{rank}"]):
                present[rank] = json.loads(store.get(f"roll_call/{rank}"))
        waiting = [rank for rank in waiting if rank not in present]
        if time.monotonic() > until:
            break
        time.sleep(_CHECK_SECONDS if waiting else 0)
    return [present[rank] for rank in sorted(present)]


def missing(present: Sequence[Presence], world_size: int, environ: Mapping[str, str], timeout: float) -> str:
    """Who has not come: one line with the ranks and, if they are whole nodes of Slurm's, what to exclude; or empty."""
    ranks = sorted(set(range(world_size)) - {one.rank for one in present})
    if not ranks:
        return ""
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    hosts = [host for host in expand_hosts(nodelist) if host not in {one.host for one in present}]
    where = f" of {', '.join(hosts)} ({exclusion(hosts)})"
    some = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return (
        f"{len(ranks)} of {world_size} ranks did not come within {timeout:.0f} s: rank{'s' * (len(ranks) > 1)} {some}"
        + (where if hosts else "")
    )


def exclusion(hosts: Sequence[str]) -> str:
    """What to give sbatch so that Slurm takes other nodes."""
    return f"--exclude={compress_hosts(hosts)} leaves {'it' if len(hosts) == 1 else 'them'} out"


def contradiction(everybody: Sequence[Presence]) -> tuple[str, int] | None:
    """What makes this job pointless, in one line, and the exit code."""
    if troubled := [one for one in everybody if one.problem]:
        first = troubled[0]
        if len({one.problem for one in everybody}) == 1:
            return first.problem, first.exit_code
        others = len(troubled) - 1
        count = f" (and on {others} more of {len(everybody)} ranks)" if others else ""
        bad = list(dict.fromkeys(one.host for one in troubled))
        advice = f" ({exclusion(bad)})" if len(bad) < len({one.host for one in everybody}) else ""
        return f"[rank {first.rank} on {first.host}] {first.problem}{count}{advice}", first.exit_code
    kinds = Counter("cpu" if one.device == "cpu" else "cuda" for one in everybody)
    if len(kinds) > 1:
        rare = [one for one in everybody if (one.device == "cpu") == (kinds["cpu"] <= kinds["cuda"])]
        hosts = ", ".join(dict.fromkeys(one.host for one in rare))
        return f"{kinds['cuda']} ranks have a GPU and {kinds['cpu']} have none; look at {hosts}", 2
    by_network: dict[str, list[Presence]] = defaultdict(list)
    for one in everybody:
        by_network[one.network].append(one)
    for ranks in by_network.values():
        if "cuda" in kinds and (message := _gpu_trouble(ranks)):
            return message, 2
    return None


def _gpu_trouble(ranks: Sequence[Presence]) -> str:
    """GPUs of one host that several ranks or none would use."""
    host, used = ranks[0].host, Counter(one.device for one in ranks)
    if shared := [device for device, count in used.items() if count > 1]:
        both = [str(one.rank) for one in ranks if one.device == shared[0]]
        return (
            f"{host}: ranks {' and '.join(both)} would share one GPU ({shared[0]}); {len(ranks)} ranks see only "
            f"{len(used)} GPU{'s' * (len(used) > 1)}: start one rank a GPU, each of which sees its own or all"
        )
    granted = max(one.granted_gpus or 0 for one in ranks)
    visible = max(one.visible_gpus for one in ranks)
    gpus = visible if any(one.granted_gpus == 0 for one in ranks) else granted
    if gpus > len(used):
        what = f"Slurm gave this job {gpus} GPUs" if granted else f"there are {gpus} GPUs, which Slurm does not manage"
        return (
            f"{host}: {what}, but {len(used)} rank{'s' * (len(used) > 1)} would use only {len(used)}: start one task a "
            f"GPU (srun --ntasks-per-node={gpus}), ask for fewer, or set CUDA_VISIBLE_DEVICES"
        )
    return ""


def granted_gpus(environ: Mapping[str, str]) -> int | None:
    """How many GPUs of this host Slurm gave to this step; None outside Slurm."""
    if "SLURM_JOB_ID" not in environ:
        return None
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if environ.get(name):
            return len(environ[name].split(","))
    count = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdigit() else 0


def gloo_interface(place: ProcessEnvironment, everybody: Sequence[Presence]) -> str | None:
    """The network interface by which this rank reaches those of other hosts; loopback if there are none.

    place: with the address under which this rank has found rank 0. None: no interface has the address.
    """
    mine = everybody[place.rank].network
    elsewhere = next((one for one in everybody if one.network != mine), None)
    if elsewhere is None:
        return interface_of("127.0.0.1")
    return interface_of(address_towards(elsewhere.address if elsewhere.rank else place.master_addr))


def network() -> str:
    """A name of the set of network interfaces that this process sees."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if not (boot.exists() and namespace.exists()):
        return socket.gethostname()
    return f"{boot.read_text().strip()}:{namespace.stat().st_ino}"


def address_towards(address: str) -> str:
    """This host's address when it speaks to `address`, by the kernel's routes; nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the interface that has `address`."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None
