"""python -m tools.quickstart: the whole path, from text that is already on this machine to samples of an own GPT.

Every step is one of the commands that a user types for a corpus of his own, printed before it runs; what is finished
is not done again. The corpus is what every Python installation carries: the standard library's sources (without its
tests) and the documentation topics of pydoc.
"""

import math
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megagpt.config import load_config
from megagpt.corpus.sample_text import library_sources
from megagpt.data.unigram import unigram_loss
from megagpt.errors import UserError
from megagpt.training.metrics import read_metrics
from megagpt.training.plots import plot_losses
from tools.command import run_command, single_command

PROGRAM = "python -m tools.quickstart"
CONFIG = "configs/quickstart.yaml"
DATA, RUN_DIR = Path("data/quickstart"), Path("runs/quickstart")
PROMPTS = ("def", "import os\nimport", "The Python")

console = Console(highlight=False, soft_wrap=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder for the corpus and the token dataset.")] = DATA,
    run_dir: Annotated[Path, typer.Option(help="Folder of the run.")] = RUN_DIR,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
) -> None:
    """Build a corpus from this machine's Python, train a tokenizer and a small GPT on it, and sample from it.

    Example: python -m tools.quickstart --steps 1000
    """
    report = Table("step", "took", "what came out", box=None, pad_edge=False, header_style="bold")
    for name, action in (
        ("corpus", lambda: write_corpus(data / "corpus")),
        ("tokenizer", lambda: train_tokenizer(data)),
        ("preprocess", lambda: preprocess(data)),
        ("train", lambda: train(data, run_dir, steps)),
        ("evaluate", lambda: evaluate(data, run_dir)),
        ("sample", lambda: sample(run_dir)),
    ):
        console.rule(f"[bold]{name}", align="left")
        started = time.perf_counter()
        outcome = action()
        report.add_row(name, f"{time.perf_counter() - started:.1f} s", outcome)
    console.rule("[bold]done", align="left")
    console.print(report)
    console.print(next_steps(data, run_dir, steps))


def write_corpus(folder: Path) -> str:
    """Copy the text that Python carries into `folder`, under the names it has there."""
    if not folder.exists():
        aside = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(aside, ignore_errors=True)
        library = Path(sysconfig.get_path("stdlib"))
        for source in library_sources():
            name = source.relative_to(library)
            target = aside / "library" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        from pydoc_data.topics import topics

        (aside / "topics").mkdir()
        for topic, text in topics.items():
            (aside / "topics" / f"{topic}.txt").write_text(text, encoding="utf-8")
        aside.rename(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    return f"{folder}: {len(files):,} files, {size:.1f} MB of Python {sys.version.split()[0]}'s own text"


def train_tokenizer(data: Path) -> str:
    """An own byte-pair encoding with as many entries as the model's vocabulary."""
    vocab_size, target = load_config(CONFIG).model.vocab_size, data / "tokenizer.tiktoken"
    if not target.exists():
        command("tools.train_tokenizer", "--input", data / "corpus", "--vocab-size", vocab_size, "--output", target)
    return f"{target}: {vocab_size:,} entries"


def preprocess(data: Path) -> str:
    """Clean, deduplicate, tokenize, shuffle, split."""
    command(
        *("tools.preprocess", "--input", data / "corpus", "--output", data / "tokens"),
        *("--tokenizer", data / "tokenizer.tiktoken", "--workers", len(os.sched_getaffinity(0))),
        *("--dedup", "minhash", "--validation-fraction", 0.05),
    )
    return f"{data / 'tokens'}: train and validation tokens, report.html"


def train(data: Path, run_dir: Path, steps: int) -> str:
    """Two processes on CPUs; all GPUs where there are some."""
    import torch

    use_cuda = torch.cuda.is_available()
    processes = torch.cuda.device_count() if use_cuda else 2
    precision = "fp16" if use_cuda and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"
    batch = load_config(CONFIG).train.global_batch_size
    command(
        *("torch.distributed.run", "--standalone", "--nproc-per-node", processes),
        *("-m", "launch.train", CONFIG, f"train.steps={steps}", f"train.run_dir={run_dir}"),
        *(f"data.train.0.path={data / 'tokens' / 'train'}", f"data.validation.0.path={data / 'tokens' / 'validation'}"),
        *(f"train.global_batch_size={math.lcm(batch, processes)}", f"train.precision={precision}"),
        threads=max(1, len(os.sched_getaffinity(0)) // processes),
    )
    return f"{run_dir}: config.yaml, metrics.jsonl, checkpoints/"


def evaluate(data: Path, run_dir: Path) -> str:
    """The model's validation loss beside that of the best model that looks at no context."""
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["kind"] == "validation"]
    loss = records[-1]["loss"]
    baseline = unigram_loss(
        data / "tokens" / "train", data / "tokens" / "validation", load_config(CONFIG).model.vocab_size
    )
    plot = plot_losses(run_dir, {"unigram model": baseline})
    console.print(f"validation loss {loss:.3f} (perplexity {math.exp(loss):.1f}) after {records[-1]['step']} steps")
    console.print(f"unigram model   {baseline:.3f} (perplexity {math.exp(baseline):.1f}) on the same tokens")
    if loss >= baseline:
        raise UserError(f"the model's validation loss {loss:.3f} is not below the unigram model's {baseline:.3f}")
    return f"validation loss {loss:.3f} against {baseline:.3f} of a unigram model; {plot}"


def sample(run_dir: Path) -> str:
    """Three continuations."""
    for prompt in PROMPTS:
        command("tools.generate", run_dir, "--prompt", prompt, "--max-tokens", 60, "--temperature", 0.7, "--seed", 1)
    return f"{len(PROMPTS)} continuations, above"


def command(*arguments: object, threads: int | None = None) -> None:
    """Show a command and run it; its failure ends the quickstart with one line. threads: of each of its processes."""
    words = [str(argument) for argument in arguments]
    shown = " ".join(repr(word) if set(word) & set(" \n'\"*") else word for word in words)
    console.print(f"$ python -m {shown}", style="dim", markup=False)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    code = subprocess.run([sys.executable, "-m", *words], check=False, env=environment).returncode
    if code:
        raise UserError(f"`python -m {words[0]}` failed with exit code {code}; its own message is above")


def next_steps(data: Path, run_dir: Path, steps: int) -> str:
    """What to try now."""
    chosen = {"--data": (data, DATA), "--run-dir": (run_dir, RUN_DIR)}
    options = "".join(f" {option} {value}" for option, (value, default) in chosen.items() if value != default)
    return f"""
Next:
  look      {data / "tokens" / "report.html"} (what preprocessing did), {run_dir / "loss.png"} (the loss curve)
  sample    python -m tools.generate {run_dir} --prompt "class" --samples 3
  go on     {PROGRAM}{options} --steps {2 * steps}
  own text  python -m tools.preprocess --input 'my/texts/*.jsonl' --output data/corpus --tokenizer gpt2
  train     torchrun --nproc-per-node 2 -m launch.train configs/small.yaml"""


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
