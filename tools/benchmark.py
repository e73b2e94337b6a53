"""python -m tools.benchmark: measure this machine's speed with this code, side by side with a plain alternative."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from launch.environment import discover
from launch.process import joined
from megagpt.benchmark.checkpoint import CheckpointBenchmark
from megagpt.benchmark.corpus import PARTS, Benchmark
from megagpt.benchmark.corpus_plot import draw_linear
from megagpt.benchmark.data import DataBenchmark
from megagpt.benchmark.figures import aligned, figures_of
from megagpt.benchmark.fit import most_layers, with_layers
from megagpt.benchmark.fresh import call
from megagpt.benchmark.generate import GenerateBenchmark
from megagpt.benchmark.machine import PROGRAM, command_of, head, revision
from megagpt.benchmark.measurements import check_writable, write_measurement
from megagpt.benchmark.peers import check_peers
from megagpt.benchmark.start import StartBenchmark
from megagpt.benchmark.suite import CPU, GPU, Entry, run_suite, summary
from megagpt.config import check_batch, check_precision, load_config
from megagpt.config.schema import RunConfig, TrainConfig
from megagpt.errors import UsageError, UserError
from megagpt.inference.loading import resolve_device
from megagpt.inference.sampling import Sampling
from tools.command import end_when_asked_to, run_command
from tools.generate import DTYPES, Device, Precision

DEFAULT_MODELS = ("configs/small.yaml", "configs/gpt2_124m.yaml")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


def _writable(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refused before anything is measured, not after it."""
    if path:
        check_writable(path, option.opts[0])
    return path


Output = Annotated[
    Path | None, typer.Option(help="Write the result to this JSON file too, with its machine.", callback=_writable)
]


@app.callback()
def main() -> None:
    """Measure speed, interleaved with a plain alternative so that a busy machine slows both.

    Example: python -m tools.benchmark train configs/small.yaml --steps 10
    """
    revision()  # as it is now, not when all is measured


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="Configuration of a run; its data is not read.")] = "configs/small.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Counted steps of each, after one that compiles; on CPUs another precedes each.")
    ] = 10,
    transformers: Annotated[bool, typer.Option("--transformers", help="Compare with its model, too.")] = False,
    nanogpt: Annotated[
        Path | None, typer.Option(help="The model.py of a checkout of nanoGPT, to compare with.")
    ] = None,
    fit_layers: Annotated[
        bool,
        typer.Option("--fit-layers", help="Of the model's layers so many that all contenders fit one GPU at once."),
    ] = False,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="Compare with the plain loop with torch's AdamW as it is by default, too.")
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Compare with this configuration changed: 'section.key=value ...'; may be given repeatedly."),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(min=1, help="Processes that ours is, on this machine's CPUs; others stay one with all of them."),
    ] = 1,
    output: Output = None,
) -> None:
    """A training step against a plain torch loop: same model, compiled as a whole, autocast, full logits, fused AdamW.

    Example: python -m tools.benchmark train configs/small.yaml train.global_batch_size=8 --against train.compile=false
    """
    run_config = load_config(config, overrides or [])
    variants = {words: load_config(config, [*(overrides or []), *words.split()]) for words in against or []}
    for words, variant in variants.items():
        for key in ("global_batch_size", "micro_batch_size"):
            if getattr(variant.train, key) != getattr(run_config.train, key):
                raise UsageError(f"--against {words!r}: train.{key} must be that of all contenders")
        if variant.seq_len != run_config.seq_len:
            raise UsageError(f"--against {words!r}: the sequence length must be that of all contenders")
    check_peers(run_config.model, transformers, nanogpt)
    if fit_layers:
        if transformers or nanogpt:
            raise UsageError(
                "--fit-layers knows what ours and the plain loop take; leave --transformers and --nanogpt out"
            )
        if any(variant.model.num_layers != run_config.model.num_layers for variant in variants.values()):
            raise UsageError("--fit-layers says how many layers all have; leave model.num_layers out of --against")
        layers = _layers_that_fit(run_config, list(variants.values()), 2 if unfused else 1)
        _printer()(f"{layers} of the model's {run_config.model.num_layers} layers fit")
        run_config = with_layers(run_config, layers)
        variants = {words: with_layers(variant, layers) for words, variant in variants.items()}
    place = discover()
    if ranks > 1 and place.world_size > 1:
        raise UsageError(
            f"--ranks {ranks}: {place.launcher} has started {place.world_size} ranks; leave one of them out"
        )
    console = Console(highlight=False, soft_wrap=True)
    if ranks > 1:
        for one in (run_config, *variants.values()):
            _check_ranks(one.train, ranks)
        arguments = {
            "config": run_config.model_dump(mode="json"),
            "variants": {words: variant.model_dump(mode="json") for words, variant in variants.items()},
            "steps": steps,
            "transformers": transformers,
            "nanogpt": str(nanogpt) if nanogpt else None,
            "unfused": unfused,
        }
        result = call("megagpt.benchmark.train", "compare_on_rank", arguments, ranks=ranks, report=console.print)
    else:
        with joined(place, run_config.train) as (place, device):
            from megagpt.benchmark.train import Peers, compare

            peers = Peers(transformers, nanogpt, unfused, variants)
            result = compare(run_config, steps, device, peers, console.print)
    if place.rank:
        return
    if result["mfu"]:
        console.print(f"MFU {result['mfu']:.1%}, at {result['model_flops_per_second'] / 1e12:,.0f} TFLOP/s")
    _write("train", result, output)


