"""python -m tools.benchmark: measure this machine's speed with this code, side by side with a plain alternative."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launch.environment import discover
from launch.process import joined
from megagpt.benchmark.checkpoint import CheckpointBenchmark
from megagpt.benchmark.corpus import PARTS, Benchmark
from megagpt.benchmark.corpus_plot import draw_linear
from megagpt.benchmark.data import DataBenchmark
from megagpt.benchmark.generate import GenerateBenchmark
from megagpt.benchmark.peers import check_peers
from megagpt.config import load_config
from megagpt.errors import UsageError
from megagpt.inference.loading import resolve_device
from megagpt.inference.sampling import Sampling
from tools.command import end_when_asked_to, run_command
from tools.generate import DTYPES, Device, Precision

PROGRAM = "python -m tools.benchmark"

DEFAULT_MODELS = ("configs/small.yaml", "configs/gpt2_124m.yaml")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Measure speed, interleaved with a plain alternative so that a busy machine slows both.

    Example: python -m tools.benchmark train configs/small.yaml --steps 10
    """


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="Configuration of a run; its data is not read.")] = "configs/small.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each, after one that compiles.")] = 10,
    transformers: Annotated[bool, typer.Option("--transformers", help="Compare with its model, too.")] = False,
    nanogpt: Annotated[
        Path | None, typer.Option(help="The model.py of a checkout of nanoGPT, to compare with.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Compare with this configuration changed: 'section.key=value ...'; may be given repeatedly."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")] = None,
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
    console = Console(highlight=False, soft_wrap=True)
    with joined(discover(), run_config.train) as (_, device):
        from megagpt.benchmark.train import Peers, compare

        result = compare(run_config, steps, device, Peers(transformers, nanogpt, variants), console.print)
    seconds, rates = result["step_seconds"], result["tokens_per_second"]
    for name in seconds:
        console.print(f"{name:22} {seconds[name]:.3f} s a step, {rates[name]:,.0f} tokens/s (median of {steps})")
    if result["mfu"]:
        console.print(f"MFU {result['mfu']:.1%}, at {result['model_flops_per_second'] / 1e12:,.0f} TFLOP/s")
    for name, speedup in result["speedup_over"].items():
        console.print(
            f"megagpt is {speedup['median']:.2f} x as fast as {name} "
            f"(pair by pair: {speedup['min']:.2f} to {speedup['max']:.2f})"
        )
    _write(result, output)


@app.command()
def growth(
    config: Annotated[str, typer.Argument(help="Configuration of a run; its data is not read.")] = "configs/small.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Changes to the configuration.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each size, after two that do not count.")] = 5,
    plot: Annotated[Path | None, typer.Option(help="Draw it, as a PNG file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")] = None,
) -> None:
    """How a training step's time grows with sequence length, depth, width and batch: half to four times each.

    Example: python -m tools.benchmark growth configs/small.yaml train.global_batch_size=8 --plot growth.png
    """
    run_config = load_config(config, overrides or [])
    console = Console(highlight=False, soft_wrap=True)
    with joined(discover(), run_config.train) as (_, device):
        from megagpt.benchmark.growth import as_json, draw, measure_growth

        found = measure_growth(run_config, steps, device, console.print)
        if plot:
            plot.parent.mkdir(parents=True, exist_ok=True)
            draw(found, plot)
        _write(as_json(found, device), output)


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
    plot: Annotated[Path | None, typer.Option(help="Draw `linear`, as a PNG file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")] = None,
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
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw_linear(result["linear"], plot)
    _write(result, output)


@app.command()
def data(
    tokens: Annotated[int, typer.Option(min=10_000, help="Of the huge dataset; its .bin takes no disk.")] = 10**10,
    documents: Annotated[int, typer.Option(min=1, help="Of it; 20 bytes of disk each.")] = 10**7,
    datasets: Annotated[int, typer.Option(min=1, help="Of the blend; 0.1 MB of disk each.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured; medians count.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Scratch space, 0.5 GB by default. [default: the system's]")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")] = None,
) -> None:
    """From token files to batches: reading, opening a huge dataset, random access, a blend of many, resuming.

    Example: python -m tools.benchmark data --tokens 1000000000 --documents 1000000 --folder /scratch
    """
    with _scratch(folder) as scratch:
        benchmark = DataBenchmark(scratch, tokens, documents, datasets, repeats, _printer())
        _write(benchmark.run(), output)


@app.command()
def checkpoint(
    parameters: Annotated[int, typer.Option(min=10_000, help="Of the model, about; 14 bytes of checkpoint each.")] = (
        85_000_000
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Turns that count, after one that does not.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Scratch space on the disk to measure, 7 GB by default. [default: the system's]")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")] = None,
) -> None:
    """Saving and loading beside a plain copy of files, what an asynchronous save stalls, and another number of ranks.

    Example: python -m tools.benchmark checkpoint --parameters 20000000 --folder /scratch
    """
    with _scratch(folder) as scratch:
        _write(CheckpointBenchmark(scratch, parameters, repeats, _printer()).run(), output)


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
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")] = None,
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
    _write(benchmark.run(models, _sizes(rows)), output)


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


def _printer() -> Callable[[str], None]:
    return Console(highlight=False, soft_wrap=True).print


def _sizes(text: str) -> list[int]:
    if not all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        raise UsageError(f"--rows {text}: give whole numbers above 0, separated by commas")
    return [int(part) for part in text.split(",")]


def _write(result: dict[str, Any], output: Path | None) -> None:
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    end_when_asked_to()
    run_command(app, PROGRAM)
