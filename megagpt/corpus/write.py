"""Stage `write`: the dataset from the tokens of all parts, in the order of their documents' keys.

An external sort in one pass: a task brings together, from every part, the documents with keys in one range, of about
32 million tokens, and writes them in their order; the results, one after another, are the dataset. Beside a split's
.bin and .idx stands .ids: the id of every document, in the same order.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.corpus.documents import Documents
from megagpt.corpus.exact import KeyRange
from megagpt.corpus.external import Run
from megagpt.corpus.tokenize import TOKENIZED
from megagpt.corpus.workspace import Receipt, task_folder, write_array
from megagpt.data.indexed import IndexedDatasetWriter
from megagpt.data.manifest import SplitInfo
from megagpt.data.origins import ORIGIN, ids_path

_TASK_TOKENS = 1 << 25  # of a task, each document counting as some more
_TOKENS_OF_A_DOCUMENT = 32  # whose place takes so much memory besides
_DOCUMENTS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class WriteTask:
    """The documents of one split with keys in one range: tokens.bin, lengths.bin (int64 each), ids.bin (an ORIGIN
    each)."""

    documents: Documents
    tokenize: Path
    """Folder of the stage `tokenize`."""
    split: int
    low: int
    high: int | None
    """Keys from `low` to below `high`; None: no limit."""
    dtype: str

    def __str__(self) -> str:
        return f"split {self.split}, keys from {self.low}"

    def run(self, folder: Path) -> Receipt:
        """See the class; counts documents and tokens."""
        stretches = self._stretches()
        tokens = np.empty(sum(int(index["tokens"].sum()) for _, index in stretches), self.dtype)
        loaded = 0
        for path, index in stretches:
            begin, count = int(index["begin"][0]), int(index["tokens"].sum())
            with open(path, "rb") as file:
                file.seek(begin * tokens.itemsize)
                if file.readinto(tokens[loaded : loaded + count].view(np.uint8).data) != count * tokens.itemsize:
                    raise OSError(f"{path}: ends before token {begin + count}")
            index["begin"] -= np.uint64(begin)
            index["begin"] += np.uint64(loaded)
            loaded += count
        index = np.concatenate([np.empty(0, TOKENIZED), *(index for _, index in stretches)])
        del stretches
        index = index[np.argsort(index["key"], kind="stable")]
        with open(folder / "tokens.bin", "wb") as file:
            for start in range(0, index.size, _DOCUMENTS_AT_ONCE):
                block = index[start : start + _DOCUMENTS_AT_ONCE]
                ends = block["begin"] + block["tokens"]
                for begin, end in zip(block["begin"].tolist(), ends.tolist(), strict=True):
                    file.write(tokens[begin:end].data)
        write_array(folder / "lengths.bin", index["tokens"].astype(np.int64))
        ids = np.empty(index.size, ORIGIN)
        ids["file"], ids["position"] = index["file"], index["position"]
        write_array(folder / "ids.bin", ids)
        return {"documents": index.size, "tokens": tokens.size}

    def _stretches(self) -> list[tuple[Path, npt.NDArray[np.void]]]:
        """The files with tokens of the task's documents, each with the index of those."""
        stretches = []
        for part in self.documents.parts:
            folder = task_folder(self.tokenize, part.number)
            path = folder / f"index_{self.split}.bin"
            if path.exists():
                run = Run.of(path, TOKENIZED).between("key", self.low, self.high)
                if len(run):
                    stretches.append((folder / f"tokens_{self.split}.bin", run.read(0, len(run))))
        return stretches


def write_tasks(
    documents: Documents, folder: Path, split: int, receipts: Sequence[Receipt], shuffled: bool, dtype: str
) -> list[WriteTask]:
    """The tasks of one split, in order, none if it has no documents; `receipts` are those of the stage `tokenize`."""
    sizes = [
        int(receipt.get(f"tokens {split}", 0) + _TOKENS_OF_A_DOCUMENT * receipt.get(f"documents {split}", 0))
        for receipt in receipts
    ]
    if not any(sizes):
        return []
    if shuffled:
        count = max(1, -(-sum(sizes) // _TASK_TOKENS))
        ranges = [KeyRange(index, count) for index in range(count)]
        return [WriteTask(documents, folder, split, keys.low, keys.high, dtype) for keys in ranges]
    bounds, waiting = [0], 0
    for part, added in zip(documents.parts, sizes, strict=True):
        if waiting >= _TASK_TOKENS:
            bounds.append(part.first)
            waiting = 0
        waiting += added
    ends = [*bounds[1:], None]
    return [WriteTask(documents, folder, split, low, high, dtype) for low, high in zip(bounds, ends, strict=True)]


def join(prefix: Path, results: Sequence[Path], dtype: str) -> SplitInfo:
    """Write the dataset `prefix` from the results of all tasks of a split."""
    with IndexedDatasetWriter(prefix, dtype) as writer, open(ids_path(prefix), "wb") as ids:
        for folder in results:
            tokens, lengths = (
                np.fromfile(folder / f"{name}.bin", t) for name, t in (("tokens", dtype), ("lengths", "<i8"))
            )
            writer.add_documents(tokens, lengths)
            with open(folder / "ids.bin", "rb") as file:
                shutil.copyfileobj(file, ids, 1 << 20)
    return SplitInfo(documents=writer.num_documents, sequences=writer.num_sequences, tokens=writer.num_tokens)
