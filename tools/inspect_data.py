"""python -m tools.inspect_data: what is in a token dataset, and whether it is whole."""

import itertools
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from megagpt.corpus.fate import Fate, Kept, Removed, find_fates
from megagpt.corpus.sources import one_line
from megagpt.data.indexed import IndexedDataset, bin_path, idx_path, mask_path
from megagpt.data.manifest import Manifest
from megagpt.data.origins import SOURCES_NAME, ids_path, largest_file, open_ids, sources
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from tools.command import run_command, single_command

PROGRAM = "python -m tools.inspect_data"
SAMPLED_DOCUMENTS = 10_000_000  # lengths of more documents than these are summarised from evenly spaced ones


def main(
    dataset: Annotated[Path, typer.Argument(help="Prefix of a dataset's .bin and .idx, or a folder of datasets.")],
    document: Annotated[
        list[int] | None, typer.Option(help="Number of a document to show, from 0; repeatable.")
    ] = None,
    find: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            help="Tell what became of a document: FILE:POSITION, the file by line or name of "
            "sources.jsonl; repeatable.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to show of a document.")] = 200,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer to decode with, instead of the one that the manifest names.")
    ] = None,
    vocab_dir: Annotated[
        Path | None, typer.Option(envvar="MEGAGPT_VOCAB_DIR", help="Folder of vocabulary files.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything: every entry, id and checksum.")] = False,
) -> None:
    """Show counts, document lengths, origin and single documents of a token dataset; with --verify check it whole.

    Example: python -m tools.inspect_data data/corpus/train --document 0 --document 7 --verify

    With --find tell what became of documents of the input: kept and where, removed and why, or unreadable. An ID is as
    in removed.jsonl.zst, or has the file's name: python -m tools.inspect_data data/corpus --find 0:0 --find a.jsonl:71
    """
    if find:
        _print_fates(_folder(dataset), find, tokens, tokenizer, vocab_dir)
        if not document and not verify:
            return
    opened = [IndexedDataset(prefix) for prefix in _prefixes(dataset)]
    _check_documents(opened, document or [])
    manifests = [Manifest.of(one) for one in opened]
    if verify and (manifest := next(filter(None, manifests), None)):
        manifest.verify_files(Path(opened[0].prefix).parent)
    for one, manifest in zip(opened, manifests, strict=True):
        print(one_line(one.prefix))
        if verify:
            _verify(one, manifest)
        _print_counts(one)
        if manifest:
            _print_origin(manifest)
        if document:
            _print_documents(one, document, tokens, _find_tokenizer(one, manifest, tokenizer, vocab_dir))


def _folder(dataset: Path) -> Path:
    return dataset if dataset.is_dir() else dataset.parent


def _print_fates(folder: Path, names: list[str], limit: int, tokenizer: str | None, vocab_dir: Path | None) -> None:
    """Say what became of the documents. UserError: the run met no document of one of these names."""
    unknown = []
    for name, fate in zip(names, find_fates(folder, names), strict=True):
        if fate.outcome is None:
            unknown.append(name)
            continue
        print(f"{fate.id} ({one_line(fate.file)}): {_outcome(fate)}")
        if isinstance(fate.outcome, Kept):
            dataset = IndexedDataset(fate.outcome.prefix)
            found = _find_tokenizer(dataset, Manifest.of(dataset), tokenizer, vocab_dir)
            _print_tokens(dataset, fate.outcome.number, limit, found)
    if unknown:
        raise UserError(
            f"--find {', '.join(unknown)}: no document began there; a position is the byte, or in columnar files the "
            "row, at which one begins"
        )


def _outcome(fate: Fate) -> str:
    outcome = fate.outcome
    if isinstance(outcome, Kept):
        return f"kept, {_where(outcome)}"
    if isinstance(outcome, Removed):
        words = f"removed by stage {outcome.stage}: {outcome.reason}"
        if outcome.detail:
            words += f" ({outcome.detail})"
        if outcome.survivor:
            words += f"; in its stead stays {outcome.survivor} ({one_line(outcome.survivor_file)})"
            words += f", {_where(outcome.kept)}" if outcome.kept else ""
            words += f", similarity {outcome.similarity}"
        return words
    assert outcome is not None
    detail = f" ({outcome.detail})" if outcome.detail else ""
    return f"could not be read: {outcome.reason}{detail}, {outcome.place}"


def _where(kept: Kept) -> str:
    return f"document {kept.number:,} of {Path(kept.prefix).name}"


def _check_documents(datasets: list[IndexedDataset], numbers: list[int]) -> None:
    largest = max(datasets, key=lambda dataset: dataset.num_documents)
    for number in numbers:
        if not 0 <= number < largest.num_documents:
            raise UsageError(
                f"--document {number}: {largest.prefix} has {largest.num_documents} documents, numbered from 0"
            )


def _prefixes(path: Path) -> list[Path]:
    """The datasets that `path` names: all of a folder, or the one of that prefix (or of its .bin or .idx)."""
    if not path.is_dir():
        return [path.with_suffix("") if path.suffix in (".bin", ".idx") else path]
    prefixes = sorted(index.with_suffix("") for index in path.glob("*.idx"))
    if not prefixes:
        raise UserError(f"{path}: no .idx file in this folder; name a dataset's folder or its prefix")
    return prefixes


