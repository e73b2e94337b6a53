"""Which node is broken, slow or different: pure functions of what the ranks reported.

Values that should be equal are compared with the most frequent one (at a tie, with that of the first node), speeds with
the median of the others. A node's network is slow if even its good pairings, their upper quartile, are slow beside
those of the other nodes: what a slow partner does to one pairing blames nobody else. A pair that is slow although both
nodes do well with others is a bad link. With two nodes there is one pairing, and nothing to compare it with.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from launch.preflight_facts import Machine, Report
from launch.roll_call import exclusion

NOISY = 5.0
"""Latencies and shared disks vary: they count as slow only at this many times the distance of other speeds."""

Pair = tuple[str, str]
T = TypeVar("T")

_CLOCK_SECONDS = 2.0
_FREE_DISK_BYTES = 10 << 30
_FREE_SHARED_MEMORY_BYTES = 1 << 30
_FOREIGN_GPU_SHARE = 0.1
_SPARE_OPEN_FILES = 256  # beside the connections to all ranks: libraries, data, logs
_MUST_AGREE = ("Python", "torch", "CUDA", "NCCL", "deepspeed", "code", "configuration")
_SHOWN = 4
_LINKS_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """Something wrong: an error keeps training from running, a warning from running well."""

    level: Literal["error", "warning"]
    nodes: tuple[str, ...]
    """To be blamed; empty: no node in particular."""
    text: str

    def __str__(self) -> str:
        return f"{some(self.nodes)}: {self.text}" if self.nodes else self.text


def some(names: Sequence[str]) -> str:
    """A few of the names, and how many more."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def blamed(findings: Iterable[Finding]) -> list[str]:
    """The nodes of all findings, each once."""
    return list(dict.fromkeys(node for finding in findings for node in finding.nodes))


def advice(nodes: Sequence[str], hosts: Sequence[str]) -> str:
    """What to exclude, in brackets; empty if it is no node in particular, or all `hosts` of the job."""
    return f" ({exclusion(nodes)})" if nodes and set(nodes) < set(hosts) else ""


def in_one_line(findings: Sequence[Finding], hosts: Sequence[str]) -> str:
    """What was found, with what to exclude of the job's hosts."""
    shown = "; ".join(map(str, findings[:_SHOWN]))
    more = f"; and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
    return shown + more + advice(blamed(findings), hosts)


def judge(reports: Sequence[Report], hosts: Sequence[str], threshold: float) -> list[Finding]:
    """All findings, errors first.

    reports: by rank, of those that answer. hosts: of all ranks. threshold: a speed below this share of the others'
    median is slow.
    """
    machines = {report.host: report.machine for report in reports if report.machine}
    findings = [
        *stuck(reports, hosts),
        *different_software(reports),
        *different_data({host: machine.data for host, machine in machines.items()}),
        *broken_devices(reports),
        *damaged_messages(reports, hosts),
        *run_dir_troubles(reports),
        *machine_troubles(machines, hosts),
        *foreign_memory(reports),
        *wrong_clocks(reports),
        *slow_devices(reports, threshold),
        *slow_network(pair_rates(reports, hosts), threshold),
        *slow_answers(pair_latencies(reports, hosts), threshold),
        *slow_within(reports, threshold),
        *slow_disks(machines, threshold),
    ]
    return sorted(_merged(findings), key=lambda finding: finding.level != "error")


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """The same trouble of several nodes as one."""
    nodes: dict[tuple[Literal["error", "warning"], str, bool], list[str]] = {}
    for finding in findings:
        nodes.setdefault((finding.level, finding.text, bool(finding.nodes)), []).extend(finding.nodes)
    return [Finding(level, tuple(dict.fromkeys(named)), text) for (level, text, _), named in nodes.items()]


# Who does not go on