@app.command()
def loss(
    config: Annotated[str, typer.Argument(help="Configuration of a run; its model's sizes count.")] = (
        "configs/small.yaml"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of a micro-batch.")] = 8192,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count, after two that do not.")] = 5,
    device: Annotated[Device, typer.Option(help="auto: cuda if there is a GPU.")] = Device.auto,
    output: Output = None,
) -> None:
    """The output head with its loss, against full logits, and on a GPU against Liger Kernel if it is installed.

    Example: python -m tools.benchmark loss configs/gpt2_124m.yaml --tokens 1024
    """
    from megagpt.benchmark.loss import compare_losses

    model = load_config(config, overrides or []).model
    _write("loss", compare_losses(model, tokens, repeats, resolve_device(device.value), _printer()), output)


@app.command()
def growth(
    config: Annotated[str, typer.Argument(help="Configuration of a run; its data is not read.")] = "configs/small.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(
            help="Of sequence length, depth, width, batch and ranks, some, separated by commas. [default: all]"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each size, after two that do not count.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Draw it, as a PNG file.", callback=_writable)] = None,
    output: Output = None,
) -> None:
    """How a training step's time grows with sequence length, depth, width and batch, half to four times each, and
    falls with ranks 1 to 4 of one thread (on CPUs; another batch, that they all divide).

    Example: python -m tools.benchmark growth configs/small.yaml train.global_batch_size=8 --plot growth.png
    """
    run_config = load_config(config, overrides or [])
    chosen = [axis.strip() for axis in axes.split(",")] if axes else None
    console = Console(highlight=False, soft_wrap=True)
    with joined(discover(), run_config.train) as (_, device):
        from megagpt.benchmark.growth import as_json, draw, measure_growth

        found = measure_growth(run_config, chosen, steps, device, console.print)
        if plot:
            draw(found, plot)
        _write("growth", as_json(found), output)


@app.command()
def start(
    config: Annotated[str, typer.Argument(help="Configuration of a run; its data is not read.")] = "configs/small.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes of the run, started by torchrun where there are more.")
    ] = 1,
    tokens: Annotated[int, typer.Option(min=100_000, help="Of the generated dataset.")] = 4_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Cold and warm starts, in turns; medians count.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Scratch space, 0.1 GB by default. [default: the system's]")
    ] = None,
    output: Output = None,
) -> None:
    """From the command of a run to the end of its first step, with an empty compile cache (cold) and with a full one.

    Example: python -m tools.benchmark start configs/small.yaml train.device=cpu --repeats 1
    """
    with _scratch(folder) as scratch:
        benchmark = StartBenchmark(scratch, config, overrides or [], ranks, tokens, repeats, _printer())
        _write("start", benchmark.run(), output)


