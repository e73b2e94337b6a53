"""manifest.json: how the token dataset beside it was made, and what its files must contain.

One manifest describes one folder: all its splits (train, validation, ...), the tokenizer they share, the whole
configuration that made them and a checksum of every file. Datasets of other programs have none.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagpt.data.atomic import replace_file
from megagpt.data.indexed import IndexedDataset, idx_path, mask_path
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer

FILE_NAME = "manifest.json"
FORMAT_VERSION: Literal[1] = 1


class _Record(BaseModel):
    """Common behaviour: immutable; keys that a later program added are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class TokenizerInfo(_Record):
    """The tokenizer that made the tokens."""

    name: str
    """What `load_tokenizer` was given: the name of an encoding, or the path of a trained vocabulary."""
    vocab_sha256: str
    """SHA-256 of the vocabulary."""
    vocab_size: int = Field(gt=0)
    """Number of token ids, end-of-document included; every id in the dataset is below it."""
    eod_id: int = Field(ge=0)
    """Token that ends every document."""
    file: str | None = None
    """Name of the vocabulary's copy in the dataset folder; null: the name alone finds it."""


class SplitInfo(_Record):
    """Counts of one split."""

    documents: int = Field(ge=0)
    """Number of documents."""
    sequences: int = Field(ge=0)
    """Number of sequences; one a document unless another program wrote them."""
    tokens: int = Field(ge=0)
    """Number of tokens, end-of-document tokens included."""


class FileChecksum(_Record):
    """Size and hash of one file."""

    size: int = Field(ge=0)
    """Bytes."""
    xxh3_128: str
    """128-bit XXH3 of the content, as 32 hexadecimal digits."""

    @classmethod
    def of(cls, path: str | Path) -> "FileChecksum":
        """Read the file at `path` and return its checksum."""
        digest, size = xxhash.xxh3_128(), 0
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                size += len(block)
        return cls(size=size, xxh3_128=digest.hexdigest())