def stuck(reports: Sequence[Report], hosts: Sequence[str]) -> Iterator[Finding]:
    """Who keeps the others waiting: the silent, and who hangs or fails in work of its own; else who is behind."""
    silent = sorted(set(range(len(hosts))) - {report.rank for report in reports})
    late = [report for report in reports if report.state != "done"]
    alone = [report for report in late if report.phase.alone]
    for host in dict.fromkeys(hosts[rank] for rank in silent):
        yield _silent(host, [rank for rank in silent if hosts[rank] == host], hosts.count(host))
    for report in alone:
        yield Finding("error", (report.host,), f"rank {report.rank} {_where(report)}")
    if late and not silent and not alone:
        first = min(report.phase.order for report in late)
        behind = [report for report in late if report.phase.order == first]
        nodes = tuple(dict.fromkeys(report.host for report in behind))
        if len(nodes) > 1 and len(behind) == len(hosts):
            yield Finding("error", (), f"none of the ranks gets on: rank {behind[0].rank} {_where(behind[0])}")
        else:
            yield Finding("error", nodes, f"rank {behind[0].rank} {_where(behind[0])}")


def _silent(host: str, ranks: Sequence[int], ranks_of_host: int) -> Finding:
    if len(ranks) == ranks_of_host > 1:
        return Finding("error", (host,), f"none of its {len(ranks)} ranks answers: the node or its network is down")
    names = some(list(map(str, ranks)))
    return Finding(
        "error", (host,), f"rank {names} does not answer: its process died or is stopped, or its node is down"
    )


def _where(report: Report) -> str:
    if report.state == "failed":
        return f"failed in {report.phase.text}: {report.error}"
    return f"has been in {report.phase.text} for {report.phase.seconds:.0f} s"


# What should be equal


def different_software(reports: Sequence[Report]) -> Iterator[Finding]:
    """Versions and hashes that differ from those of most nodes."""
    software = _first_of_nodes({report.rank: (report.host, report.software) for report in reports if report.software})
    for name in _MUST_AGREE:
        for nodes, value, usual, others in outliers(
            {host: words[name] for host, words in software.items() if name in words}
        ):
            text = f"{name} {value} where {others} {usual}"
            if name == "code" and (files := _differing_files(reports, nodes[0], usual)):
                text = f"another copy of the code: {files} not as where {others} {usual}"
            yield Finding("error", nodes, text)
    drivers = {r.host: r.machine.gpus[0].driver for r in reports if r.machine and r.machine.gpus}
    models = _first_of_nodes({report.rank: (report.host, report.gpu.name) for report in reports if report.gpu})
    for what, values in (("NVIDIA driver", drivers), ("GPU", models)):
        for nodes, value, usual, others in outliers(values):
            yield Finding("warning", nodes, f"{what} {value} where {others} {usual}")


