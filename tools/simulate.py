"""python -m tools.scaling simulate: a plan played on a cluster whose nodes differ and fail."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from megagpt.scaling.devices import DEFAULT_NETWORK
from tools.plan import (
    DEFAULT_MTBF,
    DeviceName,
    GpusOfNode,
    HostMemory,
    Mtbf,
    Network,
    Overrides,
    Tokens,
    planned_machine,
    planned_tokens,
    storage_rate,
)

if TYPE_CHECKING:
    from megagpt.planning.simulation.study import Simulation

_TABLE_WIDTH = 170
"""Characters, where a pipe or a narrow terminal would cut columns."""


def simulate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's configuration: configs/llama_70b.yaml")],
    overrides: Overrides = None,
    gpu: DeviceName = "h100-sxm",
    gpus: Annotated[str, typer.Option(help="Number of GPUs that train; spares come on top.")] = "8",
    nodes_gpus: GpusOfNode = 8,
    network: Network = DEFAULT_NETWORK,
    tokens: Tokens = None,
    mtbf: Mtbf = DEFAULT_MTBF,
    restart: Annotated[str, typer.Option(help="From a failure until training goes on, with a node at hand.")] = "10min",
    storage: Annotated[
        str, typer.Option(help="What all nodes together write to the file system, and read.")
    ] = "20GB/s",
    host_memory: HostMemory = "2T",
    days: Annotated[float, typer.Option(min=0.01, help="To play.")] = 30.0,
    spares: Annotated[
        int | None, typer.Option(min=0, help="Nodes that stand by; default: enough for 99 % of the time.")
    ] = None,
    detection: Annotated[
        str, typer.Option(help="Part of --restart: until a failure is noticed; default: Slurm's SlurmdTimeout.")
    ] = "5min",
    replacement: Annotated[
        str | None, typer.Option(help="Beyond --restart, until a node has taken a failed one's place; default: none.")
    ] = None,
    repair: Annotated[str, typer.Option(help="Mean time until a failed node is back.")] = "4h",
    fewer_nodes: Annotated[
        bool, typer.Option("--fewer-nodes/--wait", help="Without a spare, go on with fewer nodes, or wait.")
    ] = False,
    preempted_every: Annotated[
        str | None, typer.Option(help="Mean time between pre-emptions, 7d; default: there are none.")
    ] = None,
    preempted_for: Annotated[str, typer.Option(help="How long a pre-empted job is away.")] = "1h",
    checkpoint_every: Annotated[
        str | None, typer.Option(help="Training between two checkpoints, 30min; default: the closed form's best.")
    ] = None,
    asynchronous: Annotated[
        bool | None,
        typer.Option("--asynchronous/--synchronous", help="How to save; default: what the configuration says."),
    ] = None,
    jitter: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Standard deviation of the log of a node's step time.")
    ] = 0.01,
    slow_nodes: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of nodes that are slow: 0.005.")] = 0.0,
    slow_factor: Annotated[float, typer.Option(min=1.0, max=100.0, help="How much longer steps take on them.")] = 1.1,
    weibull_shape: Annotated[
        float, typer.Option(min=0.3, max=10.0, help="Of a node's life; 1: exponential, below: fails again soon.")
    ] = 1.0,
    runs: Annotated[int, typer.Option(min=2, help="With different random numbers, for the intervals.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for a page, pictures and JSON; adds other intervals and spares.")
    ] = None,
) -> None:
    """Play a plan on a cluster whose nodes differ and fail: goodput, and where the rest of the time goes.

    With and without asynchronous checkpoints and spare nodes, beside the closed form of python -m tools.plan.

    Example: python -m tools.scaling simulate configs/llama_70b.yaml --gpus 1024 train.global_batch_size=2048
    """
    from megagpt.config.loading import load_config
    from megagpt.planning.plan import Circumstances, make_plan, run_layout
    from megagpt.planning.search import check_possible
    from megagpt.planning.simulation.job import Preemption
    from megagpt.planning.simulation.report import write_report
    from megagpt.planning.simulation.scenarios import Conditions
    from megagpt.planning.simulation.stragglers import Stragglers
    from megagpt.planning.simulation.study import simulate as play
    from megagpt.planning.units import parse_count, parse_seconds

    saving = [] if asynchronous is None else [f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    loaded, count = load_config(config, [*(overrides or []), *saving]), parse_count(gpus, "--gpus")
    machine = planned_machine(loaded, gpu, nodes_gpus, network, parse_count(host_memory, "--host-memory") / nodes_gpus)
    circumstances = Circumstances(
        tokens=parse_count(tokens, "--tokens") if tokens else planned_tokens(loaded),
        price=None,
        node_mtbf_seconds=parse_seconds(mtbf, "--mtbf"),
        restart_seconds=parse_seconds(restart, "--restart"),
        storage_bytes_per_second=storage_rate(storage),
    )
    away = parse_seconds(preempted_for, "--preempted-for")
    every = parse_seconds(preempted_every, "--preempted-every") if preempted_every else None
    conditions = Conditions(
        spares=spares,
        repair_seconds=parse_seconds(repair, "--repair"),
        shape=weibull_shape,
        stragglers=Stragglers(jitter, slow_nodes, slow_factor),
        detection_seconds=parse_seconds(detection, "--detection"),
        replacement_seconds=parse_seconds(replacement, "--replacement") if replacement else 0.0,
        fewer_nodes=fewer_nodes,
        preemption=Preemption(every, away) if every else None,
        every_seconds=parse_seconds(checkpoint_every, "--checkpoint-every") if checkpoint_every else None,
        days=days,
        runs=runs,
        seed=seed,
    )
    check_possible(loaded, machine, count)
    plan = make_plan(loaded, run_layout(loaded, count, nodes_gpus), machine, circumstances)
    simulation = play(plan, conditions, sweeps=output is not None)
    _print(simulation, str(config))
    if output:
        print(write_report(simulation, str(config), output))


def _print(simulation: "Simulation", source: str) -> None:
    from megagpt.planning.report import layout_text
    from megagpt.planning.simulation.report import conditions_lines, tables, verdict

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _TABLE_WIDTH)
    for line in (f"{source}: {layout_text(simulation.plan)}", *conditions_lines(simulation)):
        console.print(line, markup=False)
    for table in tables(simulation):
        console.print(f"\n{table.title}", style="bold")
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(verdict(simulation), markup=False)