class Manifest(_Record):
    """What a dataset folder's manifest.json holds."""

    format_version: Literal[1] = FORMAT_VERSION
    """Version of this file's format."""
    tokenizer: TokenizerInfo
    """The tokenizer of all splits."""
    splits: dict[str, SplitInfo]
    """Counts by split; split `train` is in the files train.bin and train.idx."""
    counts: dict[str, int] = {}
    """Documents and bytes that came in, left and stayed, by stage."""
    checksums: dict[str, FileChecksum] = {}
    """Checksums by file name."""
    config: dict[str, Any] = {}
    """The whole configuration that made the dataset."""
    versions: dict[str, str] = {}
    """Versions of the libraries that made the dataset."""
    plan_hash: str = ""
    """Hash of inputs and configuration: equal hashes mean equal datasets."""

    def save(self, folder: str | Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        content = json.dumps(self.model_dump(mode="json"), indent=2)  # in ASCII: paths may have bytes that are no UTF-8
        replace_file(Path(folder) / FILE_NAME, f"{content}\n".encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest | None":
        """Read the manifest of `folder`; None if there is none. UserError if it is not a manifest or too new."""
        path = Path(folder) / FILE_NAME
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; copy the dataset again") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error}); copy the dataset again") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version {version} is not known here, {FORMAT_VERSION} is the newest; update MegaGPT"
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"])) or "the whole file"
            raise UserError(
                f"{path}: not a dataset manifest: {key}: {problem['msg']}; copy the dataset again"
            ) from None

    @classmethod
    def of(cls, dataset: IndexedDataset) -> "Manifest | None":
        """The manifest that describes `dataset`; None if its folder has none, or one without this split.

        UserError: as `load`, or the manifest counts other documents, sequences or tokens than the files hold, or lists
        a loss mask that is missing, without which a model would learn what it must not.
        """
        manifest = cls.load(Path(dataset.prefix).parent)
        return manifest if manifest and manifest._describes(dataset) else None

    def _describes(self, dataset: IndexedDataset) -> bool:
        """Whether `dataset`, of the manifest's folder, is one of its splits. UserError: it is, but its files differ."""
        prefix = Path(dataset.prefix)
        if prefix.name not in self.splits:
            return False
        listed = self.splits[prefix.name]
        found = SplitInfo(documents=dataset.num_documents, sequences=len(dataset), tokens=dataset.num_tokens)
        if listed != found:
            raise UserError(
                f"{idx_path(prefix)}: holds {found.documents} documents, {found.sequences} sequences, {found.tokens} "
                f"tokens, but {FILE_NAME} beside it says {listed.documents}, {listed.sequences}, {listed.tokens}; "
                "copy the whole dataset again"
            )
        mask = mask_path(prefix)
        if dataset.loss_mask is None and mask.name in self.checksums:
            raise UserError(f"{mask}: no such file, but {FILE_NAME} beside it lists it; copy the whole dataset again")
        return True

    def load_tokenizer(self, folder: str | Path, vocab_dir: str | Path | None = None) -> Tokenizer:
        """The tokenizer of the dataset in `folder`: its own copy if it has one, else found by name, in vocab_dir first.

        UserError: it cannot be found, or its vocabulary is another than when the dataset was made.
        """
        copy = self.tokenizer.file
        if copy and not (Path(folder) / copy).is_file():
            raise UserError(
                f"{Path(folder) / copy}: no such file; it is the copy of tokenizer {self.tokenizer.name} that "
                f"{FILE_NAME} beside it names; copy the whole dataset again"
            )
        tokenizer = load_tokenizer(Path(folder) / copy if copy else self.tokenizer.name, vocab_dir)
        if tokenizer.vocab_sha256 != self.tokenizer.vocab_sha256:
            raise UserError(
                f"{Path(folder) / FILE_NAME}: the vocabulary of tokenizer {self.tokenizer.name} has sha256 "
                f"{tokenizer.vocab_sha256[:12]}..., the dataset was made with {self.tokenizer.vocab_sha256[:12]}...; "
                "find that vocabulary or make the dataset anew"
            )
        return tokenizer

    def verify_files(self, folder: str | Path) -> None:
        """Read every file of `folder` that has a checksum here, and compare. UserError names one that differs."""
        for name, expected in self.checksums.items():
            path = Path(folder) / name
            try:
                found = FileChecksum.of(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}; copy the file again") from error
            if found != expected:
                raise UserError(
                    f"{path}: {found.size} bytes with xxh3_128 {found.xxh3_128}, but {FILE_NAME} beside it says "
                    f"{expected.size} and {expected.xxh3_128}; copy the file again"
                )


def common_tokenizer(datasets: Sequence[IndexedDataset], vocab_size: int | None = None) -> TokenizerInfo | None:
    """The tokenizer that the manifests of these datasets name; None if none of them has a manifest.

    UsageError: two of them name different vocabularies, or one that has more ids than `vocab_size`, the model's number.
    """
    common: tuple[str, TokenizerInfo] | None = None
    load = functools.cache(Manifest.load)  # a manifest may list a thousand datasets
    for dataset in datasets:
        manifest = load(Path(dataset.prefix).parent)
        if manifest is None or not manifest._describes(dataset):
            continue
        tokenizer = manifest.tokenizer
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise UsageError(
                f"{dataset.prefix}: its tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model knows "
                f"{vocab_size}; set model.vocab_size to {tokenizer.vocab_size} or more, or choose another dataset"
            )
        if common is None:
            common = dataset.prefix, tokenizer
        elif common[1].vocab_sha256 != tokenizer.vocab_sha256:
            raise UsageError(
                f"{dataset.prefix}: made with tokenizer {tokenizer.name} ({tokenizer.vocab_sha256[:12]}...), but "
                f"{common[0]} with {common[1].name} ({common[1].vocab_sha256[:12]}...); use datasets of one tokenizer"
            )
    return common and common[1]