def outliers(values: Mapping[str, str]) -> list[tuple[tuple[str, ...], str, str, str]]:
    """(nodes, their value, the usual value, who "has" that) for every unusual value by node."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return []
    usual, count = counts.most_common(1)[0]  # of equal counts the one met first
    others = f"the other {count} nodes have" if count > 1 else f"{next(n for n, v in values.items() if v == usual)} has"
    nodes: dict[str, list[str]] = defaultdict(list)
    for node, value in values.items():
        nodes[value].append(node)
    return [(tuple(named), value, usual, others) for value, named in nodes.items() if value != usual]


def _first_of_nodes(by_rank: Mapping[int, tuple[str, T]]) -> dict[str, T]:
    """The value of the first rank of each node."""
    found: dict[str, T] = {}
    for host, value in by_rank.values():
        found.setdefault(host, value)
    return found


def _differing_files(reports: Sequence[Report], node: str, usual: str) -> str:
    leaders = [report for report in reports if report.machine]
    theirs = next((r.machine.code for r in leaders if r.host == node and r.machine), {})
    right = next((r.machine.code for r in leaders if r.software.get("code") == usual and r.machine), {})
    return some([name for name in sorted({*theirs, *right}) if theirs.get(name) != right.get(name)])


def different_data(data: Mapping[str, Mapping[str, int | str]]) -> Iterator[Finding]:
    """Data files that some nodes cannot read, or that have another size there. data: by node and file."""
    files: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for file in dict.fromkeys(file for of_node in data.values() for file in of_node):
        troubles = {node: of_node[file] for node, of_node in data.items() if isinstance(of_node.get(file), str)}
        sizes = {node: str(of_node[file]) for node, of_node in data.items() if isinstance(of_node.get(file), int)}
        for trouble in dict.fromkeys(troubles.values()):
            nodes = tuple(node for node, reason in troubles.items() if reason == trouble)
            files[nodes if len(nodes) < len(data) else (), str(trouble)].append(file)
        for nodes, value, usual, others in outliers(sizes):
            files[nodes, f"{value} bytes where {others} {usual}"].append(file)
    for (nodes, trouble), names in files.items():
        more = f" (and {len(names) - 1} more files)" if len(names) > 1 else ""
        yield Finding("error", nodes, f"{names[0]}: {trouble}{more}")


# What is broken


def broken_devices(reports: Sequence[Report]) -> Iterator[Finding]:
    """Devices that compute wrongly, and what nvidia-smi complains of."""
    for report in reports:
        if report.device_check and not report.device_check.exact:
            device = report.gpu.uuid if report.gpu else "CPU"
            yield Finding("error", (report.host,), f"rank {report.rank}'s matrix product is wrong ({device})")
    used = {report.gpu.uuid for report in reports if report.gpu}
    for report in (report for report in reports if report.machine):
        assert report.machine
        if report.machine.nvidia_smi_error:
            yield Finding("error", (report.host,), report.machine.nvidia_smi_error)
        for gpu in (gpu for gpu in report.machine.gpus if gpu.uuid in used):
            if gpu.uncorrected_errors:
                text = (
                    f"GPU {gpu.uuid} had {gpu.uncorrected_errors} uncorrected memory errors (ECC); reset or replace it"
                )
                yield Finding("warning", (report.host,), text)
            if gpu.slowed_down:
                yield Finding("warning", (report.host,), f"GPU {gpu.uuid} has lowered its clock: heat or power")


def damaged_messages(reports: Sequence[Report], hosts: Sequence[str]) -> Iterator[Finding]:
    """Nodes whose messages arrive changed: the one that all damaged pairs share, else both of a pair."""
    text = "messages to or from it arrive changed"
    pairs = {
        _pair(report.host, hosts[exchange.partner])
        for report in reports
        for exchange in report.exchanges
        if not exchange.intact
    }
    while pairs:
        (node, count), *_ = Counter(node for pair in pairs for node in pair).most_common(1)
        if count == 1:
            yield from (Finding("error", pair, "messages between them arrive changed") for pair in sorted(pairs))
            return
        yield Finding("error", (node,), text)
        pairs = {pair for pair in pairs if node not in pair}
    for report in reports:
        if report.within_node and not report.within_node.intact:
            yield Finding("error", (report.host,), f"rank {report.rank} got wrong sums from an all-reduce in its node")
        for collective in report.collectives:
            if not collective.intact:
                text = (
                    f"rank {report.rank} on {report.host} got wrong values from the {collective.operation} of all ranks"
                )
                yield Finding("error", (), text)


def run_dir_troubles(reports: Sequence[Report]) -> Iterator[Finding]:
    """Nodes that cannot write the run's folder, or have another one."""
    leaders = [report for report in reports if report.machine]
    for report in leaders:
        assert report.machine
        disk = report.machine.disk
        if disk.error:
            yield Finding("error", (report.host,), f"cannot write train.run_dir in {disk.folder}: {disk.error}")
        elif disk.free_bytes < _FREE_DISK_BYTES:
            free = disk.free_bytes / 2**30
            yield Finding("warning", (report.host,), f"{free:.1f} GiB free for train.run_dir in {disk.folder}")
    blind = [report.host for report in leaders if report.sees_run_dir is False]
    if blind:
        nodes = tuple(blind) if len(blind) < len(leaders) - 1 or len(leaders) == 2 else ()
        text = f"what {leaders[0].host} writes into train.run_dir is not there; all nodes must share it"
        yield Finding("error", nodes, text if nodes else f"on no other node: {text}")


def machine_troubles(machines: Mapping[str, Machine], hosts: Sequence[str]) -> Iterator[Finding]:
    """Limits that are too low for this job."""
    ranks_of_host = Counter(hosts)
    for host, machine in machines.items():
        if 0 < machine.open_files < len(hosts) + _SPARE_OPEN_FILES:
            text = f"at most {machine.open_files} open files, and {len(hosts)} ranks; raise ulimit -n"
            yield Finding("warning", (host,), text)
        if machine.infiniband and machine.locked_memory_bytes and len(ranks_of_host) > 1:
            text = (
                f"at most {machine.locked_memory_bytes >> 10} KiB of locked memory, which InfiniBand needs: ulimit -l"
            )
            yield Finding("warning", (host,), text)
        if machine.gpus and ranks_of_host[host] > 1 and machine.shared_memory_bytes < _FREE_SHARED_MEMORY_BYTES:
            text = (
                f"{machine.shared_memory_bytes >> 20} MiB free in /dev/shm, which NCCL needs; give the container more"
            )
            yield Finding("warning", (host,), text)


