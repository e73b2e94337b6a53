"""The whole pipeline, in this process: what comes out of it against what was put in."""

import dataclasses
import errno
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagpt.corpus import CorpusConfig, Report, pipeline, preprocess, stages, tokenize
from megagpt.corpus.plan import make_plan
from megagpt.corpus.workspace import Receipt
from megagpt.data.indexed import IndexedDataset
from megagpt.data.manifest import Manifest
from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.tokenizer.fast import PROOF_SHARES, DocumentEncoder
from megagpt.tokenizer.ranks import BYTE_RANKS, write_rank_file
from tests.unit.corpus.texts import document, edited, jaccard, write_jsonl

EOD = load_tokenizer("bytes").eod_id


class InlinePool:
    """Does the work where it stands."""

    workers = 1

    def submit(self, function: Callable[..., Receipt], *arguments: Any) -> "Future[Receipt]":
        future: Future[Receipt] = Future()
        future.set_result(function(*arguments))
        return future

    def check(self) -> None: ...

    def dead_workers(self) -> dict[int, int]:
        return {}


def run(folder: Path, name: str = "out", overwrite: bool = False, **options: Any) -> Report:
    """Preprocess `folder`/in into `folder`/name."""
    settings = {"tokenizer": "bytes", "input": [str(folder / "in")], "output": str(folder / name), **options}
    return preprocess(CorpusConfig.model_validate(settings), InlinePool(), overwrite=overwrite)


def texts_of(folder: Path, split: str = "train") -> list[str]:
    """The documents of a dataset, decoded by hand."""
    dataset = IndexedDataset(folder / split)
    documents = [dataset.document(i).tolist() for i in range(dataset.num_documents)]
    assert all(ids[-1] == EOD and EOD not in ids[:-1] for ids in documents)
    return [bytes(ids[:-1]).decode() for ids in documents]


