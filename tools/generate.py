"""Sample from a trained model, score texts with it, talk to it. What it does lives in megagpt.inference."""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from launch.environment import ProcessEnvironment, discover
from megagpt.convert.source import open_source
from megagpt.corpus.chat_template import load_template
from megagpt.errors import UsageError, UserError
from megagpt.inference.batch import longest
from megagpt.inference.chat import Conversation
from megagpt.inference.generate import encode_prompt, generate_text
from megagpt.inference.jobs import Output, Prompt, Share, read_prompts, sample_prompts, share
from megagpt.inference.loading import LoadedModel, load_model
from megagpt.inference.sampling import Sampling
from megagpt.inference.score import Score, score_text, window_sizes
from megagpt.model.compiling import missing_for_compile
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


DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


_TEXT, _PROMPTS, _CHAT, _SCORE, _SCORE_PROMPTS = "one prompt", "--prompts", "--chat", "--score", "--score --prompts"
_DRAWING = (_TEXT, _PROMPTS, _CHAT)
_MODES_OF = {
    "prompt": (_TEXT, _SCORE),
    "prompt_file": (_TEXT, _SCORE),
    "output": (_PROMPTS, _SCORE_PROMPTS),
    "samples": (_TEXT, _PROMPTS),
    "max_tokens": _DRAWING,
    "temperature": _DRAWING,
    "top_k": _DRAWING,
    "top_p": _DRAWING,
    "min_p": _DRAWING,
    "repetition_penalty": _DRAWING,
    "frequency_penalty": _DRAWING,
    "stop": _DRAWING,
    "seed": _DRAWING,
    "slide": (_TEXT, _PROMPTS),
    "compile": _DRAWING,
    "batch_size": (_PROMPTS,),
    "logprobs": (_PROMPTS,),
    "template": (_CHAT,),
    "context": (_SCORE, _SCORE_PROMPTS),
    "stride": (_SCORE, _SCORE_PROMPTS),
}
"""Where an option does something; one that is not here always does."""