@app.command()
def corpus(
    parts: Annotated[str, typer.Option(help=f"What to measure, separated by commas: {', '.join(PARTS)}.")] = ",".join(
        PARTS
    ),
    megabytes: Annotated[float, typer.Option(min=0.1, help="Generated text of a measurement, in MB.")] = 300,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one for each CPU]")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured; medians count.")] = 3,
    filters: Annotated[
        Path, typer.Option(help="Configuration of a corpus, with the cleaning and filters to measure.")
    ] = Path("configs/data/web.yaml"),
    large: Annotated[bool, typer.Option("--large", help="Let `linear` go on to 1,000 MB.")] = False,
    datatrove: Annotated[bool, typer.Option("--datatrove", help="Compare `dedup` and `pipeline` with it.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Scratch space, five times the text. [default: the system's]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw `linear`, as a PNG file.", callback=_writable)] = None,
    output: Output = None,
) -> None:
    """From text to token files: signatures, banding, tokenization, dedup, whole runs, and how the cost grows.

    Example: python -m tools.benchmark corpus --parts dedup,pipeline --megabytes 50 --workers 2 --datatrove
    """
    chosen = [part.strip() for part in parts.split(",")]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise UsageError(f"--parts {','.join(unknown)}: choose from {', '.join(PARTS)}")
    if plot and "linear" not in chosen:
        raise UsageError("--plot: draws `linear`; add it to --parts")
    with _scratch(folder) as scratch:
        benchmark = Benchmark(
            folder=scratch,
            megabytes=megabytes,
            workers=workers or len(os.sched_getaffinity(0)),
            repeats=repeats,
            filter_config=filters,
            large=large,
            datatrove=datatrove,
            report=_printer(),
        )
        result = benchmark.run(chosen)
    if plot:
        draw_linear(result["linear"], plot)
    _write("corpus", result, output)


@app.command()
def data(
    tokens: Annotated[int, typer.Option(min=10_000, help="Of the huge dataset; its .bin takes no disk.")] = 10**10,
    documents: Annotated[int, typer.Option(min=1, help="Of it; 20 bytes of disk each.")] = 10**7,
    datasets: Annotated[int, typer.Option(min=1, help="Of the blend; 0.1 MB of disk each.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured; medians count.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Scratch space, 0.5 GB by default. [default: the system's]")
    ] = None,
    output: Output = None,
) -> None:
    """From token files to batches: reading, opening a huge dataset, random access, a blend of many, resuming.

    Example: python -m tools.benchmark data --tokens 1000000000 --documents 1000000 --folder /scratch
    """
    with _scratch(folder) as scratch:
        benchmark = DataBenchmark(scratch, tokens, documents, datasets, repeats, _printer())
        _write("data", benchmark.run(), output)


@app.command()
def checkpoint(
    parameters: Annotated[int, typer.Option(min=10_000, help="Of the model, about; 14 bytes of checkpoint each.")] = (
        85_000_000
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count, after one that does not.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Scratch space on the disk to measure, 7 GB by default. [default: the system's]")
    ] = None,
    output: Output = None,
) -> None:
    """Saving and loading beside a plain copy of files, what an asynchronous save stalls, and another number of ranks.

    Example: python -m tools.benchmark checkpoint --parameters 20000000 --folder /scratch
    """
    with _scratch(folder) as scratch:
        _write("checkpoint", CheckpointBenchmark(scratch, parameters, repeats, _printer()).run(), output)


@app.command()
def generate(
    configs: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG]...", help="Of runs; their models, with random weights.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Drawn after it.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count, after one that does not.")] = 5,
    dtype: Annotated[Precision, typer.Option(help="Of the weights.")] = Precision.bf16,
    device: Annotated[Device, typer.Option(help="auto: cuda if there is a GPU.")] = Device.auto,
    transformers: Annotated[bool, typer.Option("--transformers/--no-transformers", help="Compare with it.")] = True,
    nanogpt: Annotated[
        Path | None, typer.Option(help="The model.py of a checkout of nanoGPT, to compare with.")
    ] = None,
    output: Output = None,
) -> None:
    """Sampling, side by side with transformers' generate and nanoGPT's sampler, as a share of memory's speed.

    [default: configs/small.yaml and configs/gpt2_124m.yaml]

    Example: python -m tools.benchmark generate configs/small.yaml --rows 1,8 --nanogpt ../nanoGPT/model.py
    """
    files = configs or DEFAULT_MODELS
    stems = [Path(file).stem for file in files]
    # By its file's name, or by all of the path where names are the same.
    models = {
        stem if stems.count(stem) == 1 else file: load_config(file).model
        for stem, file in zip(stems, files, strict=True)
    }
    console = Console(highlight=False, soft_wrap=True)
    benchmark = GenerateBenchmark(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        sampling=Sampling(temperature, top_k),
        repeats=repeats,
        dtype=DTYPES[dtype],
        device=resolve_device(device.value),
        transformers=transformers,
        nanogpt=nanogpt,
        report=console.print,
    )
    _write("generate", benchmark.run(models, _sizes(rows)), output)