def removed_of(folder: Path) -> list[dict[str, Any]]:
    with open(folder / "removed.jsonl.zst", "rb") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file)
        return [json.loads(line) for line in io.TextIOWrapper(content, encoding="utf-8")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the reports, which tell times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.stem != "report"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of distinct documents, some bad lines, some copies and a folder of code."""
    rng = random.Random(5)
    texts = [document(rng, rng.randrange(1, 80)).strip() for _ in range(120)]
    write_jsonl(tmp_path / "in/a.jsonl", texts[:60])
    write_jsonl(tmp_path / "in/b.jsonl", [*texts[60:], texts[0], "  ".join(texts[61].split(" "))])
    with open(tmp_path / "in/b.jsonl", "a") as file:
        file.write('broken\n{"text": 1}\n')
    (tmp_path / "in/code").mkdir()
    (tmp_path / "in/code/x.py").write_text("def f():\n    return '<|endoftext|>'\n")
    (tmp_path / "in/code/empty.py").write_text("")
    (tmp_path / "in/code/x.pyc").write_bytes(b"\0\1\2")
    return tmp_path


def test_without_deduplication_and_shuffle_every_document_comes_out_in_the_order_of_the_input(corpus: Path) -> None:
    run(corpus, dedup={"method": "none"}, shuffle=False, validation_fraction=0, max_bad=0.1)
    lines = [json.loads(line) for name in "ab" for line in (corpus / f"in/{name}.jsonl").read_text().splitlines()[:62]]
    expected = [line["text"] for line in lines] + ["def f():\n    return '<|endoftext|>'"]
    assert texts_of(corpus / "out") == expected


def test_without_a_shuffle_the_order_is_that_of_the_input_though_it_is_cut(corpus: Path) -> None:
    for name, chunk_mb in (("whole", 1.0), ("cut", 0.0007)):
        options: dict[str, Any] = {"shuffle": False, "validation_fraction": 0, "max_bad": 0.1}
        report = run(corpus, name, execution={"chunk_mb": chunk_mb}, **options)
    assert report.stages[0].tasks > 10
    assert texts_of(corpus / "cut") == texts_of(corpus / "whole")


def test_a_text_is_in_the_same_split_wherever_it_stands_in_the_input(tmp_path: Path) -> None:
    rng = random.Random(2)
    texts = [document(rng, 30).strip() for _ in range(100)]
    splits = []
    for name, order in (("one", texts), ("two", texts[::-1]), ("three", [document(rng, 30), *texts])):
        write_jsonl(tmp_path / f"{name}.jsonl", order)
        run(tmp_path, name, input=[str(tmp_path / f"{name}.jsonl")], validation_fraction=0.3)
        splits.append(set(texts_of(tmp_path / name, "validation")) & set(texts))
    assert splits[0] == splits[1] == splits[2]
    assert 10 < len(splits[0]) < 60


def test_copies_that_nobody_removes_are_in_one_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/a.jsonl", ["one", "two", "one", "two", "one"])
    run(tmp_path, dedup={"method": "none"}, validation_fraction=0.0001)
    train, validation = texts_of(tmp_path / "out"), texts_of(tmp_path / "out", "validation")
    assert sorted(train + validation) == ["one"] * 3 + ["two"] * 2
    assert not set(train) & set(validation)


def test_the_counts_of_bytes_are_those_of_the_records_and_of_their_cleaned_texts(tmp_path: Path) -> None:
    texts = ["caf\u00e9 \n", "two", "two"]
    path = write_jsonl(tmp_path / "in/a.jsonl", texts)
    report = run(tmp_path)
    assert report.counts["input_bytes"] == path.stat().st_size
    assert report.counts["text_bytes"] == len("caf\u00e9".encode()) + 3 + 3
    assert report.counts["kept_text_bytes"] == len("caf\u00e9".encode()) + 3


def test_the_hash_of_a_plan_depends_on_vocabulary_versions_and_time_of_change(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusConfig(input=[str(corpus / "in")], output=str(corpus / "out"))
    tokenizer = load_tokenizer("bytes")
    hashes = [make_plan(config, tokenizer).hash]
    hashes.append(make_plan(config, dataclasses.replace(tokenizer, vocab_sha256="0" * 64)).hash)
    for name, value in (("PIPELINE_VERSION", 0), ("library_versions", lambda _: {"ftfy": "0"})):
        with monkeypatch.context() as patch:
            patch.setattr(f"megagpt.corpus.plan.{name}", value)
            hashes.append(make_plan(config, tokenizer).hash)
    os.utime(corpus / "in/a.jsonl", ns=(0, 0))
    hashes.append(make_plan(config, tokenizer).hash)
    assert len(set(hashes)) == len(hashes)


def test_a_shuffle_keeps_every_document_and_depends_on_the_seed_alone(corpus: Path) -> None:
    orders = []
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run(corpus, name, seed=seed, validation_fraction=0, max_bad=0.1)
        orders.append(texts_of(corpus / name))
    run(corpus, "plain", shuffle=False, validation_fraction=0, max_bad=0.1)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(texts_of(corpus / "plain"))
    assert orders[0] != texts_of(corpus / "plain")


def test_the_splits_share_the_documents_and_both_are_shuffled_alike(corpus: Path) -> None:
    report = run(corpus, validation_fraction=0.3, max_bad=0.1)
    train, validation = texts_of(corpus / "out"), texts_of(corpus / "out", "validation")
    run(corpus, "whole", validation_fraction=0, max_bad=0.1)
    whole = texts_of(corpus / "whole")
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(whole)
    assert train == [text for text in whole if text in set(train)]
    assert {name: split.documents for name, split in report.splits.items()} == {
        "train": len(train),
        "validation": len(validation),
    }


@pytest.mark.parametrize("method", ["none", "exact", "minhash"])
def test_the_bytes_do_not_depend_on_how_the_input_is_cut(corpus: Path, method: str) -> None:
    rows = [*(f"row {number}" for number in range(40)), None]
    pq.write_table(pa.table({"text": rows}), corpus / "in/c.parquet", row_group_size=3)
    options: dict[str, Any] = {"dedup": {"method": method}, "validation_fraction": 0.2, "max_bad": 0.1}
    run(corpus, "whole", **options)
    for chunk_mb in (0.0007, 0.004):
        run(corpus, f"cut{chunk_mb}", execution={"chunk_mb": chunk_mb}, **options)
        assert contents(corpus / f"cut{chunk_mb}") == contents(corpus / "whole")


def test_copies_go_and_the_list_says_what_stays_in_their_stead(corpus: Path) -> None:
    report = run(corpus, max_bad=0.1, dedup={"method": "exact"})
    offset = (corpus / "in/b.jsonl").read_text().splitlines(keepends=True)
    positions = [sum(map(len, offset[:line])) for line in (1, 60, 61)]
    common: dict[str, Any] = {"file": str(corpus / "in/b.jsonl"), "stage": "exact", "reason": "same text"}
    common |= {"detail": "", "similarity": 1.0}
    assert removed_of(corpus / "out") == [
        {"id": f"1:{positions[1]}", "survivor": "0:0", **common},
        {"id": f"1:{positions[2]}", "survivor": f"1:{positions[0]}", **common},
    ]
    assert report.counts["removed_exact"] == 2
    assert dict(report.funnel)["documents out"] == report.counts["documents"] - 2


def test_a_copy_of_a_near_duplicate_names_the_document_that_stays(tmp_path: Path) -> None:
    rng = random.Random(1)
    original = document(rng, 500)
    near = edited(original, rng, 2)
    write_jsonl(tmp_path / "in/a.jsonl", [original, near, document(rng, 500), near])
    run(tmp_path)
    first, second = removed_of(tmp_path / "out")
    assert (first["stage"], second["stage"]) == ("near", "exact")
    assert first["survivor"] == second["survivor"] == "0:0"
    assert first["similarity"] == second["similarity"] < 1


def test_planted_near_duplicates_are_found_and_nothing_else_is_removed(tmp_path: Path) -> None:
    rng = random.Random(3)
    originals = [document(rng, 300) for _ in range(200)]
    planted = [edited(text, rng, rng.randrange(1, 12)) for text in originals[:150]]
    texts = originals + planted
    write_jsonl(tmp_path / "in/a.jsonl", texts)
    run(tmp_path, dedup={"threshold": 0.8})
    starts, position = {}, 0
    for text, line in zip(texts, (tmp_path / "in/a.jsonl").read_bytes().splitlines(keepends=True), strict=True):
        starts[f"0:{position}"] = text
        position += len(line)
    removed = {starts[record["id"]]: record for record in removed_of(tmp_path / "out")}
    similarity = {copy: jaccard(copy, original) for copy, original in zip(planted, originals, strict=False)}
    close = [copy for copy in planted if similarity[copy] >= 0.9]
    assert len(close) > 20
    assert sum(copy in removed for copy in close) >= 0.99 * len(close)
    for text, record in removed.items():
        exact = jaccard(text, starts[record["survivor"]])
        assert exact >= 0.7
        assert abs(record["similarity"] - exact) < 0.15


def test_what_cannot_be_read_is_listed_with_file_line_and_byte_though_the_file_is_cut(corpus: Path) -> None:
    report = run(corpus, max_bad=0.1, execution={"chunk_mb": 0.0005})
    lines = (corpus / "in/b.jsonl").read_bytes().splitlines(keepends=True)
    quarantined = [json.loads(line) for line in (corpus / "out/quarantine.jsonl").read_text().splitlines()]
    assert [
        (Path(record["file"]).name, record["line"], record["byte"], record["reason"]) for record in quarantined
    ] == [
        ("b.jsonl", 63, sum(map(len, lines[:62])), "malformed JSON"),
        ("b.jsonl", 64, sum(map(len, lines[:63])), "wrong type"),
        ("empty.py", None, 0, "empty"),
        ("x.pyc", None, 0, "binary file"),
    ]
    assert [record["row"] for record in quarantined] == [None] * 4
    assert (report.counts["bad"], report.counts["harmless"]) == (2, 2)


def test_what_cannot_be_read_in_a_columnar_file_is_listed_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["one", None, "three"]}), tmp_path / "in/a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1: wrong type \('text' is null, not a string\)"):
        run(tmp_path)
    run(tmp_path, max_bad=0.5)
    (record,) = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert (record["line"], record["byte"], record["row"], record["reason"]) == (None, None, 1, "wrong type")


def test_too_many_bad_documents_are_an_error_that_shows_the_first(corpus: Path) -> None:
    with pytest.raises(
        UserError, match=r"^2 of 125 documents cannot be read \(1\.6%, more than --max-bad 0\.01\)"
    ) as caught:
        run(corpus)
    assert f"{corpus}/in/b.jsonl, line 63: malformed JSON (Expecting value at column 1)" in str(caught.value)
    assert not (corpus / "out").exists()
    report = run(corpus, max_bad=0.016)
    assert next(stage for stage in report.stages if stage.name == "extract").reused > 0


def test_too_many_bad_documents_are_an_error_of_a_finished_dataset_too(corpus: Path) -> None:
    run(corpus, max_bad=0.016)
    with pytest.raises(UserError, match=r"2 of 125 documents cannot be read"):
        run(corpus, max_bad=0.015)


def test_a_full_disk_is_an_error_that_names_the_work_folder(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megagpt.corpus.stages.write_quarantine", fail)
    with pytest.raises(
        UserError, match=r"out\.work/\S+: No space left on device; free space for \S+out\.work/\S+, and "
    ):
        run(corpus, max_bad=0.1)


def test_paths_may_have_bytes_that_are_no_utf8(corpus: Path) -> None:
    (corpus / "in").rename(corpus / "in\udcff[b]")
    run(corpus, "out\udcff", input=[str(corpus / "in\udcff*")], max_bad=0.1)
    manifest = Manifest.load(corpus / "out\udcff")
    assert manifest is not None
    assert manifest.config["input"] == [str(corpus / "in\udcff*")]


def test_a_run_that_earlier_work_helped_claims_no_speed(corpus: Path) -> None:
    with pytest.raises(UserError):
        run(corpus)
    report = run(corpus, max_bad=0.1)
    assert report.megabytes_per_second is None
    assert "MB/s)" not in (corpus / "out/report.html").read_text()
    assert run(corpus, "fresh", max_bad=0.1).megabytes_per_second is not None
    assert "MB/s)" in (corpus / "fresh/report.html").read_text()


def test_a_document_that_cleaning_empties_is_removed_and_not_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/a.jsonl", ["good", "\x07\x08"])
    report = run(tmp_path)
    assert removed_of(tmp_path / "out")[0] == {
        "id": f"0:{len(json.dumps({'id': 0, 'text': 'good'})) + 1}",
        "file": str(tmp_path / "in/a.jsonl"),
        "stage": "clean",
        "reason": "empty after cleaning",
        "detail": "",
        "survivor": None,
        "similarity": None,
    }
    assert report.counts["removed_clean"] == 1


def test_without_cleaning_texts_stay_byte_for_byte(tmp_path: Path) -> None:
    text = " \r\n spaces \t \x07 cafÃ© e\u0301\n\n\n\n\n"
    write_jsonl(tmp_path / "in/a.jsonl", [text])
    run(tmp_path, clean={"enabled": False})
    assert texts_of(tmp_path / "out") == [text]


def test_the_manifest_describes_the_folder_and_tells_nothing_of_how_it_was_made(corpus: Path) -> None:
    report = run(corpus, max_bad=0.1, execution={"chunk_mb": 0.001, "workers": 2})
    manifest = Manifest.load(corpus / "out")
    assert manifest is not None
    assert manifest.splits == report.splits
    assert manifest.tokenizer.eod_id == EOD
    assert set(manifest.checksums) == set(contents(corpus / "out")) - {"manifest.json"}
    assert manifest.counts == report.counts
    assert not {"execution", "output", "max_bad"} & set(manifest.config)
    assert set(manifest.versions) >= {"megagpt", "ftfy", "tiktoken", "datasketch", "unicode"}


def test_the_plan_names_the_version_of_the_html_reader_only_where_there_is_html(corpus: Path) -> None:
    run(corpus, max_bad=0.1)
    (corpus / "in/a.html").write_text("<main><p>Text of the page.</p></main>")
    run(corpus, "with_html", max_bad=0.1)
    found = [json.loads((corpus / name / "manifest.json").read_text())["versions"] for name in ("out", "with_html")]
    assert ["resiliparse" in versions for versions in found] == [False, True]


def test_an_own_tokenizer_is_copied_into_the_dataset(corpus: Path) -> None:
    import base64

    path = corpus / "own.tiktoken"
    ranks = [bytes([i]) for i in range(256)] + [b"al", b"bor"]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))
    run(corpus, tokenizer=str(path), max_bad=0.1)
    manifest = Manifest.load(corpus / "out")
    assert manifest is not None
    assert manifest.tokenizer.file is not None
    assert (corpus / "out" / manifest.tokenizer.file).read_bytes() == path.read_bytes()
    copy = load_tokenizer(corpus / "out" / manifest.tokenizer.file)
    assert copy.vocab_sha256 == manifest.tokenizer.vocab_sha256
    dataset = IndexedDataset(corpus / "out/train")
    assert copy.decode(dataset.document(0)[:-1]) in {*texts_in(corpus / "in/a.jsonl"), *texts_in(corpus / "in/b.jsonl")}


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()[:60]]


def test_the_report_is_one_file_with_the_numbers(corpus: Path) -> None:
    report = run(corpus, max_bad=0.1)
    page = (corpus / "out/report.html").read_text()
    assert f"{report.tokens:,} tokens" in page
    assert "malformed JSON" in page
    assert not any(word in page for word in ("http", "<script", "src="))


# The output folder


def test_a_finished_dataset_of_the_same_plan_is_left_alone(corpus: Path) -> None:
    first = run(corpus, max_bad=0.1)
    before = {path: path.stat().st_mtime_ns for path in (corpus / "out").iterdir()}
    again = run(corpus, max_bad=0.1)
    assert again.was_finished
    assert not first.was_finished
    assert (again.counts, again.splits) == (first.counts, first.splits)
    assert {path: path.stat().st_mtime_ns for path in (corpus / "out").iterdir()} == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"clean": {"enabled": False}}, {"dedup": {"threshold": 0.7}}, "input"])
def test_another_plan_never_meets_old_output_or_old_work(corpus: Path, change: Any) -> None:
    options: dict[str, Any] = {"max_bad": 0.1}
    run(corpus, **options)
    if change == "input":
        (corpus / "in/a.jsonl").write_text('{"text": "changed"}\n')
    else:
        options |= change
    with pytest.raises(UserError, match=r"out: exists, made from other input or with other options; .*--overwrite"):
        run(corpus, **options)
    report = run(corpus, overwrite=True, **options)
    assert not any(stage.reused for stage in report.stages)
    run(corpus, "fresh", **options)
    assert contents(corpus / "out") == contents(corpus / "fresh")
    assert sorted(path.name for path in corpus.iterdir()) == ["fresh", "in", "out"]


def test_a_dataset_that_lost_a_file_is_not_taken_for_finished(corpus: Path) -> None:
    run(corpus, max_bad=0.1)
    (corpus / "out/train.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.bin: not as the manifest beside it says"):
        run(corpus, max_bad=0.1)


def test_a_folder_that_is_no_dataset_is_never_replaced(corpus: Path) -> None:
    (corpus / "out").mkdir()
    (corpus / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a token dataset; choose another"):
        run(corpus, max_bad=0.1, overwrite=True)
    assert (corpus / "out/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_dataset_does_not_name_is_never_deleted_with_it(corpus: Path, overwrite: bool) -> None:
    run(corpus, max_bad=0.1)
    (corpus / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"'thesis\.txt' in it is no part" if overwrite else "give --overwrite"):
        run(corpus, max_bad=0.1, overwrite=overwrite, seed=1)
    assert (corpus / "out/thesis.txt").read_text() == "years of work"


def test_a_folder_that_fills_during_the_run_is_not_replaced(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_meanwhile(*_: Any) -> None:
        (corpus / "out").mkdir()
        (corpus / "out/thesis.txt").write_text("years of work")

    monkeypatch.setattr("megagpt.corpus.pipeline.write_removed", write_meanwhile)
    with pytest.raises(UserError, match="is not a token dataset"):
        run(corpus, max_bad=0.1, overwrite=True)
    assert (corpus / "out/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("as_shells_expand_it", [False, True])
def test_a_pattern_that_meets_the_folders_of_the_run_still_means_the_same_input(
    corpus: Path, as_shells_expand_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again() -> Report:
        inputs = [str(path) for path in corpus.glob("[!.]*")] if as_shells_expand_it else [str(corpus / "*")]
        return run(corpus, max_bad=0.1, input=inputs)

    with monkeypatch.context() as patch:
        patch.setattr("megagpt.corpus.pipeline.join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert (corpus / "out.work").is_dir()
    assert [stage.name for stage in again().stages if not stage.reused] == ["join"]
    assert again().was_finished


@pytest.mark.parametrize("name", ["out", "out/train.bin", "out/*"])
def test_input_that_lies_in_the_output_is_refused(corpus: Path, name: str) -> None:
    run(corpus, max_bad=0.1)
    before = contents(corpus / "out")
    with pytest.raises(UsageError, match="lies in what this run itself writes"):
        run(corpus, input=[str(corpus / name)], overwrite=True)
    assert contents(corpus / "out") == before


@pytest.mark.parametrize("work_dir", ["out", "out/work", "in/../out/work"])
def test_work_within_the_output_is_refused_at_once(corpus: Path, work_dir: str) -> None:
    with pytest.raises(UsageError, match=r"--work-dir .* lies in --output"):
        run(corpus, execution={"work_dir": str(corpus / work_dir)})
    assert sorted(path.name for path in corpus.iterdir()) == ["in"]


@pytest.mark.parametrize("output", ["", "/"])
def test_an_output_that_no_folder_can_be_is_refused(corpus: Path, output: str) -> None:
    with pytest.raises(UsageError, match="is no folder that a dataset could become"):
        run(corpus, output=output)


def test_an_output_behind_a_link_is_written_there_and_the_link_stays(corpus: Path) -> None:
    (corpus / "disk").mkdir()
    (corpus / "out").symlink_to("disk/out")
    run(corpus, max_bad=0.1)
    run(corpus, max_bad=0.1, overwrite=True)
    assert (corpus / "out").is_symlink()
    assert (corpus / "disk/out/train.bin").is_file()
    assert sorted(path.name for path in corpus.rglob("*out*")) == ["out", "out"]


def test_an_output_that_another_run_is_making_is_refused(corpus: Path) -> None:
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, corpus / ".out.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another run is making it; wait for it"):
            run(corpus, max_bad=0.1)
        assert sorted(path.name for path in corpus.iterdir()) == [".out.lock", "in"]
        other.communicate(b"\n")
    run(corpus, max_bad=0.1)
    assert sorted(path.name for path in corpus.iterdir()) == ["in", "out"]


def test_a_tokenizer_that_changes_during_the_run_is_an_error_and_afterwards_the_dataset_has_its_own(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus / "own.tiktoken"
    write_rank_file({**BYTE_RANKS, b"al": 256}, path)
    old = path.read_bytes()

    def replace_after(function: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            result = function(*arguments)
            write_rank_file({**BYTE_RANKS, b"bo": 256}, path)
            return result

        return wrapped

    for module, name in ((stages, "write_quarantine"), (pipeline, "write_removed")):  # before and after it tokenizes
        path.write_bytes(old)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, replace_after(getattr(module, name)))
            if module is stages:
                with pytest.raises(UserError, match="its vocabulary changed during the run"):
                    run(corpus, tokenizer=str(path), max_bad=0.1)
            else:
                run(corpus, tokenizer=str(path), max_bad=0.1)
    assert (corpus / "out/tokenizer.tiktoken").read_bytes() == old


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_input_without_a_usable_document_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/empty.txt").write_text("")
    with pytest.raises(UserError, match="no document is left to write; check the input, --text-key and the filters"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_no_output_and_the_next_run_goes_on(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "train.bin")

    with monkeypatch.context() as patch:
        patch.setattr("megagpt.corpus.pipeline.write_removed", fail)
        with pytest.raises(UserError, match=r"train\.bin: No space left on device"):
            run(corpus, max_bad=0.1)
    assert sorted(path.name for path in corpus.iterdir()) == ["in", "out.work"]
    report = run(corpus, max_bad=0.1)
    assert all(stage.reused == stage.tasks for stage in report.stages if stage.name != "join")
    assert sorted(path.name for path in corpus.iterdir()) == ["in", "out"]


@pytest.mark.slow
def test_workers_share_the_proof_of_the_faster_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    write_jsonl(tmp_path / "in/a.jsonl", [document(random.Random(seed), 60) for seed in range(20)])
    options = {"tokenizer": "gpt2", "dedup": {"method": "none"}}
    small = run(tmp_path, "small", **options)
    monkeypatch.setattr(stages, "BYTES_WORTH_A_PROOF", 1000)
    large = run(tmp_path, "large", **options)
    proofs = [[stage.tasks for stage in report.stages if stage.name == "proof"] for report in (small, large)]
    assert proofs == [[], [PROOF_SHARES]]
    assert (tmp_path / "large/train.bin").read_bytes() == (tmp_path / "small/train.bin").read_bytes()
    monkeypatch.setattr(tokenize, "prove", lambda *_: False)
    monkeypatch.setattr(tokenize, "DocumentEncoder", _OnlyTiktoken)
    unproven = run(tmp_path, "unproven", **options, overwrite=True)
    assert unproven.counts == large.counts


class _OnlyTiktoken(DocumentEncoder):
    def __init__(self, tokenizer: Tokenizer, backend: str, proven: bool) -> None:
        assert backend == "tiktoken"
        super().__init__(tokenizer, "tiktoken")
