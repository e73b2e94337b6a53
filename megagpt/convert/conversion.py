"""A model from one format into another: refused before any work, streamed, verified, and only then in its place.

Peak memory is a few times the largest tensor, however large the model and its files.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megagpt.config.compatibility import weight_differences
from megagpt.config.schema import ModelConfig
from megagpt.config.yaml12 import dump
from megagpt.convert import huggingface, nanogpt, verify
from megagpt.convert.source import TOKENIZER, Source, huggingface_files, open_source, special_ids, tokenizer_of
from megagpt.convert.streamed import Logits, gpt_logits, require_transformers, transformers_logits
from megagpt.convert.tokenizers import FILES, describe, write_tokenizer
from megagpt.convert.verify import Difference
from megagpt.convert.writing import Report, new_folder, write_json, write_shards
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.training.weights import Weight, Weights

NO_TOKENIZER = "none"

Progress = Callable[[str, int], contextlib.AbstractContextManager[Report]]
"""Opens the progress of a part of the work, by its name and its bytes."""


@dataclass(frozen=True)
class Options:
    """How to convert."""

    dtype: torch.dtype | None = None
    """Type of the weights; None: each as it is stored."""
    max_shard_bytes: int = 5 * 10**9
    """Largest file, unless a single tensor is larger."""
    tolerance: float = verify.TOLERANCE
    """See megagpt.convert.verify."""
    verifies: bool = True
    """Whether to compare what was written with the source."""
    tokenizer: str | None = None
    """Name or file of the tokenizer, instead of the model's own; NO_TOKENIZER: none."""
    vocab_dir: Path | None = None
    """Where to look first for vocabulary files."""


class Conversion(NamedTuple):
    """What was done."""

    source: Source
    model: ModelConfig
    """As the target holds it."""
    tensors: int
    nbytes: int
    tokenizer: str | None
    """Name of the tokenizer that was written; None: none was."""
    difference: Difference | None
    """Of the logits; None: not verified."""
    rounding: Difference | None
    """Of the logits from those of the source, if its weights were rounded."""
    real_tokens: bool
    """Whether the logits were compared on text, too."""


class Vocabulary(NamedTuple):
    """What there is of the source's tokenizer."""

    tokenizer: Tokenizer | None
    files: Path | None
    """Folder of Hugging Face's files of it."""


class Target(NamedTuple):
    """A format that can be written."""

    expressed: Callable[[ModelConfig, Weights], tuple[ModelConfig, Weights]]
    """The same model as the format can hold it; raises UsageError if it cannot."""
    write: Callable[[Path, ModelConfig, Weights, Vocabulary, Options, Report], str | None]
    """Fills a folder; the name of the tokenizer that it wrote."""


def convert(path: Path, target: Path, kind: str, options: Options, progress: Progress) -> Conversion:
    """Write the model at `path` into the new folder `target`, in the format `kind`, a key of TARGETS.

    Raises UsageError for what the format cannot express, before any work; UserError for what is damaged, does not fit,
    or fails the verification. Then nothing is left at `target`.
    """
    if options.verifies and kind == "hf":
        require_transformers()
    with new_folder(target) as folder:
        source = open_source(path)
        model, stored = TARGETS[kind].expressed(source.model, source.weights)
        weights = stored if options.dtype is None else _cast(stored, options.dtype)
        vocabulary = _vocabulary(source, options)
        original = _logits_of_source(source) if options.verifies else None
        nbytes = sum(weight.nbytes for weight in weights.values())
        with progress("writing", nbytes) as report:
            tokenizer = TARGETS[kind].write(folder, model, weights, vocabulary, options, report)
        done = Conversion(source, model, len(weights), nbytes, tokenizer, None, None, False)
        if original is None:
            return done
        written = open_source(folder)
        if different := weight_differences(model, written.model):
            raise UserError(f"verification failed: the configuration that was written has other {', '.join(different)}")
        with progress("comparing weights", nbytes) as report:
            verify.compare_weights(weights, written.weights, report)
        rounded = any(weight.dtype != stored[name].dtype for name, weight in weights.items())
        tokens = verify.sample_tokens(model, vocabulary.tokenizer)
        with progress("comparing logits", (3 if rounded else 2) * len(tokens)) as report:
            expected = _logits(original, tokens, report)
            found = _logits(_logits_of_source(written), tokens, report)
            reference = _logits(gpt_logits(model, weights), tokens, report) if rounded else expected
        difference = verify.compare_logits(reference, found)
        verify.check(difference, options.tolerance)
        rounding = verify.compare_logits(expected, found) if rounded else None
        return done._replace(difference=difference, rounding=rounding, real_tokens=len(tokens) > 1)


