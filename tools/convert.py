"""python -m tools.convert: trained models from and to other formats. What it does lives in megagpt.convert."""

import contextlib
import re
import sys
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megagpt.convert import Conversion, Options, convert
from megagpt.convert.verify import TOLERANCE
from megagpt.convert.writing import Report
from megagpt.errors import UsageError
from tools.command import run_command, single_command

PROGRAM = "python -m tools.convert"

_SECONDS_BETWEEN_LINES = 10.0
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Format(str, Enum):
    """Choices of --to."""

    hf = "hf"
    megagpt = "megagpt"
    nanogpt = "nanogpt"


class Precision(str, Enum):
    """Choices of --dtype."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


def main(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A run, checkpoint, export, or another program's model.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; it must not be there yet.")],
    to: Annotated[Format, typer.Option(help="hf: GPT2LMHeadModel or LlamaForCausalLM; megagpt: for train.init_from.")],
    dtype: Annotated[Precision | None, typer.Option(help="Of the weights. [default: as they are stored]")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file: a number and KB, MB or GB.")] = "5GB",
    verify: Annotated[bool, typer.Option(help="Compare what was written with the source.")] = True,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference of logits, as a share of the largest one above 1.")
    ] = TOLERANCE,
    tokenizer: Annotated[
        str | None, typer.Option(help="Name or file, instead of the model's own; none: convert the weights alone.")
    ] = None,
    vocab_dir: Annotated[
        Path | None, typer.Option(envvar="MEGAGPT_VOCAB_DIR", help="Folder of vocabulary files.")
    ] = None,
) -> None:
    """Convert a trained model, compare what was written with the source, and keep it only if both are the same.

    SRC is a run folder, a checkpoint of any ZeRO stage and number of ranks, an export of megagpt, a Hugging Face folder
    (GPT-2, Llama), nanoGPT's ckpt.pt, or Megatron-LM's mp_rank_00. It is read on the CPU, one tensor at a time.

    Example: python -m tools.convert runs/small exports/small --to hf --dtype bf16
    """
    options = Options(
        dtype=_DTYPES[dtype] if dtype else None,
        max_shard_bytes=_bytes(max_shard_size),
        tolerance=tolerance,
        verifies=verify,
        tokenizer=tokenizer,
        vocab_dir=vocab_dir,
    )
    started = time.monotonic()
    done = convert(source, target, to.value, options, _progress)
    _say(done, target, time.monotonic() - started)


def _say(done: Conversion, target: Path, seconds: float) -> None:
    print(f"{done.source.path} -> {target}: {done.tensors} tensors, {done.nbytes / 1e9:.3f} GB, in {seconds:.1f} s")
    print(f"  tokenizer: {done.tokenizer or 'none'}")
    if done.difference is None:
        print("  not verified")
        return
    on = "random and real tokens" if done.real_tokens else "random tokens (there is no tokenizer to encode text with)"
    print(f"  verified on {on}: weights bit-identical, logits (up to {done.difference.scale:.3g}): {done.difference}")
    if done.rounding:
        print(f"  rounding of the weights alone changes logits by: {done.rounding}")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?I?B)?", text.strip().upper())
    if not found or float(found[1]) <= 0 or (found[2] or "") not in (*_UNITS, "B"):
        raise UsageError(f"--max-shard-size {text!r}: give a number and a unit, such as 500MB or 5GB")
    return max(1, int(float(found[1]) * _UNITS.get(found[2] or "", 1)))


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Report]:
    """On standard error: a bar on a terminal, else a line every ten seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)
        return
    last, sum_done = time.monotonic(), 0

    def report(done: int) -> None:
        nonlocal last, sum_done
        sum_done += done
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{what}: {sum_done / total:.0%}", file=sys.stderr, flush=True)

    yield report


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