def _layers_that_fit(config: RunConfig, variants: Sequence[RunConfig], plain_loops: int) -> int:
    if config.train.device == "cpu" or not torch.cuda.is_available():
        raise UsageError("--fit-layers is for a GPU, and there is none here; say model.num_layers=N instead")
    return most_layers(config, variants, plain_loops, torch.cuda.mem_get_info()[1])


def _check_ranks(train: TrainConfig, ranks: int) -> None:
    """Raise UsageError where so many processes of this machine cannot take the steps of a run."""
    if train.device == "cuda":
        raise UsageError("--ranks: is for CPUs; set train.device=cpu")
    check_precision(train.precision, "cpu")
    check_batch(train.global_batch_size, train.micro_batch_size, ranks)


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """An empty folder in `folder`, or where the system has its own; it is removed afterwards."""
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="megagpt_benchmark_", dir=folder)
    except OSError as error:
        raise UsageError(f"--folder {folder}: cannot be used: {error.strerror}; choose another") from error
    with scratch as path:
        yield Path(path)


@app.command("all")
def measure_all(
    output: Annotated[Path, typer.Option(help="Folder of the results, a JSON file each.")] = Path("runs/benchmark"),
    nanogpt: Annotated[
        Path | None, typer.Option(help="The model.py of a checkout of nanoGPT, to compare with.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Names of measurements, separated by commas. [default: all]")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the folder has.")] = False,
    show_list: Annotated[bool, typer.Option("--list", help="List the measurements, and measure nothing.")] = False,
) -> None:
    """All that docs/performance.md shows, on a GPU if there is one, else on a CPU; goes on with what is missing.

    Example: python -m tools.benchmark all --output runs/benchmark --nanogpt ../nanoGPT/model.py
    """
    show = _printer()
    if show_list:
        for entry in (*CPU, *GPU):
            show(f"{entry.name:22} {command_of(entry.arguments(nanogpt))}")
        return
    entries = _chosen(GPU if torch.cuda.is_available() else CPU, only)
    if nanogpt and not nanogpt.is_file():
        raise UsageError(f"--nanogpt {nanogpt}: no such file; give the model.py of a checkout of nanoGPT")
    check_writable(output / "any.json", "--output")
    failed = run_suite(entries, output, nanogpt, fresh, show)
    _print_table(aligned(summary([entry for entry in entries if entry.name not in failed], output)))
    if failed:
        raise UserError(f"{len(failed)} of {len(entries)} measurements failed: {', '.join(failed)}")


def _chosen(entries: Sequence[Entry], only: str | None) -> list[Entry]:
    names = [entry.name for entry in entries]
    chosen = [name.strip() for name in only.split(",")] if only else names
    if unknown := [name for name in chosen if name not in names]:
        raise UsageError(f"--only {','.join(unknown)}: choose from {', '.join(names)}")
    return [entry for entry in entries if entry.name in chosen]


def _printer() -> Callable[[str], None]:
    return Console(highlight=False, soft_wrap=True).print


def _sizes(text: str) -> list[int]:
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise UsageError(f"--rows {text}: give whole numbers above 0, separated by commas")
    return [int(part) for part in text.split(",")]


def _write(benchmark: str, result: dict[str, Any], output: Path | None) -> None:
    """The result's figures as a table; with its head to the file."""
    _print_table(aligned(figures_of({"benchmark": benchmark, **result})))
    if output:
        write_measurement(output, head(benchmark, sys.argv[1:]), result)


def _print_table(lines: Sequence[str]) -> None:
    show = _printer()
    for line in ("", *lines):
        show(line)


if __name__ == "__main__":
    end_when_asked_to()
    run_command(app, PROGRAM)
