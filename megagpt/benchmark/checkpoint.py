"""How fast checkpoints are saved, loaded and recut, by real engines of DeepSpeed on this machine's disk.

Ranks joined by gloo hold a GPT with random weights and do steps between the saves. A save and a load are compared with
a plain copy of the same files, each rank its own, fsynced, in turns. Before a load and the copy that it is compared
with, the files are dropped from the page cache: who resumes reads from the disk. Memory is the resident set, mapped
files included, beyond what a rank held with everything imported and its engine built.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megagpt.benchmark.fresh import call, forget_peak, joined, peak_bytes, resident_bytes
from megagpt.benchmark.targets import Target
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config.schema import ModelConfig, RunConfig
    from megagpt.data.loader import Batch
    from megagpt.training.checkpoint import CheckpointManifest
    from megagpt.training.engine import Engine
    from megagpt.training.saving import SavedCheckpoint

Result = dict[str, Any]
"""JSON types."""

RANKS, OTHER_RANKS = 2, 3
TARGETS = {
    "bandwidth": Target(0.7, "x a plain copy", at_least=True),
    "stall": Target(0.2, "x a synchronous save"),
    "seconds": Target(60.0, "s"),
    "memory": Target(2.0, "x the largest shard"),
}
BYTES_PER_PARAMETER = 14
"""Of a checkpoint: fp32 weights, two moments, bf16 weights."""
_PARTS = ("verified", "converted", "loaded")
_SEQ_LEN = 32
_BLOCK = 1 << 22
_MODULE = "megagpt.benchmark.checkpoint"


@dataclass(frozen=True)
class CheckpointBenchmark:
    """What all measurements are given."""

    folder: Path
    """Scratch space: six checkpoints."""
    parameters: int
    """Of the model, about."""
    repeats: int
    """Turns that count, after one that does not."""
    report: Callable[[str], None]
    """Is given a line about each result."""

    def run(self) -> Result:
        """All results; JSON types. UserError: the disk is too small, or a rank failed."""
        needed, free = 6 * BYTES_PER_PARAMETER * self.parameters, shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: {free / 1e9:.1f} GB are free, but {needed / 1e9:.1f} GB are needed; "
                "choose another --folder, or fewer --parameters"
            )
        arguments = {"folder": str(self.folder), "parameters": self.parameters, "repeats": self.repeats}
        saved = call(_MODULE, "save_and_load", arguments, ranks=RANKS)
        self.report(
            f"checkpoint of {saved['parameters']:,} parameters by {RANKS} ranks at ZeRO {saved['zero_stage']}: "
            f"{saved['bytes'] / 1e9:.2f} GB, up to {needed / 1e9:.1f} GB of disk in {self.folder}"
        )
        measured = self._bandwidths(saved) | self._stall(saved)
        changed = call(_MODULE, "change_ranks", {**arguments, "checkpoint": saved["checkpoint"]}, ranks=OTHER_RANKS)
        return {
            **{key: saved[key] for key in ("parameters", "zero_stage", "bytes", "largest_shard_bytes", "seconds")},
            "ranks": RANKS,
            **measured,
            "change_of_ranks": self._change(saved, changed),
        }

    def _bandwidths(self, saved: Result) -> Result:
        found: Result = {}
        for name, copy in (("save", "copy"), ("load", "copy from disk")):
            ours, theirs = saved["seconds"][name], saved["seconds"][copy]
            ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
            rates = [saved["bytes"] / statistics.median(times) for times in (ours, theirs)]
            more = f"{rates[0] / 1e9:.2f} against {rates[1] / 1e9:.2f} GB/s, {min(ratios):.2f} to {max(ratios):.2f}"
            figure = f"bandwidth of a {name}"
            judged = TARGETS["bandwidth"].judge(figure, statistics.median(ratios), self.report, more, ratios)
            found[name] = {"bytes_per_second": rates[0], "copy_bytes_per_second": rates[1], "ratio": judged}
        return found

    def _stall(self, saved: Result) -> Result:
        stalls, whole = saved["seconds"]["stall"], saved["seconds"]["save"]
        ratios = [stall / seconds for stall, seconds in zip(stalls, whole, strict=True)]
        more = (
            f"{statistics.median(stalls):.2f} of {statistics.median(whole):.2f} s; the first {saved['first_stall']:.2f}"
        )
        judged = TARGETS["stall"].judge(
            "stall of an asynchronous save", statistics.median(ratios), self.report, more, ratios
        )
        median_seconds = {"seconds": statistics.median(stalls), "synchronous_seconds": statistics.median(whole)}
        return {"stall": {"ratio": judged, **median_seconds, "first_seconds": saved["first_stall"]}}

    def _change(self, saved: Result, changed: Result) -> Result:
        seconds, memory, shard = changed["seconds"], changed["memory_bytes"], saved["largest_shard_bytes"]
        more = ", ".join(f"{part} in {seconds[part]:.1f}" for part in _PARTS)
        name = f"from {RANKS} to {OTHER_RANKS} ranks"
        judged = TARGETS["seconds"].judge(name, sum(seconds.values()), self.report, more)
        parts = ", ".join(f"{part} with {memory[part] / 1e6:,.0f}" for part in _PARTS)
        imports, held = changed["imports_bytes"], changed["held_bytes"]
        held = f"{imports / 1e6:,.0f} of imports and {(held - imports) / 1e6:,.0f} of the engine"
        more = f"{parts} MB beyond the {held}; the shard has {shard / 1e6:,.0f}"
        name = "  memory for it on the largest rank"
        largest = TARGETS["memory"].judge(name, max(memory.values()) / shard, self.report, more)
        return {"total_seconds": judged, "memory": largest, **changed}


def model_of(parameters: int) -> "ModelConfig":
    """A GPT of about so many parameters, almost half of them in the embedding of the vocabulary, as in small GPT-2s."""
    from megagpt.config.schema import ModelConfig

    hidden = 64 * max(1, round((parameters / 144) ** 0.5 / 64))
    vocab = max(256, min(50_257, int(0.45 * parameters / hidden)))
    layers = max(1, round((parameters - vocab * hidden) / (12 * hidden**2)))
    return ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        max_seq_len=_SEQ_LEN,
    )


# On the ranks


def save_and_load(arguments: Mapping[str, Any]) -> Result:
    """Take turns at copying, saving (waiting, then while steps go on), copying from the disk and loading."""
    with joined() as rank:
        ranks = _Ranks(arguments, rank)
        ranks.turn()
        first_stall, ranks.seconds = ranks.seconds["stall"][0], {}
        for _ in range(arguments["repeats"]):
            ranks.turn()
        checkpoint = ranks.saved.path
        return {
            "checkpoint": str(checkpoint),
            "parameters": sum(parameter.numel() for parameter in ranks.engine.module.parameters()),
            "zero_stage": ranks.engine.zero_stage,
            "bytes": ranks.saved.size,
            "largest_shard_bytes": max(file.stat().st_size for file in (checkpoint / "deepspeed").iterdir()),
            "seconds": ranks.seconds,
            "first_stall": first_stall,
        }


def change_ranks(arguments: Mapping[str, Any]) -> Result:
    """Verify, convert and load a checkpoint of another number of ranks, as a run does that resumes from it."""
    with joined() as rank:
        import torch
        import torch.distributed as dist
        from rich.console import Console

        from megagpt.training.checkpoint import verify_checksums
        from megagpt.training.universal_loading import convert_together

        imports = resident_bytes()
        engine, _ = _engine(arguments["parameters"])
        checkpoint, folder = Path(arguments["checkpoint"]), Path(arguments["folder"]) / "checkpoints"
        for file in _files(checkpoint):
            _drop_from_cache(file)
        held, memory, marks = resident_bytes(), [], [_now()]

        def mark() -> None:
            marks.append(_now())
            memory.append(peak_bytes() - held)
            forget_peak()

        forget_peak()
        verify_checksums(checkpoint, rank, dist.get_world_size())
        mark()
        form = convert_together(checkpoint, folder, Console(quiet=True))
        mark()
        engine.load_universal(form)
        mark()
        largest = torch.tensor([*memory, held, imports])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return {
            "seconds": dict(zip(_PARTS, (after - before for before, after in pairwise(marks)), strict=True)),
            "memory_bytes": dict(zip(_PARTS, largest.tolist(), strict=False)),
            "held_bytes": int(largest[-2]),
            "imports_bytes": int(largest[-1]),
        }


class _Ranks:
    """One rank of those that save."""

    def __init__(self, arguments: Mapping[str, Any], rank: int) -> None:
        from megagpt.training.saving import CheckpointWriter

        self.rank, self.folder = rank, Path(arguments["folder"])
        self.copies = self.folder / f"copies_{rank}"
        self.copies.mkdir()
        self.engine, self.config = _engine(arguments["parameters"])
        self.batches = _batches(self.config, self.engine)
        self.writer = CheckpointWriter(self.folder / "checkpoints", self.config.checkpoint.keep)
        self.step = 0
        self.seconds: dict[str, list[float]] = {}
        self._train()
        self.saved = self._save(snapshot=False)

    def turn(self) -> None:
        """Everything once."""
        self._train()
        self._timed("copy", self._copy)
        self._forget_copies()
        self._train()
        self._note("save", self._save(snapshot=False).seconds)
        self._train()
        self.saved = self._save(snapshot=True)
        self._note("stall", self.saved.stall_seconds)
        self._drop()
        self._timed("copy from disk", self._copy)
        self._forget_copies()
        self._drop()
        self._timed("load", self._load)

    def _timed(self, name: str, function: Callable[[], None]) -> None:
        """On all ranks, from the moment that all begin to that when all are done."""
        started = _now()
        function()
        self._note(name, _now() - started)

    def _note(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def _train(self) -> None:
        self.engine.step(self.batches, 1e-4).read()
        self.step += 1

    def _save(self, snapshot: bool) -> "SavedCheckpoint":
        """Asynchronously: with steps until all have written, as a run does."""
        import torch
        import torch.distributed as dist

        _now()
        self.writer.begin(self._manifest(), lambda folder: self.engine.save(folder, snapshot))
        busy = torch.tensor([int(snapshot)])
        while busy:
            self._train()
            busy = torch.tensor([int(self.writer.busy)])
            dist.all_reduce(busy)
        return self.writer.finish(lambda: None)

    def _copy(self) -> None:
        """This rank's share of the files, kept until all are done, as those of a checkpoint are."""
        for number, file in enumerate(_files(self.saved.path)[self.rank :: RANKS]):
            with open(file, "rb") as source, open(self.copies / str(number), "wb") as copy:
                shutil.copyfileobj(source, copy, _BLOCK)
                copy.flush()
                os.fsync(copy.fileno())

    def _forget_copies(self) -> None:
        for copy in self.copies.iterdir():
            copy.unlink()

    def _drop(self) -> None:
        for file in _files(self.saved.path):
            _drop_from_cache(file)
        _now()

    def _load(self) -> None:
        from megagpt.training.checkpoint import verify_checksums
        from megagpt.training.saving import restore_random_states

        verify_checksums(self.saved.path, self.rank, RANKS)
        self.engine.load(self.saved.path)
        restore_random_states(self.saved.path, self.rank)

    def _manifest(self) -> "CheckpointManifest":
        from megagpt.data.history import BlendedDataset, BlendHistory, DatasetIdentity, Segment
        from megagpt.training.checkpoint import CheckpointManifest
        from megagpt.training.horizon import Horizon
        from megagpt.training.schedule import Schedule

        config = self.config
        identity = DatasetIdentity(documents=1, sequences=1, tokens=_SEQ_LEN + 1, dtype="uint16", edge_hash="")
        dataset = BlendedDataset(name="none", weight=1.0, identity=identity)
        segment = Segment(start=0, seq_len=_SEQ_LEN, tokenizer=None, datasets=[dataset])
        return CheckpointManifest(
            step=self.step,
            consumed_samples=self.step * config.train.global_batch_size,
            consumed_tokens=self.step * config.train.global_batch_size * _SEQ_LEN,
            world_size=RANKS,
            zero_stage=self.engine.zero_stage,
            precision=config.train.precision,
            global_batch_size=config.train.global_batch_size,
            seed=config.train.seed,
            seq_len=_SEQ_LEN,
            document_mask=False,
            no_decay=sorted(config.optimizer.no_decay),
            schedule=Schedule.of(config, Horizon(1, _SEQ_LEN)),
            data=BlendHistory(seed=0, segments=[segment]),
            model=config.model.model_dump(),
        )


