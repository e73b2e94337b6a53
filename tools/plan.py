"""python -m tools.plan: what a run will need before it is paid for."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from megagpt.config.loading import load_config
from megagpt.config.schema import RunConfig
from megagpt.errors import UsageError
from megagpt.planning.failures import NODE_MTBF_HOURS
from megagpt.planning.plan import Circumstances, Limits, Machine, make_plan, run_layout
from megagpt.planning.report import (
    CURVE_COLUMNS,
    OPTION_COLUMNS,
    Study,
    curve_rows,
    layout_text,
    option_rows,
    sections,
    verdict,
    write_html,
    write_json,
)
from megagpt.planning.search import check_possible, curve, search
from megagpt.planning.units import parse_count, parse_counts, parse_seconds
from megagpt.scaling.devices import DEFAULT_NETWORK, Cluster, find_device, parse_network
from tools.command import run_command, single_command

PROGRAM = "python -m tools.plan"
MEASURED = "this"
"""Name of the device that this machine has, which is measured for some seconds."""
_TABLE_WIDTH = 140
"""Characters, where a pipe or a narrow terminal would cut columns."""

DEFAULT_MTBF = f"{NODE_MTBF_HOURS:.0f}h"

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
]
DeviceName = Annotated[str, typer.Option(help="Device: h100-sxm, a100, ...; this: measure this machine's.")]
GpusOfNode = Annotated[int, typer.Option("--nodes-gpus", min=1, help="GPUs of a node.")]
Network = Annotated[str, typer.Option(help="Of one GPU to other nodes: 400gbps (bits) or 50GB/s (bytes).")]
Tokens = Annotated[str | None, typer.Option(help="To train on: 300B; default: what the configuration says.")]
Mtbf = Annotated[str, typer.Option(help="Mean time between failures of a node; default: that of Llama 3's training.")]
HostMemory = Annotated[str, typer.Option("--host-memory", help="Of a node, for offload: bytes, 2T.")]


def main(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A run's configuration: configs/llama_8b.yaml")
    ] = None,
    overrides: Overrides = None,
    gpu: DeviceName = "h100-sxm",
    gpus: Annotated[str, typer.Option(help="Number of GPUs; several, as 8,64,512, draw scaling curves too.")] = "8",
    nodes_gpus: GpusOfNode = 8,
    network: Network = DEFAULT_NETWORK,
    tokens: Tokens = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Of a GPU for an hour, in any currency.")] = None,
    mtbf: Mtbf = DEFAULT_MTBF,
    restart: Annotated[str, typer.Option(help="From a failure until training goes on.")] = "10min",
    storage: Annotated[str, typer.Option(help="What all nodes together write to the file system.")] = "20GB/s",
    host_memory: HostMemory = "2T",
    find: Annotated[bool, typer.Option("--search", help="Rank all layouts that fit by their throughput.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all numbers as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page with pictures.")] = None,
    validate: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Plan nothing: compare with published runs; table, picture, JSON go there."
        ),
    ] = None,
) -> None:
    """Say what a run needs: memory by part and whether it fits, time of a step, days, cost, checkpoints, failures.

    Nothing is computed on a GPU, and the data need not exist.

    Example: python -m tools.plan configs/llama_8b.yaml --gpu h100-sxm --gpus 512 --tokens 300B --price 2.5 --search
    """
    if validate:
        from megagpt.planning.validation import validate as validate_against_published

        if config:
            raise UsageError(f"{config}: --validate takes no configuration; leave it out")
        print(validate_against_published(validate).text())
        return
    if config is None:
        raise UsageError("CONFIG: missing; give a run's configuration, as configs/llama_8b.yaml, or --validate FOLDER")
    loaded = load_config(config, overrides or [])
    counts = parse_counts(gpus, "--gpus")
    machine = planned_machine(loaded, gpu, nodes_gpus, network, parse_count(host_memory, "--host-memory") / nodes_gpus)
    check_possible(loaded, machine, counts[-1])
    circumstances = Circumstances(
        tokens=parse_count(tokens, "--tokens") if tokens else planned_tokens(loaded),
        price=price,
        node_mtbf_seconds=parse_seconds(mtbf, "--mtbf"),
        restart_seconds=parse_seconds(restart, "--restart"),
        storage_bytes_per_second=storage_rate(storage),
    )
    plan = make_plan(loaded, run_layout(loaded, counts[0], nodes_gpus), machine, circumstances)
    study = Study(
        str(config),
        plan,
        search(loaded, machine, counts[0]) if find else None,
        {kind: curve(loaded, machine, counts, kind) for kind in ("strong", "weak")} if len(counts) > 1 else {},
    )
    _print(study)
    if json:
        write_json(study, json)
    if html:
        write_html(study, html)


def planned_machine(config: RunConfig, gpu: str, gpus_per_node: int, network: str, host_bytes: float) -> Machine:
    rate = parse_network(network)
    if gpu != MEASURED:
        cluster = Cluster(find_device(gpu), gpus_per_node, rate)
        return Machine(cluster, Limits(cluster.device.memory_bytes, host_bytes))
    from megagpt.planning.measure import measure_device

    measured = measure_device(config.train.precision)
    cluster = Cluster(measured.cluster.device, gpus_per_node, rate)
    return Machine(cluster, Limits(cluster.device.memory_bytes, host_bytes), measured.efficiency)


def planned_tokens(config: RunConfig) -> int:
    return config.train.batches.after_steps(config.train.total_steps(config.seq_len)) * config.seq_len


def storage_rate(text: str) -> float:
    try:
        return parse_network(text)
    except UsageError:
        raise UsageError(f"--storage {text!r} is no rate; write 20GB/s") from None


def _print(study: Study) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(f"{study.source}: {layout_text(study.plan)}", markup=False)
    for title, rows in sections(study.plan):
        table = _table(console, title, ["", ""])
        for name, value in rows:
            table.add_row(name, value)
        console.print(table)
    console.print(f"\n{verdict(study.plan)}", markup=False)
    if study.options is not None:
        _print_table(console, "Layouts that fit, the fastest first", OPTION_COLUMNS, option_rows(study.options))
        if study.options:
            console.print(f"the first one: {' '.join(study.options[0].overrides)}", markup=False)
    for kind, points in study.curves.items():
        _print_table(console, f"{kind.capitalize()} scaling", CURVE_COLUMNS, curve_rows(points))


def _print_table(console: Console, title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    table = _table(console, title, columns)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _table(console: Console, title: str, columns: list[str] | tuple[str, ...]) -> Table:
    console.print(f"\n{title}", style="bold")
    table = Table(box=box.SIMPLE_HEAD if any(columns) else None, show_header=any(columns), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 and not any(columns) else "right", no_wrap=True)
    return table


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
