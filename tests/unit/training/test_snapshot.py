"""Copies of a rank's part of a checkpoint stay what they were, in memory that serves every save; files are hashed."""

import errno
import os
from pathlib import Path

import pytest
import torch

from megagpt.data.manifest import FileChecksum
from megagpt.training import snapshot
from megagpt.training.snapshot import HostMemory, host_copy, write_file


def state(step: int) -> dict:
    """As DeepSpeed's: flat tensors, views of one storage, scalars, containers."""
    flat = torch.arange(12.0) + step
    return {
        "step": step,
        "flat": flat,
        "views": [flat[:5], flat[5:].view(7, 1)],
        "moments": {0: (torch.full((12,), 2.0 * step), torch.tensor(step))},
    }


def equal(found: dict, expected: dict) -> bool:
    tensors = [(found["flat"], expected["flat"]), *zip(found["views"], expected["views"], strict=True)]
    tensors += zip(found["moments"][0], expected["moments"][0], strict=True)
    return found["step"] == expected["step"] and all(torch.equal(*pair) for pair in tensors)


def test_a_copy_stays_what_it_was_and_shares_what_its_original_shares() -> None:
    original = state(1)
    copied = host_copy(original, HostMemory())
    original["flat"] += 100
    original["moments"][0][0].zero_()
    assert equal(copied, state(1))
    assert copied["views"][1].untyped_storage().data_ptr() == copied["flat"].data_ptr()


def test_a_save_takes_the_memory_of_the_last_and_never_the_same_twice() -> None:
    memory = HostMemory()
    addresses = []
    for step in range(3):
        memory.reuse()
        copied = host_copy(state(step), memory)
        assert equal(copied, state(step))
        addresses.append({copied["flat"].data_ptr(), *(tensor.data_ptr() for tensor in copied["moments"][0])})
    assert len(addresses[0]) == 3
    assert addresses[0] == addresses[1] == addresses[2]


def test_memory_that_a_save_had_no_use_for_is_freed() -> None:
    memory = HostMemory()
    for content in ([torch.ones(5)], [torch.ones(6)], [torch.ones(6)]):
        memory.reuse()
        host_copy(content, memory)
    assert list(memory._used) == [24]
    assert not any(memory._free.values())


def test_a_written_file_is_what_its_checksum_says_and_torch_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_SLICE", 64)
    sizes: list[int] = []
    record = write_file(state(3), tmp_path / "a.pt", sizes.append)
    assert record == FileChecksum.of(tmp_path / "a.pt")
    assert sum(sizes) == record.size
    assert equal(torch.load(tmp_path / "a.pt"), state(3))


def test_a_disk_that_refuses_while_more_is_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of it once: the sync at the end would succeed."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot, "_SLICE", 64)
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        write_file(state(3), tmp_path / "a.pt", lambda size: None)
