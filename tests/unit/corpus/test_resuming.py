"""What a run takes over from earlier ones of the same plan, what it never does, and what it leaves behind."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from megagpt.corpus import Report, extract, pipeline, workspace
from megagpt.corpus.reading import read_piece
from megagpt.corpus.records import BadRecord, Document
from megagpt.data.manifest import Manifest
from megagpt.errors import UserError
from tests.unit.corpus.test_pipeline import contents, run
from tests.unit.corpus.texts import document, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with input."""
    rng = random.Random(8)
    write_jsonl(tmp_path / "in/a.jsonl", [document(rng, 40) for _ in range(40)])
    write_jsonl(tmp_path / "in/b.jsonl", [document(rng, 40) for _ in range(40)])
    return tmp_path


def run_kept(folder: Path, name: str, **options: Any) -> Report:
    """Preprocess with a work folder that all runs share, and that stays."""
    execution = {"work_dir": str(folder / "work"), "keep_work": True, "chunk_mb": 0.005}
    return run(folder, name, execution=execution, **options)


def reused(report: Report) -> set[bool]:
    """Whether the tasks of each stage but the joining were done before."""
    return {stage.reused == stage.tasks if stage.reused else False for stage in report.stages if stage.name != "join"}


def change_content(folder: Path) -> None:
    path = folder / "in/a.jsonl"
    path.write_text(path.read_text().replace("text", "tEXT", 1))


def change_time(folder: Path) -> None:
    status = (folder / "in/a.jsonl").stat()
    os.utime(folder / "in/a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def change_name(folder: Path) -> None:
    (folder / "in/a.jsonl").rename(folder / "in/c.jsonl")


def add_file(folder: Path) -> None:
    write_jsonl(folder / "in/0.jsonl", ["one more"])


def test_the_same_plan_takes_over_all_work_and_makes_the_same_bytes(corpus: Path) -> None:
    assert reused(run_kept(corpus, "first")) == {False}
    assert reused(run_kept(corpus, "second")) == {True}
    assert contents(corpus / "second") == contents(corpus / "first")


@pytest.mark.parametrize("change", [change_content, change_time, change_name, add_file])
def test_changed_input_takes_over_nothing(corpus: Path, change: Callable[[Path], None]) -> None:
    run_kept(corpus, "first", max_bad=0.1)
    before = set((corpus / "work").iterdir())
    change(corpus)
    assert reused(run_kept(corpus, "second", max_bad=0.1)) == {False}
    assert before < set((corpus / "work").iterdir())


@pytest.mark.parametrize(
    "option",
    [
        {"seed": 1},
        {"text_key": "id2"},
        {"validation_fraction": 0.2},
        {"splits": {"test": 0.1}},
        {"shuffle": False},
        {"dedup": {"threshold": 0.9}},
        {"clean": {"enabled": False}},
        {"filter": {"enabled": True, "min_words": 10, "min_stop_words": None}},
    ],
    ids=str,
)
def test_another_option_takes_over_nothing(corpus: Path, option: dict[str, Any]) -> None:
    for name in "ab":
        path = corpus / f"in/{name}.jsonl"
        path.write_text(path.read_text().replace('"text":', '"id2": "same", "text":'))
    run_kept(corpus, "first")
    assert reused(run_kept(corpus, "second", **option)) == {False}


def test_another_version_of_a_library_takes_over_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_kept(corpus, "first")
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} of tomorrow")
    assert reused(run_kept(corpus, "second")) == {False}


def test_the_work_of_this_plan_goes_and_that_of_others_stays(corpus: Path) -> None:
    run_kept(corpus, "other", seed=5)
    kept = {path: path.stat().st_mtime_ns for path in (corpus / "work").rglob("*")}
    run(corpus, execution={"work_dir": str(corpus / "work")})
    assert {path: path.stat().st_mtime_ns for path in (corpus / "work").rglob("*")} == kept
    run(corpus, "without_others")
    assert not (corpus / "without_others.work").exists()


def die(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def remove_half(folder: Path) -> None:
    """In the place of the function that removes the trash."""
    for path in workspace._trash(folder).rglob("*.bin"):
        path.unlink()
        die()


@pytest.mark.parametrize("moment", ["before the work is removed", "while it is removed", "before it is unlocked"])
def test_what_a_run_leaves_that_is_killed_after_its_dataset_appeared_goes_with_the_next(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with monkeypatch.context() as patch:
        if moment == "before the work is removed":
            patch.setattr(pipeline, "remove_workspace", die)
        elif moment == "while it is removed":
            patch.setattr(workspace, "_remove_trash", remove_half)
        else:
            unlink = Path.unlink
            patch.setattr(Path, "unlink", lambda path, **how: (die if path.suffix == ".lock" else unlink)(path, **how))
        with pytest.raises(KeyboardInterrupt):
            run(corpus)
    before = contents(corpus / "out")
    assert sorted(path.name for path in corpus.iterdir() if path.is_dir()) == ["in", "out", "out.work"]
    assert run(corpus).was_finished
    assert sorted(path.name for path in corpus.iterdir()) == ["in", "out"]
    assert contents(corpus / "out") == before


def test_work_that_was_half_removed_is_never_taken_for_results(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_remove_trash", remove_half)
        with pytest.raises(KeyboardInterrupt):
            run(corpus)
    before = contents(corpus / "out")
    assert reused(run(corpus, overwrite=True)) == {False}
    assert contents(corpus / "out") == before


def test_a_dataset_that_was_being_replaced_is_kept_until_there_is_a_new_one(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus)
    manifest = Manifest.load(corpus / "out")
    assert manifest is not None
    old = corpus / f".out.{manifest.plan_hash[:16]}.old"
    (corpus / "out").rename(old)  # as a run leaves it that is killed between its two renames
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_removed", die)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, overwrite=True)
    assert (old / "train.bin").exists()
    run(corpus, overwrite=True)
    assert sorted(path.name for path in corpus.iterdir()) == ["in", "out"]


def test_a_disk_that_fails_while_input_is_read_is_an_error_with_file_and_position(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Generator[Document | BadRecord, None, None]:
        records: Iterator[Document | BadRecord] = read_piece(*arguments)
        yield next(records)
        yield next(records)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    second = len((corpus / "in/a.jsonl").read_bytes().splitlines(keepends=True)[0])
    with monkeypatch.context() as patch:
        patch.setattr(extract, "read_piece", failing)
        where = rf"stage extract, \S+ bytes .*a\.jsonl, reading on from position {second}: Input/output error; "
        with pytest.raises(UserError, match=where):
            run(corpus, execution={"chunk_mb": 0.005})
    run(corpus, execution={"chunk_mb": 0.005})
    shutil.rmtree(corpus / "out")
