"""What metrics and messages call the datasets of a list: by the configured name, else by the end of the path."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megagpt.config.schema import DataSource
from megagpt.errors import UsageError


def distinct_names(sources: Sequence[DataSource], key: str) -> list[str]:
    """A name for each of `sources`, no two equal; `key` is where the configuration lists them: data.train.

    Without a name of its own a dataset gets the last two parts of its path (corpus/validation), all such datasets more
    where that does not tell them apart. UsageError: a name, or a dataset without one, is given twice.
    """
    given = [source.name for source in sources if source.name]
    _refuse_repeated(given, key, "the name {} is given twice; choose another")
    paths = [source.path for source in sources if not source.name]
    parts = [Path(path).parts for path in paths]
    for length in range(2, max(map(len, parts), default=0) + 1):
        ends = [str(Path(*path[-length:])) for path in parts]
        if len({*given, *ends}) == len(sources):
            paths = ends
            break
    else:
        _refuse_repeated([str(Path(path)) for path in paths], key, "names {} twice; give each dataset once")
        _refuse_repeated(
            [*given, *paths], key, "{} is the name of one dataset and the path of another; rename that one"
        )
    unnamed = iter(paths)
    return [source.name or next(unnamed) for source in sources]


def _refuse_repeated(names: Sequence[str], key: str, problem: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(f"{key}: {problem.format(name)}")
