"""What a person and a script see of the pre-flight: a table of nodes and collectives, a JSON file.

Beyond 16 nodes the table has only those that something was found on, and the range over all.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.preflight_facts import Report
from launch.preflight_verdict import Finding, advice, blamed, pair_latencies, pair_rates
from megagpt.data.atomic import replace_file

_MOST_ROWS = 16
_WIDTH = 160
_VERSIONS = ("Python", "torch", "CUDA", "NCCL", "deepspeed", "code")

Numbers = dict[str, float]


def numbers_by_node(reports: Sequence[Report], hosts: Sequence[str]) -> dict[str, Numbers]:
    """What was measured of each node: of its slowest rank, and of its pairings with other nodes the median."""
    nodes: dict[str, Numbers] = {host: {} for host in dict.fromkeys(hosts)}
    for report in reports:
        numbers = nodes[report.host]
        for name, value in _of_rank(report):
            numbers[name] = min(numbers.get(name, value), value)
    for name, pairs in (("pair_gbps", pair_rates(reports, hosts)), ("pair_latency_us", pair_latencies(reports, hosts))):
        scale = 1e-9 if name == "pair_gbps" else 1e6
        of_node: dict[str, list[float]] = defaultdict(list)
        for pair, value in pairs.items():
            for host in pair:
                of_node[host].append(value * scale)
        for host, found in of_node.items():
            nodes[host][name] = statistics.median(found)
    return nodes


def _of_rank(report: Report) -> list[tuple[str, float]]:
    found: list[tuple[str, float | None]] = []
    if check := report.device_check:
        host_rate = check.host_bytes_per_second
        found += [
            ("matmul_tflops", check.matmul_flops / 1e12),
            ("memory_gbps", check.memory_bytes_per_second / 1e9),
            ("host_copy_gbps", host_rate and host_rate / 1e9),
        ]
    if report.gpu:
        found.append(("free_gpu_gib", report.gpu.free_bytes / 2**30))
    if report.within_node:
        found.append(("all_reduce_gbps", report.within_node.busbw / 1e9))
    if machine := report.machine:
        rate = machine.disk.write_bytes_per_second
        found += [
            ("free_memory_gib", machine.memory_bytes / 2**30),
            ("free_disk_gib", machine.disk.free_bytes / 2**30),
            ("write_mbps", rate and rate / 1e6),
        ]
    return [(name, value) for name, value in found if value is not None]


_COLUMNS = {
    "matmul_tflops": "matmul\nTFLOP/s",
    "memory_gbps": "memory\nGB/s",
    "host_copy_gbps": "from host\nGB/s",
    "all_reduce_gbps": "in node\nGB/s",
    "pair_gbps": "pairs\nGB/s",
    "pair_latency_us": "pairs\nµs",
    "free_gpu_gib": "free GPU\nGiB",
    "free_memory_gib": "free RAM\nGiB",
    "free_disk_gib": "free disk\nGiB",
    "write_mbps": "write\nMB/s",
}


def show(reports: Sequence[Report], hosts: Sequence[str], findings: Sequence[Finding], seconds: float) -> None:
    """Print the table, and a line for each finding."""
    console = Console(width=_WIDTH, highlight=False, markup=False, soft_wrap=True)
    nodes = numbers_by_node(reports, hosts)
    console.print(f"pre-flight: {headline(reports, hosts)}, {seconds:.1f} s")
    console.print(_node_table(nodes, set(blamed(findings)), hosts))
    collectives = next((report.collectives for report in reports if report.collectives), None)
    if collectives and len(hosts) > 1:
        table = _table("all ranks", "latency µs", "message MB", "algbw GB/s", "busbw GB/s")
        for one in collectives:
            numbers = (one.latency_seconds * 1e6, one.bytes / 1e6, one.algbw / 1e9, one.busbw / 1e9)
            table.add_row(one.operation, *(f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in numbers))
        console.print(table)
    errors = sum(finding.level == "error" for finding in findings)
    for finding in findings:
        if finding.level == "error" and errors == 1:
            continue  # the error line tells it
        level = "warning" if finding.level == "warning" else "broken"
        console.print(f"{level}: {finding}{advice(finding.nodes, hosts)}")


def headline(reports: Sequence[Report], hosts: Sequence[str]) -> str:
    """Size of the job and the software of its first rank."""
    first = reports[0]
    words = [f"{_count(len(set(hosts)), 'node')}, {_count(len(hosts), 'rank')}"]
    words.append(first.gpu.name if first.gpu else "CPU")
    words += [f"{name} {value}" for name, value in first.software.items() if value != "none" and name in _VERSIONS]
    if first.machine and first.machine.gpus:
        words.append(f"driver {first.machine.gpus[0].driver}")
    if first.machine and first.machine.interface:
        words.append(f"interface {first.machine.interface}")
    return ", ".join(words)


def _node_table(nodes: dict[str, Numbers], conspicuous: set[str], hosts: Sequence[str]) -> Table:
    names = [name for name in _COLUMNS if any(name in numbers for numbers in nodes.values())]
    table = _table("node", "ranks", *(_COLUMNS[name] for name in names))
    few = len(nodes) <= _MOST_ROWS
    shown = [node for node in nodes if few or node in conspicuous][:_MOST_ROWS]
    for node in shown:
        ranks = [rank for rank, host in enumerate(hosts) if host == node]
        span = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        table.add_row(node, span, *(_number(nodes[node].get(name)) for name in names))
    if not few:
        summaries: tuple[tuple[str, Callable[[list[float]], float]], ...] = (
            ("minimum", min),
            ("median", statistics.median),
            ("maximum", max),
        )
        for label, function in summaries:
            values = [[numbers[name] for numbers in nodes.values() if name in numbers] for name in names]
            table.add_row(f"{label} of {len(nodes)}", "", *(_number(function(found)) for found in values))
        untold = max(0, len(conspicuous) - _MOST_ROWS)
        what = f"{untold} of them with findings" if untold else "without findings"
        table.caption = f"and {len(nodes) - len(shown)} more nodes, {what}"
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def write_json(
    file: Path, reports: Sequence[Report], hosts: Sequence[str], findings: Sequence[Finding], code: int, seconds: float
) -> None:
    """Everything that was found and measured."""
    nodes = numbers_by_node(reports, hosts)
    rates, latencies = pair_rates(reports, hosts), pair_latencies(reports, hosts)
    document: dict[str, Any] = {
        "exit_code": code,
        "seconds": round(seconds, 3),
        "exclude": blamed(one for one in findings if one.level == "error"),
        "findings": [{"level": one.level, "nodes": list(one.nodes), "text": one.text} for one in findings],
        "nodes": nodes,
        "pairs": [
            {"nodes": list(pair), "bytes_per_second": rate, "latency_seconds": latencies[pair]}
            for pair, rate in rates.items()
        ],
        "collectives": [
            {
                "operation": one.operation,
                "ranks": one.ranks,
                "bytes": one.bytes,
                "seconds": one.seconds,
                "latency_seconds": one.latency_seconds,
                "algbw_bytes_per_second": one.algbw,
                "busbw_bytes_per_second": one.busbw,
            }
            for one in next((report.collectives for report in reports if report.collectives), [])
        ],
        "ranks": [report.model_dump(exclude={"machine": {"code"}}) for report in reports],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(document, indent=1).encode() + b"\n")
