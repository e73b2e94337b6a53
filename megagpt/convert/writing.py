"""Weights into safetensors files as Hugging Face names them, and into a folder that appears when it is complete."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagpt.data.atomic import fsync_path
from megagpt.errors import UsageError, UserError
from megagpt.training.tensor_files import write_tensors
from megagpt.training.weights import Weight, Weights

INDEX = "model.safetensors.index.json"

Report = Callable[[int], None]
"""Is told how many bytes were done since the last time."""

_METADATA = {"format": "pt"}  # without which transformers refuses a file


def write_shards(folder: Path, weights: Weights, max_shard_bytes: int, report: Report) -> None:
    """The files of `weights` in their order, each as large as allowed (or one tensor): as Hugging Face names them."""
    shards = _shards(weights, max_shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], _METADATA, report)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard, _METADATA, report)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(weight.nbytes for weight in weights.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, content: Any) -> None:
    """A file of JSON, as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target` when the block is done; if it fails, nothing is left.

    Raises UsageError if `target` is there already, UserError if the disk refuses.
    """
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target}: is there already; name a new folder, or remove it")
    aside = target.with_name(f".exporting_{target.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
        aside.mkdir(parents=True)
        try:
            yield aside
            for path in aside.iterdir():
                fsync_path(path)
            fsync_path(aside)
            os.rename(aside, target)
            fsync_path(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        near = next(path for path in (target.absolute(), *target.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(near).free / 1e9
        raise UserError(f"cannot write {target}: {error.strerror or error} ({free:.1f} GB free there)") from error


def _shards(weights: Weights, max_bytes: int) -> list[dict[str, Weight]]:
    shards: list[dict[str, Weight]] = [{}]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    return shards