def generate_command(
    invocation: typer.Context,
    run: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Run folder, checkpoint, export, or Hugging Face folder (GPT-2, Llama)."),
    ],
    prompt: Annotated[str | None, typer.Option(help="Text to continue. [default: start a new document]")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file to continue, without its last line end; - is standard input.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON Lines of {"id": ..., "prompt": "..."} to continue, or to score.')
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON Lines to write for --prompts, or to complete.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk to a fine-tuned model: a line in, an answer out.")] = False,
    score: Annotated[
        bool, typer.Option("--score", help="Do not continue the text, but say how well the model predicts it.")
    ] = False,
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
    batch_size: Annotated[int, typer.Option(min=1, help="How many samples of --prompts are drawn together.")] = 16,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile the step of decoding. [default: if it saves time; not with --chat]"
        ),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Write the samples' token ids and their log-probabilities, too.")
    ] = False,
    template: Annotated[str, typer.Option(help="Of --chat: chatml, plain, or a file, as in fine-tuning.")] = "chatml",
    context: Annotated[int | None, typer.Option(help="Of --score: tokens of a window. [default: the model's]")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Of --score: tokens from window to window. [default: half a window]")
    ] = None,
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

    Many prompts, by one or several processes (torchrun, srun); what is written is not done again:
    python -m tools.generate runs/small --prompts prompts.jsonl --output samples.jsonl

    Perplexity: python -m tools.generate runs/small --score --prompt-file book.txt
    """
    mode = _mode(invocation, prompts, output, chat, score)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty)
    stop = stop or []
    if "" in stop:
        raise UsageError("--stop: a stop string must not be empty")
    if compile and (missing := missing_for_compile()):
        raise UserError(f"--compile: needs {missing}; install it, or leave the option out")
    place = discover() if prompts else None
    lines = read_prompts(prompts) if prompts else []
    text = "" if prompts or chat else _read_prompt(prompt, prompt_file, whole=score)
    chat_template = load_template(template)
    loaded = load_model(
        run,
        _device(device, place),
        DTYPES[dtype] if dtype else None,
        step=checkpoint,
        tokenizer=tokenizer,
        vocab_dir=vocab_dir,
    )
    drawing: dict[str, Any] = {"seed": seed, "stop": stop}
    if prompts and output and place:
        drawing |= {"max_tokens": max_tokens, "slide": slide, "logprobs": logprobs}
        settings: dict[str, Any] = {
            "model": str(open_source(run, checkpoint).path),
            "dtype": dtype.value if dtype else None,
            "tokenizer": loaded.tokenizer.vocab_sha256,
        }
        if score:
            context, stride = window_sizes(loaded.model, context, stride)
            settings |= {"context": context, "stride": stride}
        else:
            settings |= asdict(sampling) | drawing
        with Output(output, settings, place.rank, place.world_size) as out:
            mine = share(lines, samples, out, place.rank, place.world_size)
            if score:
                records = _scores(loaded, [line for line, _ in mine.todo], context, stride)
            else:
                drawing |= {"batch_size": batch_size, "compile": compile}
                records = sample_prompts(loaded.model, loaded.tokenizer, mine.todo, sampling, **drawing)
            _write(out, records, mine)
    elif mode == _SCORE:
        context, stride = window_sizes(loaded.model, context, stride)
        found = score_text(loaded.model, loaded.tokenizer, text, context=context, stride=stride)
        print(
            f"{found.tokens} tokens, {found.text_bytes} bytes: loss {found.loss:.4f}, perplexity "
            f"{found.perplexity:.4g}, {found.bits_per_byte:.4f} bits per byte (context {context}, stride {stride})"
        )
    elif chat:
        conversation = Conversation(
            loaded.model, loaded.tokenizer, sampling, chat_template, max_tokens=max_tokens, compile=compile, **drawing
        )
        _talk(conversation)
    else:
        left = longest(loaded.model.config, len(encode_prompt(loaded.tokenizer, text)), max_tokens, slide)
        if left < max_tokens:
            print(f"note: the model's context ends after {left} new tokens", file=sys.stderr)
        drawing |= {"num_samples": samples, "max_new_tokens": max_tokens, "slide": slide, "compile": compile}
        _print_samples(text, generate_text(loaded.model, loaded.tokenizer, text, sampling, **drawing), samples)


def _mode(invocation: typer.Context, prompts: Path | None, output: Path | None, chat: bool, score: bool) -> str:
    """What the command is to do. Raises UsageError for options that do nothing then."""
    if chat and (prompts or score):
        raise UsageError(f"--chat and {'--prompts' if prompts else '--score'}: give one of them")
    if prompts and not output:
        raise UsageError("--prompts: needs --output, the file to write")
    mode = _CHAT if chat else (_SCORE_PROMPTS if score else _PROMPTS) if prompts else _SCORE if score else _TEXT
    for name, modes in _MODES_OF.items():
        source = invocation.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and mode not in modes:
            raise UsageError(f"--{name.replace('_', '-')}: does nothing with {mode}; it is for {' and '.join(modes)}")
    return mode


def _device(device: Device, place: ProcessEnvironment | None) -> str:
    """Of several processes of a node each has a GPU of its own."""
    if place and place.local_world_size > 1 and device is not Device.cpu and torch.cuda.is_available():
        index = place.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return f"cuda:{index}"
    return device.value


def _write(output: Output, records: Iterator[dict[str, Any]], mine: Share) -> None:
    for record in records:
        output.append(record)
    state = "complete" if output.merge(mine.keys) else "not complete yet: other processes have lines to do"
    print(f"{len(mine.todo)} of {len(mine.keys)} lines were to do here; {output.path} is {state}", file=sys.stderr)


def _scores(
    loaded: LoadedModel, prompts: list[Prompt], context: int | None, stride: int | None
) -> Iterator[dict[str, Any]]:
    context, stride = window_sizes(loaded.model, context, stride)
    for prompt in prompts:
        try:
            found = score_text(loaded.model, loaded.tokenizer, prompt.text, context=context, stride=stride)
        except UsageError as error:
            raise UsageError(f"prompt {prompt.id!r}: {error}") from None
        yield {"id": prompt.id, **_as_record(found)}


def _as_record(found: Score) -> dict[str, Any]:
    """Of JSON's types, which have no infinity."""
    values = asdict(found) | {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _talk(conversation: Conversation) -> None:
    """A line of standard input is what the user says; its end ends the conversation."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        try:
            for piece in conversation.say(line.removesuffix("\n")):
                print(piece, end="", flush=True)
            print()
        except UsageError as error:
            print(f"note: {error}", file=sys.stderr)


def _read_prompt(prompt: str | None, prompt_file: Path | None, whole: bool) -> str:
    """whole: with the last line end of a file."""
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
    return text if whole else text.removesuffix("\n").removesuffix("\r")


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
