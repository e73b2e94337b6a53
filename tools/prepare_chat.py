"""python -m tools.prepare_chat: conversations to a token dataset of which a model learns what the assistant says."""

from typing import Annotated, Any

if __name__ == "__main__":
    from tools.interrupt import end_at_once_on_interrupt

    end_at_once_on_interrupt()

import typer
from rich.console import Console

from megagpt.config.loading import load_section
from megagpt.corpus.chat import ChatConfig, ChatReport, prepare_chat
from megagpt.corpus.display import display
from megagpt.corpus.quarantine import QUARANTINE_NAME
from megagpt.corpus.sources import one_line
from tools.command import end_when_asked_to, run_command, single_command

NAME = "python -m tools.prepare_chat"


def prepare_chat_command(
    input: Annotated[list[str], typer.Option(help="File, folder, quoted pattern or @LIST of .jsonl; may be repeated.")],
    output: Annotated[str, typer.Option(help="Folder of the token dataset; appears when complete.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="MORE", help="More inputs, as a shell expands a pattern to.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="That of the model: encoding, bytes, or a file. [default: gpt2]")
    ] = None,
    vocab_dir: Annotated[
        str | None, typer.Option(envvar="MEGAGPT_VOCAB_DIR", help="Where to look for vocabulary files first.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="chatml|plain|FILE", help="Form of a conversation. [default: chatml]")
    ] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Share of conversations. [default: 0.01]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split. [default: 0]")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longer conversations are left out. [default: no limit]")
    ] = None,
    max_bad: Annotated[float | None, typer.Option(help="Share of bad lines. [default: 0.01]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing dataset.")] = False,
) -> None:
    """Turn conversations into a token dataset of which a model learns what the assistant says.

    Each line of .jsonl (or .jsonl.gz, .zst, .bz2, .xz) is {"messages": [{"role": "system|user|assistant", "content":
    "..."}, ...]} or {"prompt": "...", "response": "..."}, with "completion" for "response". FILE is a Jinja template
    that encloses what is learned in {% generation %} and {% endgeneration %}.

    Example: python -m tools.prepare_chat --input 'chats/*.jsonl' --output data/sft --tokenizer gpt2
    """
    options: dict[str, Any] = {
        "input": [*input, *(more or [])],
        "output": output,
        "tokenizer": tokenizer,
        "vocab_dir": vocab_dir,
        "template": template,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "max_tokens": max_tokens,
        "max_bad": max_bad,
    }
    overrides = [(key, value) for key, value in options.items() if value is not None]
    end_when_asked_to("terminated; nothing was made")
    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    config = load_section(ChatConfig, None, overrides)
    with display(console) as observe:
        report = prepare_chat(config, observe, overwrite)
    _print_summary(console, report)


def _print_summary(console: Console, report: ChatReport) -> None:
    output, counts = one_line(report.output), report.counts
    if report.was_finished:
        console.print(f"{output}: already finished by an earlier run with the same input and options; nothing to do")
    console.print(f"{'conversations':<16}{counts['conversations']:>14,}")
    if counts["too_long"]:
        console.print(f"{'too long':<16}{counts['too_long']:>14,} left out, with more tokens than --max-tokens")
    for name, split in report.splits.items():
        learned = counts[f"learned_tokens_{name}"]
        share = f"{learned:>16,} learned ({learned / split.tokens:.1%})"
        console.print(f"{name:<16}{split.documents:>14,} documents {split.tokens:>16,} tokens {share}")
    if counts["bad"] or counts["harmless"]:
        console.print(
            f"left out: {counts['bad']:,} bad lines, {counts['harmless']:,} empty or no text: see {QUARANTINE_NAME} in "
            f"{output}"
        )
    if not report.was_finished:
        console.print(f"{report.seconds:.1f} s; written: {output}")


app = single_command(prepare_chat_command, NAME)

if __name__ == "__main__":
    run_command(app, NAME)
