"""Names of datasets: as configured, else as short as tells them apart, and never two equal."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.schema import DataSource
from megagpt.data.names import distinct_names
from megagpt.errors import UsageError


def names(*sources: str | tuple[str, str]) -> list[str]:
    """Names of datasets, each given by its path or by its path and name."""
    pairs = [(source, None) if isinstance(source, str) else source for source in sources]
    return distinct_names([DataSource(path=path, name=name) for path, name in pairs], "data.validation")


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([], []),
        (["train"], ["train"]),
        (["data/web/train", "data/code/train"], ["web/train", "code/train"]),
        (["a/web/train", "b/web/train", "c/x"], ["a/web/train", "b/web/train", "c/x"]),
        (["/web/train", "/a/web/train"], ["/web/train", "a/web/train"]),
        ([("data/web/train", "web"), "data/code/train"], ["web", "code/train"]),
        ([("x/y/z", "code/train"), "data/code/train"], ["code/train", "data/code/train"]),
        ([("data/web/train", "a"), ("data/web/train", "b")], ["a", "b"]),
    ],
)
def test_names_are_as_given_or_the_shortest_ends_of_paths(sources, expected) -> None:
    assert names(*sources) == expected


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([("a", "web"), ("b", "web")], "data.validation: the name web is given twice; choose another"),
        (["x/a/b", "x/a//b"], "data.validation: names x/a/b twice; give each dataset once"),
        (["a", "a"], "data.validation: names a twice; give each dataset once"),
        ([("x", "a"), "a"], "data.validation: a is the name of one dataset and the path of another; rename that one"),
    ],
)
def test_a_name_or_path_given_twice_is_a_usage_error(sources, message) -> None:
    with pytest.raises(UsageError) as caught:
        names(*sources)
    assert str(caught.value) == message


PATHS = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), max_size=8, unique=True)


@given(PATHS)
def test_names_are_ends_of_the_paths_and_distinct(paths: list[str]) -> None:
    found = names(*paths)
    assert len(set(found)) == len(paths)
    for name, path in zip(found, paths, strict=True):
        assert Path(path).parts[-len(Path(name).parts) :] == Path(name).parts