def foreign_memory(reports: Sequence[Report]) -> Iterator[Finding]:
    """GPUs of which somebody else uses the memory."""
    processes = [(report.host, one) for report in reports if report.machine for one in report.machine.gpu_processes]
    ours = {(report.host, report.pid) for report in reports}
    for report in reports:
        if report.gpu and (used := report.gpu.total_bytes - report.gpu.free_bytes) > (
            _FOREIGN_GPU_SHARE * report.gpu.total_bytes
        ):
            pids = [
                str(one.pid) for host, one in processes if one.uuid == report.gpu.uuid and (host, one.pid) not in ours
            ]
            who = f" by process {some(pids)}" if pids else ""
            share = f"{used / 2**30:.1f} of {report.gpu.total_bytes / 2**30:.1f} GiB"
            text = f"{share} of rank {report.rank}'s GPU are in use{who} before the start"
            yield Finding("error", (report.host,), text)


def wrong_clocks(reports: Sequence[Report]) -> Iterator[Finding]:
    """Nodes with another time of day."""
    clocks = _first_of_nodes({report.rank: (report.host, report.clock) for report in reports if report.clock})
    usual = statistics.median(clocks.values()) if clocks else 0.0
    for host, clock in clocks.items():
        # Of two nodes the median is between them, and rank 0's is taken for right.
        ahead = clock - (usual if len(clocks) > 2 else next(iter(clocks.values())))
        if abs(ahead) > _CLOCK_SECONDS:
            text = f"its clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the others"
            yield Finding("warning", (host,), text)


# What is slow


