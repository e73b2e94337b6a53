"""Finding the input: every file once, in order, and what leads nowhere is an error that names it."""

import glob
import gzip
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus.finding import find_files
from megagpt.corpus.plan import cut_into_chunks
from megagpt.corpus.records import BadRecord, Document
from megagpt.corpus.sources import SourceFile
from megagpt.errors import UserError
from tests.unit.corpus.test_reading import read, texts


def names(tmp_path: Path, *inputs: str) -> list[str]:
    return [
        os.path.relpath(file.name, tmp_path) for file in find_files([str(tmp_path / pattern) for pattern in inputs])
    ]


def test_folders_patterns_and_files_give_each_file_once_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/c/1.jsonl", "a.txt", ".hidden/x.txt", "b/.x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    everything = ["a.txt", "b/2.txt", "b/c/1.jsonl"]
    assert names(tmp_path, ".") == everything
    assert names(tmp_path, "b", "a.txt", "*.txt", "b/*.txt") == everything
    assert names(tmp_path, "**/*.jsonl") == ["b/c/1.jsonl"]
    assert names(tmp_path, "b") == everything[1:]


def test_links_are_followed_and_a_link_back_up_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.txt").write_text("x")
    (tmp_path / "a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/own.txt").write_text("x")
    assert names(tmp_path, "a") == ["a/link/x.txt", "a/own.txt"]


def test_patterns_of_folders_at_any_depth_match_as_glob_has_it_and_links_back_up_end(tmp_path: Path) -> None:
    for name in ("a/x.txt", "a/b/y.txt", "a/b/c/b/z.txt", "[q]/x.txt", "a/.hidden/x.txt", "a/b/y.md", "top.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    patterns = [
        "**/*.txt",
        "a/**/*.txt",
        "**/b/**/*.txt",
        "**/**/y.*",
        "**",
        "a/**",
        "**/",
        "[[]q]/**/x.txt",
        "*/**/b/*",
    ]
    for pattern in patterns:
        expected = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
        assert names(tmp_path, pattern) == names(tmp_path, *(os.path.relpath(path, tmp_path) for path in expected))
    for number in range(4):
        (tmp_path / f"a/up{number}").symlink_to(tmp_path)
    start = time.monotonic()
    assert names(tmp_path, "**/y.*") == ["a/b/y.md", "a/b/y.txt"]
    assert time.monotonic() - start < 2


