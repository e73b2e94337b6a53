"""Process groups shared by all distributed tests of a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.jobs import write_dataset
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    """A world of one process."""
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """A world of two processes joined by gloo."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[Ranks]:
    """A world of three processes joined by gloo."""
    ranks = Ranks(3)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """A world of four processes joined by gloo."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small token dataset: train and validation."""
    folder = tmp_path_factory.mktemp("corpus")
    write_dataset(folder / "train", 20_000, seed=0)
    write_dataset(folder / "validation", 3_001, seed=1)
    return folder