def _logits(logits: Logits, tokens: list[torch.Tensor], report: Report) -> list[torch.Tensor]:
    """Of each sequence (1, seq)."""
    found = []
    for ids in tokens:
        found.append(logits(ids))
        report(1)
    return found


def _logits_of_source(source: Source) -> Logits:
    """By the code that the format belongs to."""
    return transformers_logits(source.path) if source.kind == "hf" else gpt_logits(source.model, source.weights)


def _cast(weights: Weights, dtype: torch.dtype) -> dict[str, Weight]:
    """The same weights, in `dtype` when they are read. Reading raises UserError for a value too large for it."""

    def read(name: str, weight: Weight) -> torch.Tensor:
        value = weight.read()
        found = value.to(dtype)
        if not torch.isfinite(found).all() and torch.isfinite(value).all():
            raise UserError(
                f"weight {name} reaches {value.abs().max():.3g}, too large for {dtype}; choose bf16 or fp32"
            )
        return found

    return {name: Weight(weight.shape, dtype, partial(read, name, weight)) for name, weight in weights.items()}


def _vocabulary(source: Source, options: Options) -> Vocabulary:
    if options.tokenizer == NO_TOKENIZER:
        return Vocabulary(None, None)
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer, options.vocab_dir)
        if tokenizer.vocab_size > source.model.vocab_size:
            raise UsageError(
                f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model of {source.path} knows "
                f"{source.model.vocab_size}; give the tokenizer of its training data"
            )
        return Vocabulary(tokenizer, None)
    return Vocabulary(tokenizer_of(source, options.vocab_dir), huggingface_files(source))


def _write_megagpt(
    folder: Path, model: ModelConfig, weights: Weights, vocabulary: Vocabulary, options: Options, report: Report
) -> str | None:
    (folder / "config.yaml").write_text(dump({"model": model.model_dump()}), encoding="utf-8")
    write_shards(folder, weights, options.max_shard_bytes, report)
    info = describe(vocabulary.tokenizer, folder) if vocabulary.tokenizer else None
    if info:
        (folder / TOKENIZER).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return info.name
    return _copy_files(vocabulary.files, folder)


def _write_huggingface(
    folder: Path, model: ModelConfig, weights: Weights, vocabulary: Vocabulary, options: Options, report: Report
) -> str | None:
    tokenizer = vocabulary.tokenizer
    ids: Mapping[str, Any] = {}
    if vocabulary.files:
        ids, name = special_ids(vocabulary.files), _copy_files(vocabulary.files, folder)
    elif tokenizer:
        ids, name = {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id}, tokenizer.name
        write_tokenizer(tokenizer, folder, model.max_seq_len)
    else:
        name = None
    dtypes = {weight.dtype for weight in weights.values()}
    config = huggingface.config_of(model, dtypes.pop() if len(dtypes) == 1 else torch.float32, ids)
    write_json(folder / huggingface.CONFIG, config)
    if not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", dict(ids))
    write_shards(folder, huggingface.foreign_weights(model, weights), options.max_shard_bytes, report)
    return name


def _write_nanogpt(
    folder: Path, model: ModelConfig, weights: Weights, vocabulary: Vocabulary, options: Options, report: Report
) -> str | None:
    nanogpt.write_file(folder / nanogpt.FILE, model, weights, report)
    return None


def _copy_files(files: Path | None, folder: Path) -> str | None:
    """Hugging Face's tokenizer files as they are, and what ends a text."""
    found = [files / name for name in FILES if (files / name).is_file()] if files else []
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if files and (ids := special_ids(files)) and not (folder / "generation_config.json").exists():
        write_json(folder / "generation_config.json", ids)
    return "Hugging Face's files" if any(path.name != "generation_config.json" for path in found) else None


TARGETS = {
    "hf": Target(huggingface.expressed, _write_huggingface),
    "nanogpt": Target(nanogpt.expressed, _write_nanogpt),
    "megagpt": Target(lambda model, weights: (model, weights), _write_megagpt),
}