def test_a_pattern_without_a_folder_before_it_begins_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("x")
    (tmp_path / "y.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_files(["**/*.txt"])] == ["a/x.txt", "y.txt"]


def test_a_file_that_several_names_lead_to_is_read_once_by_the_name_that_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/c0ffee").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").symlink_to("../blobs/c0ffee")
    assert names(tmp_path, ".") == ["data/a.jsonl"]
    (tmp_path / "link").symlink_to("data")
    assert names(tmp_path, "data", "./data/", "link/../data", "link/*") == ["link/a.jsonl"]


def test_a_path_through_a_link_and_back_leads_where_the_system_says(tmp_path: Path) -> None:
    for name in ("a/inner", "b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "b/x.txt").write_text("wrong")
    (tmp_path / "a/x.txt").write_text("right")
    (tmp_path / "b/link").symlink_to("../a/inner")
    (file,) = find_files([f"{tmp_path}/b/link/../x.txt"])
    assert Path(file.name).read_text() == "right"


def test_what_is_no_file_in_a_folder_is_listed_and_stops_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "x.txt").write_text("x")
    found = read(tmp_path)
    assert [record.reason for record in found if isinstance(record, BadRecord)] == ["not a file"] * 3
    assert [record.text for record in found if isinstance(record, Document)] == ["x"]


def test_messages_stay_on_one_line_whatever_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_files([f"{tmp_path}/a\nb.txt"])
    assert "\n" not in str(caught.value)


def test_a_name_with_characters_of_patterns_is_a_file_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path, "a[1].txt") == ["a[1].txt"]


def test_a_list_stands_for_the_inputs_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b/1.txt", "b/2.txt", "c.txt", "@d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "list").write_text(f"\ufeff{tmp_path}/a.txt\n\n  # not this: c.txt\r\n{tmp_path}/b/*.txt \n")
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_files(["@list", "./@d.txt"])] == [
        *([f"{tmp_path}/a.txt", f"{tmp_path}/b/1.txt", f"{tmp_path}/b/2.txt"]),
        "@d.txt",
    ]
    for content, message in (
        (b"", "input @list: the list names no input"),
        (b"@other\n", "input @list: lists @other; a list cannot hold another"),
        (b"\xff", "input @list: the list cannot be read: it is not UTF-8"),
        (b"no.txt", "input no.txt: no such file"),
    ):
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(UserError, match=message):
            find_files(["@list"])
    with pytest.raises(UserError, match="input @nothing: the list cannot be read: No such file"):
        find_files(["@nothing"])


def test_a_format_holds_for_all_files_whatever_their_names_say(tmp_path: Path) -> None:
    (tmp_path / "c4.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.parquet").write_text('{"text": "three"}\n')
    assert texts(read(tmp_path, chunk_bytes=5, format="jsonl")) == ["three", "one", "two"]
    (as_lines,), (as_auto,) = (find_files([str(tmp_path / "c4.json")], format=format) for format in ("jsonl", "auto"))
    (as_text,) = find_files([str(tmp_path / "c4.json")], format="text")
    assert as_text.identity != as_auto.identity
    assert as_lines.identity == as_auto.identity  # which is seen in the file itself


def test_json_is_read_by_records_if_it_has_one_a_line_and_never_taken_for_a_text_that_was_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, content in (
        ("lines.json", '\n{"text": "one"}\n{"text": "two"}\n'),
        ("lines2.json.gz", '{"text": "three"}\n{"text": "four"}'),
        ("code.json", '{\n  "name": "x"\n}\n'),
        ("package.json", '{"name": "x"}\n'),
        ("array.json", '[{"text": "one"},\n{"text": "two"}]'),
        ("deep.json", "[" * 100_000),
    ):
        raw = content.encode()
        (tmp_path / "in" / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    kinds = {os.path.basename(file.name): file.kind for file in find_files([str(tmp_path / "in")])}
    assert kinds == {
        **dict.fromkeys(("lines.json", "lines2.json.gz"), "jsonl"),
        **dict.fromkeys(("code.json", "package.json", "array.json", "deep.json"), "text"),
    }
    assert texts(read(tmp_path / "in/lines.json")) == ["one", "two"]
    assert texts(read(tmp_path / "in/lines2.json.gz")) == ["three", "four"]
    assert [file.kind for file in find_files([str(tmp_path / "in/package.json")])] == ["jsonl"]
    for name in ("code.json", "array.json", "deep.json"):
        with pytest.raises(UserError, match=rf"{name}: is not JSON with one record a line; .*jq -c .*--format jsonl"):
            find_files([str(tmp_path / "in" / name)])
        assert [file.kind for file in find_files([str(tmp_path / "in" / name)], format="text")] == ["text"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.CSV.gz"])
def test_a_table_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("id,text\n1,one\n")
    with pytest.raises(UserError, match=rf"{name}: tables such as .* not supported; .*jsonl or Parquet.*--format text"):
        find_files([str(tmp_path / name)])
    for unit in ("file", "line"):
        (bad,) = read(tmp_path, chunk_bytes=3, text_unit=unit)
        assert isinstance(bad, BadRecord)
        assert bad.reason == "format not supported"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    with pytest.raises(UserError, match=r"secret\.txt: cannot be read: Permission denied"):
        find_files([str(tmp_path)])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_file_that_another_user_may_not_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            find_files([str(tmp_path)])
        except UserError as error:
            os._exit(0 if "secret.txt: cannot be read: Permission denied" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_inputs_that_lead_nowhere_are_errors_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, message in (
        ("no.txt", "no such file"),
        ("*.csv", "no such file, folder or match"),
        ("empty", "holds no files"),
        ("pipe", "not a regular file"),
        ("dangling", "cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            find_files([str(tmp_path / name)])
        assert str(tmp_path / name) in str(caught.value)


@given(
    st.lists(st.tuples(st.sampled_from([".jsonl", ".txt", ".jsonl.gz"]), st.integers(0, 50)), max_size=10),
    st.integers(1, 60),
)
def test_chunks_cover_every_file_once_and_in_order(files: list[tuple[str, int]], chunk_bytes: int) -> None:
    sources = [SourceFile(f"{i}{suffix}", size, 0, False) for i, (suffix, size) in enumerate(files)]
    pieces = [piece for chunk in cut_into_chunks(sources, chunk_bytes) for piece in chunk.pieces]
    for index, source in enumerate(sources):
        own = [piece for piece in pieces if piece.file_index == index]
        assert [piece.start for piece in own] == [0, *(piece.stop for piece in own[:-1])]
        assert own[-1].stop == source.size
        assert len(own) == 1 or source.is_splittable
    assert [piece.file_index for piece in pieces] == sorted(piece.file_index for piece in pieces)
