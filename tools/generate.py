"""Continue a prompt with a trained model, on the terminal. What it does lives in megagpt.inference."""

import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from megagpt.errors import UsageError, UserError
from megagpt.inference.batch import longest
from megagpt.inference.generate import encode_prompt, generate_text
from megagpt.inference.loading import load_model
from megagpt.inference.sampling import Sampling
from tools.command import run_command, single_command

NAME = "python -m tools.generate"


class Device(str, Enum):
    """Choices of --device."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Precision(str, Enum):
    """Choices of --dtype."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


def generate_command(
    run: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Run folder, checkpoint, export, or Hugging Face folder (GPT-2, Llama)."),
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue. [default: start a new document]")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file to continue, without its last line end; - is standard input.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of continuations.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1 bolder, above 1 more even; 0: the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest tokens of joint probability p.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Choose among tokens at least this times as probable as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens of prompt and continuation become less likely.")
    ] = 1.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Taken off a token's logit for each time that it was drawn.")
    ] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text, too; may be given more than once.")
    ] = None,
    slide: Annotated[
        bool, typer.Option("--slide", help="Go on beyond the context, seeing its last tokens (rope, sinusoidal).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Sample i depends on the seed and i only.")] = 0,
    checkpoint: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint. [default: newest]")] = None,
    device: Annotated[Device, typer.Option(help="auto: cuda if there is a GPU.")] = Device.auto,
    dtype: Annotated[Precision | None, typer.Option(help="Of the weights. [default: bf16 on a GPU, else fp32]")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Name or file, instead of the run's own tokenizer.")] = None,
    vocab_dir: Annotated[
        Path | None, typer.Option(envvar="MEGAGPT_VOCAB_DIR", help="Folder of vocabulary files.")
    ] = None,
) -> None:
    """Continue a prompt: print it and, as it comes, what the model adds, up to the end of the document.

    Example: python -m tools.generate runs/small --prompt "Once upon a time" --samples 3 --temperature 0.8 --top-p 0.95
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty)
    text = _read_prompt(prompt, prompt_file)
    model, found_tokenizer, _ = load_model(
        run,
        device.value,
        _DTYPES[dtype] if dtype else None,
        step=checkpoint,
        tokenizer=tokenizer,
        vocab_dir=vocab_dir,
    )
    left = longest(model.config, len(encode_prompt(found_tokenizer, text)), max_tokens, slide)
    if left < max_tokens:
        print(f"note: the model's context ends after {left} new tokens", file=sys.stderr)
    pieces = generate_text(
        model,
        found_tokenizer,
        text,
        sampling,
        num_samples=samples,
        max_new_tokens=max_tokens,
        seed=seed,
        stop=stop or (),
        slide=slide,
    )
    _print_samples(text, pieces, samples)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt_file is None:
        return prompt or ""
    if prompt is not None:
        raise UsageError("--prompt and --prompt-file: give one of them")
    name = "standard input" if prompt_file == Path("-") else str(prompt_file)
    try:
        content = sys.stdin.buffer.read() if prompt_file == Path("-") else prompt_file.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise UserError(f"--prompt-file {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {name}: byte {error.start} is not UTF-8; convert the file") from None
    return text.removesuffix("\n").removesuffix("\r")


def _print_samples(prompt: str, steps: Iterable[list[str]], samples: int) -> None:
    """Prompt and continuation of each sample; the first is shown as it comes, the others, made beside it, after it."""
    texts = [prompt] * samples
    _start_sample(0, samples)
    print(prompt, end="", flush=True)
    for pieces in steps:
        print(pieces[0], end="", flush=True)
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    print()
    for index in range(1, samples):
        _start_sample(index, samples)
        print(texts[index])


def _start_sample(index: int, samples: int) -> None:
    if samples > 1:
        print(f"--- sample {index + 1} of {samples} ---")


if __name__ == "__main__":
    run_command(single_command(generate_command, NAME), NAME)