def _engine(parameters: int) -> "tuple[Engine, RunConfig]":
    """An engine as a run of default settings builds it, uncompiled, with as few tokens a step as the ranks allow."""
    import torch
    import torch.distributed as dist

    from megagpt.config.schema import RunConfig
    from megagpt.training.engine import Engine

    config = RunConfig.model_validate(
        {
            "model": model_of(parameters),
            "data": {"train": [{"path": "none"}]},
            "train": {
                "global_batch_size": RANKS * OTHER_RANKS,
                "device": "cpu",
                "precision": "bf16",
                "compile": False,
            },
        }
    )
    share = config.train.global_batch_size // dist.get_world_size()
    return Engine(config, share, 1, torch.device("cpu")), config


def _batches(config: "RunConfig", engine: "Engine") -> "list[Batch]":
    import torch

    from megagpt.data.loader import Batch

    tokens = torch.randint(config.model.vocab_size, (engine.micro_batch_size, _SEQ_LEN + 1))
    return [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]


def _files(checkpoint: Path) -> list[Path]:
    """The checkpoint's files, of the larger ones each rank's beside another's."""
    return sorted((file for file in checkpoint.rglob("*") if file.is_file()), key=lambda file: -file.stat().st_size)


def _drop_from_cache(file: Path) -> None:
    """Let the kernel forget the content of a file that is on the disk."""
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _now() -> float:
    """Once all ranks are here."""
    import torch.distributed as dist

    dist.barrier()
    return time.perf_counter()