def _print_counts(dataset: IndexedDataset) -> None:
    paths = (bin_path, idx_path) if dataset.loss_mask is None else (bin_path, idx_path, mask_path)
    size = sum(path(dataset.prefix).stat().st_size for path in paths)
    print(
        f"  {dataset.num_documents:,} documents, {len(dataset):,} sequences, {dataset.num_tokens:,} tokens "
        f"({dataset.dtype}), {size:,} bytes"
    )
    step = max(1, dataset.num_documents // SAMPLED_DOCUMENTS)
    sample = np.arange(0, dataset.num_documents, step)
    if sample.size:
        lengths = dataset.document_starts(sample + 1) - dataset.document_starts(sample)
        if lengths.min() < 0:
            raise UserError(
                f"{idx_path(dataset.prefix)}: document {sample[lengths.argmin()]} ends before it begins; the index is "
                "damaged, copy it again"
            )
        levels = {"shortest": 0, "10%": 10, "median": 50, "90%": 90, "99%": 99, "longest": 100}
        values = np.percentile(lengths, list(levels.values()), method="lower")
        summary = ", ".join(f"{name} {value:,}" for name, value in zip(levels, values, strict=True))
        print(f"  tokens a document: {summary}, mean {lengths.mean():,.1f}" + f" (every {step}th)" * (step > 1))


def _print_origin(manifest: Manifest) -> None:
    tokenizer = manifest.tokenizer
    print(
        f"  tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}, "
        f"sha256 {tokenizer.vocab_sha256}"
    )
    for title, values in (("counts", manifest.counts), ("config", manifest.config), ("versions", manifest.versions)):
        if values:
            print(f"  {title}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if manifest.plan_hash:
        print(f"  plan: {manifest.plan_hash}")


def _verify(dataset: IndexedDataset, manifest: Manifest | None) -> None:
    smallest, largest = dataset.verify()
    print(f"  verified: every index entry; token ids are {smallest} to {largest}")
    if dataset.loss_mask is not None:
        print(f"  verified: loss mask; {_learned(dataset.count_learned(), dataset.num_tokens)}")
    if (ids := open_ids(dataset.prefix, dataset.num_documents)) is not None:
        count = sum(1 for _ in sources(Path(dataset.prefix).parent))
        if (file := largest_file(ids)) >= count:
            raise UserError(
                f"{ids_path(dataset.prefix)}: names file {file}, but {SOURCES_NAME} beside it lists {count}; copy the "
                "whole dataset again"
            )
        print(f"  verified: every document has an id, and its file is one of {count:,}")
    if manifest is None:
        print("  no manifest describes this dataset: no checksums to compare")
        return
    if smallest < 0 or largest >= manifest.tokenizer.vocab_size:
        raise UserError(
            f"{bin_path(dataset.prefix)}: token ids {smallest} to {largest}, but tokenizer {manifest.tokenizer.name} "
            f"has {manifest.tokenizer.vocab_size}; make the dataset anew"
        )
    print("  verified: ids fit the tokenizer, all files of the folder agree with the manifest's checksums")


def _find_tokenizer(
    dataset: IndexedDataset, manifest: Manifest | None, name: str | None, vocab_dir: Path | None
) -> Tokenizer | None:
    if name:
        return load_tokenizer(name, vocab_dir)
    return manifest.load_tokenizer(Path(dataset.prefix).parent, vocab_dir) if manifest else None


def _print_documents(dataset: IndexedDataset, numbers: list[int], limit: int, tokenizer: Tokenizer | None) -> None:
    for number in numbers:
        if number >= dataset.num_documents:
            print(f"  document {number}: not here, there are {dataset.num_documents:,}, numbered from 0")
            continue
        _print_tokens(dataset, number, limit, tokenizer, _origin(dataset, number))


def _print_tokens(
    dataset: IndexedDataset, number: int, limit: int, tokenizer: Tokenizer | None, origin: str = ""
) -> None:
    tokens = dataset.document(number)
    shown = tokens[:limit]
    size = f"{len(tokens):,} tokens"
    if (mask := dataset.document_loss_mask(number)) is not None:
        size += f", {_learned(int(np.count_nonzero(mask)), len(tokens))}"
    size += f", the first {limit}:" * (len(tokens) > limit)
    print(f"  document {number}{origin}: {size}")
    print(tokenizer.decode(shown) if tokenizer else " ".join(map(str, shown.tolist())))


def _learned(learned: int, tokens: int) -> str:
    return f"{learned:,} learned, {tokens - learned:,} masked"


def _origin(dataset: IndexedDataset, number: int) -> str:
    ids = open_ids(dataset.prefix, dataset.num_documents)
    if ids is None:
        return ""
    file, position = ids[number].tolist()
    name = next(itertools.islice(sources(Path(dataset.prefix).parent), file, None), "a file that is not listed")
    return f" (id {file}:{position}, {one_line(name)})"


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