def medians_of_others(values: Sequence[float]) -> list[float]:
    """For each of at least two values the median of the others."""
    order = sorted(range(len(values)), key=values.__getitem__)
    medians = [0.0] * len(values)
    others = len(values) - 1
    for position, index in enumerate(order):
        low, high = ((k if k < position else k + 1) for k in ((others - 1) // 2, others // 2))
        medians[index] = (values[order[low]] + values[order[high]]) / 2
    return medians


def slow_values(values: Mapping[str, float], threshold: float) -> dict[str, tuple[float, float]]:
    """Those below `threshold` x the median of the others, with that median."""
    if len(values) < 2:
        return {}
    medians = medians_of_others(list(values.values()))
    return {
        name: (value, median)
        for (name, value), median in zip(values.items(), medians, strict=True)
        if value < threshold * median
    }


def slow_devices(reports: Sequence[Report], threshold: float) -> Iterator[Finding]:
    """Devices that compute or copy slowly beside the others of their kind."""
    kinds: dict[str, list[Report]] = defaultdict(list)
    for report in reports:
        if report.device_check:
            kinds[report.gpu.name if report.gpu else "CPU"].append(report)
    for of_kind in kinds.values():
        hosts = {str(report.rank): report.host for report in of_kind}
        for what, name, scale, unit in (
            ("matrix product", "matmul_flops", 1e12, "TFLOP/s"),
            ("memory copy", "memory_bytes_per_second", 1e9, "GB/s"),
            ("copy from host memory", "host_bytes_per_second", 1e9, "GB/s"),
        ):
            speeds = {str(report.rank): getattr(report.device_check, name) for report in of_kind}
            slow = slow_values({rank: speed for rank, speed in speeds.items() if speed is not None}, threshold)
            for host in dict.fromkeys(hosts[rank] for rank in slow):
                of_host = {rank: pair for rank, pair in slow.items() if hosts[rank] == host}
                rank = min(of_host, key=lambda rank: of_host[rank][0])
                value, median = (number / scale for number in of_host[rank])
                more = f" ({len(of_host) - 1} more of its ranks, too)" if len(of_host) > 1 else ""
                text = f"rank {rank}'s {what} is slow: {_compared(value, median, unit)}{more}"
                yield Finding("warning", (host,), text)


def slow_within(reports: Sequence[Report], threshold: float) -> Iterator[Finding]:
    """Nodes whose ranks exchange data slowly with each other."""
    sizes: dict[int, dict[str, float]] = defaultdict(dict)
    for report in reports:
        if report.within_node:
            sizes[report.within_node.ranks].setdefault(report.host, report.within_node.busbw)
    for ranks, speeds in sizes.items():
        for host, (value, median) in slow_values(speeds, threshold).items():
            text = f"all-reduce of its {ranks} ranks is slow: {_compared(value / 1e9, median / 1e9, 'GB/s')}"
            yield Finding("warning", (host,), text)


def slow_disks(machines: Mapping[str, Machine], threshold: float) -> Iterator[Finding]:
    """Nodes that write slowly."""
    rates = {host: machine.disk.write_bytes_per_second for host, machine in machines.items()}
    known = {host: rate for host, rate in rates.items() if rate is not None}
    for host, (value, median) in slow_values(known, threshold / NOISY).items():
        text = f"writing to {machines[host].disk.folder} is slow: {_compared(value / 1e6, median / 1e6, 'MB/s')}"
        yield Finding("warning", (host,), text)


def pair_rates(reports: Sequence[Report], hosts: Sequence[str]) -> dict[Pair, float]:
    """Bytes a second, each way, of the slowest two ranks of every pair of nodes that met."""
    rates: dict[Pair, float] = {}
    for report in reports:
        for exchange in report.exchanges:
            pair = _pair(report.host, hosts[exchange.partner])
            rates[pair] = min(rates.get(pair, math.inf), exchange.bytes_per_second)
    return rates


def pair_latencies(reports: Sequence[Report], hosts: Sequence[str]) -> dict[Pair, float]:
    """Seconds of the slowest two ranks of every pair of nodes that met."""
    latencies: dict[Pair, float] = {}
    for report in reports:
        for exchange in report.exchanges:
            pair = _pair(report.host, hosts[exchange.partner])
            latencies[pair] = max(latencies.get(pair, 0.0), exchange.latency_seconds)
    return latencies


def good_pairings(rates: Mapping[Pair, float]) -> dict[str, float]:
    """The upper quartile of each node's pairings."""
    of_node: dict[str, list[float]] = defaultdict(list)
    for pair, rate in rates.items():
        for node in pair:
            of_node[node].append(rate)
    return {node: sorted(found)[math.ceil(0.75 * (len(found) - 1))] for node, found in of_node.items()}


def slow_network(rates: Mapping[Pair, float], threshold: float) -> Iterator[Finding]:
    """Nodes whose pairings are slow, then slow pairs of other nodes."""
    if len(rates) < 2:
        return
    slow = slow_values(good_pairings(rates), threshold)
    for node, (value, median) in slow.items():
        text = f"its network is slow: {_compared(value / 1e9, median / 1e9, 'GB/s')} between two nodes"
        yield Finding("warning", (node,), text)
    others = {pair: rate for pair, rate in rates.items() if not slow.keys() & set(pair)}
    usual = statistics.median(others.values()) if others else 0.0
    links = [pair for pair in sorted(others, key=others.__getitem__) if others[pair] < threshold * usual]
    for pair in links[:_LINKS_SHOWN]:
        speed = _compared(others[pair] / 1e9, usual / 1e9, "GB/s")
        text = f"the link between {pair[0]} and {pair[1]} is slow: {speed}; both do well with other nodes"
        yield Finding("warning", (), text)
    if len(links) > _LINKS_SHOWN:
        text = (
            f"{len(links) - _LINKS_SHOWN} more of {len(rates)} pairs are as slow: is an uplink between switches shared?"
        )
        yield Finding("warning", (), text)


def slow_answers(latencies: Mapping[Pair, float], threshold: float) -> Iterator[Finding]:
    """Nodes that answer late, whoever asks."""
    if len(latencies) < 2:
        return
    quickness = good_pairings({pair: 1 / seconds for pair, seconds in latencies.items()})
    for node, (value, median) in slow_values(quickness, threshold / NOISY).items():
        text = f"its network answers late: {_compared(1e6 / value, 1e6 / median, 'µs')} between two nodes"
        yield Finding("warning", (node,), text)


def _pair(first: str, second: str) -> Pair:
    return (first, second) if first < second else (second, first)


def _compared(value: float, median: float, unit: str) -> str:
    return f"{value:.3g} {unit} where the others' median is {median:.3g} {unit}"
