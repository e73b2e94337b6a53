"""Decontamination, against the definition in plain Python: sets of runs of normalized words."""

import functools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.corpus import decontaminate, external
from megagpt.corpus.clean import clean
from megagpt.corpus.config import CleanConfig, DecontaminateConfig
from megagpt.corpus.decontaminate import EvaluationIndex, EvaluationTask, evaluation_files, normalized_words, open_index
from megagpt.corpus.reasons import CONTAMINATED
from megagpt.corpus.screening import Screened, Screening
from megagpt.errors import UserError
from tests.unit.corpus.texts import WORDS, write_jsonl

NO_CLEANING = CleanConfig(enabled=False)
QUESTION = "If a train leaves the station at noon, and travels at 60 miles an hour, when will it arrive in Leeds?"


def plain_words(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in text if c.isalnum() or c.isspace()).split()


def plain_runs(text: str, size: int) -> list[tuple[str, ...]]:
    words = plain_words(text)
    return [tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))] if words else []


def index_of(
    folder: Path,
    files: list[str],
    size: int = 13,
    text_keys: tuple[str, ...] = ("text",),
    cleaning: CleanConfig = NO_CLEANING,
) -> EvaluationIndex:
    config = DecontaminateConfig(files=files, text_keys=list(text_keys), ngram_words=size)
    folder.mkdir()
    EvaluationTask(tuple(evaluation_files(config)), text_keys, size, cleaning).run(folder)
    return EvaluationIndex(folder, size)


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.characters(max_codepoint=127)))
def test_words_are_lower_case_letters_and_digits(text: str) -> None:
    assert normalized_words(text).tobytes().decode() == " ".join(plain_words(text))


@pytest.mark.parametrize("size", [1, 3, 13])
def test_found_is_what_shares_a_run_and_the_first_run_and_document_are_named(tmp_path: Path, size: int) -> None:
    rng = random.Random(size)
    vocabulary = WORDS[: 12 * size]

    def sentence(words: int) -> str:
        return " ".join(rng.choice(vocabulary) + rng.choice(["", ",", "!"]) for _ in range(words))

    evaluation = [sentence(rng.randrange(1, 40)) for _ in range(200)]
    path = write_jsonl(tmp_path / "evaluation.jsonl", evaluation)
    positions = [0]
    for line in path.read_bytes().splitlines(keepends=True):
        positions.append(positions[-1] + len(line))
    owners: dict[tuple[str, ...], int] = {}
    for number, text in enumerate(evaluation):
        for run in plain_runs(text, size):
            owners.setdefault(run, number)
    index = index_of(tmp_path / "index", [str(path)], size)
    found = 0
    for _ in range(400):
        text = sentence(rng.randrange(1, 60))
        if rng.random() < 0.4:
            text += " " + rng.choice(evaluation).upper().replace(",", "") + " " + sentence(3)
        shared = [run for run in plain_runs(text, size) if run in owners]
        expected = f'"{" ".join(shared[0])[:300]}" is in {path}:{positions[owners[shared[0]]]}' if shared else None
        assert index.find(text) == expected
        found += expected is not None
    assert found > 40


def test_a_question_in_the_middle_of_a_page_is_found_however_it_is_punctuated(tmp_path: Path) -> None:
    path = tmp_path / "exam.txt"
    path.write_text(QUESTION)
    index = index_of(tmp_path / "index", [str(path)])
    page = f"My homework:\n\n  {QUESTION.upper().replace(',', ' —').replace(' ', chr(10))} Please help"
    assert index.find(page) == f'"if a train leaves the station at noon and travels at 60 miles" is in {path}:0'
    assert index.find(page.replace("STATION", "depot").replace("HOUR", "day")) is None  # no 13 words in a row
    assert index.find("") is None


def test_the_bitmap_only_saves_work(tmp_path: Path) -> None:
    path = tmp_path / "exam.txt"
    path.write_text("alpha beta")
    index_of(tmp_path / "index", [str(path)], 2)
    (tmp_path / "index" / "bits.bin").write_bytes(b"\xff" * (tmp_path / "index" / "bits.bin").stat().st_size)
    index = EvaluationIndex(tmp_path / "index", 2)
    assert [text for text in (f"word {n}" for n in range(100)) if index.find(text)] == []  # smaller and larger hashes
    assert index.find("word alpha beta") == f'"alpha beta" is in {path}:0'


def test_an_evaluation_document_of_fewer_words_matches_only_its_equal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "short.jsonl", ["What is two and two?", "Paris"])
    index = index_of(tmp_path / "index", [str(path)])
    assert index.find("what is TWO and two") is not None
    assert index.find("paris!") is not None
    assert index.find("What is two and two? Four.") is None
    assert index.find("I love Paris") is None


def test_the_texts_of_several_keys_are_one_document(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    rows = [
        {"question": "one two three", "answer": "four five"},
        {"answer": "six seven eight"},
        {"question": " ", "answer": ""},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    index = index_of(tmp_path / "index", [str(path)], 4, ("question", "answer"))
    assert index.find("zero one two three four") == f'"one two three four" is in {path}:0'
    assert index.find("six seven eight") is not None
    columns = tmp_path / "qa.parquet"
    pq.write_table(pa.table({"question": ["one two three", "x"], "answer": ["four five", "y"]}), columns)
    index = index_of(tmp_path / "index2", [str(columns)], 4, ("question", "answer"))
    assert index.find("zero one two three four") == f'"one two three four" is in {columns}:0'
    index = index_of(tmp_path / "index3", [str(columns)], 2, ("question", "nothing"))
    assert index.find("one two") is not None
    assert index.find("four five") is None


def test_files_of_any_format_in_folders_and_patterns_are_read_and_empty_ones_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "a.txt").write_text("alpha beta gamma")
    (tmp_path / "sets" / "empty.txt").write_text("")
    (tmp_path / "sets" / "image.bin").write_bytes(b"\0\1\2")
    write_jsonl(tmp_path / "b.jsonl", ["delta epsilon zeta"])
    index = index_of(tmp_path / "index", [str(tmp_path / "sets"), str(tmp_path / "*.jsonl")], 3)
    assert index.find("x alpha beta gamma") is not None
    assert index.find("delta epsilon zeta x") is not None
    empty = index_of(tmp_path / "none", [str(tmp_path / "sets" / "empty.txt")], 3)
    assert empty.find("alpha beta gamma") is None


def test_a_verbatim_copy_is_found_after_cleaning_and_so_is_the_cleaned_text(tmp_path: Path) -> None:
    rows = [
        "please write to the address john.smith@example.com and ask for the small red book of poems",
        "the answer of the <b>first</b> question is that &amp; sign stands for and in most old texts",
        "it was the firm cafÃ© owner who said that he would never sell the place to them",
        "in the year 1999 the host with 8.8.8.8 as address was answering to all of the other machines",
    ]
    config = CleanConfig(remove_html=True, mask_emails=True, mask_ips=True)
    index = index_of(tmp_path / "index", [str(write_jsonl(tmp_path / "a.jsonl", rows))], cleaning=config)
    for row in rows:
        assert index.find(row) is not None
        assert index.find(clean(row, config)) is not None
    uncleaned = index_of(tmp_path / "uncleaned", [str(tmp_path / "a.jsonl")])
    assert [uncleaned.find(clean(row, config)) for row in rows] == [None] * 4


def test_the_bitmap_has_the_bits_of_all_hashes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decontaminate, "_BLOCK_HASHES", 1000)
    hashes = np.unique(np.random.default_rng(1).integers(0, 2**64, 30_000, np.uint64))
    bits = decontaminate._bitmap(hashes)
    width = bits.size.bit_length() + 2
    expected = np.zeros(1 << width, bool)
    expected[hashes >> np.uint64(64 - width)] = True
    assert (np.unpackbits(bits, bitorder="little") == expected).all()
    assert decontaminate._has_bit(bits, hashes).all()


def test_more_runs_than_are_held_are_sorted_out_of_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    rows = [" ".join(rng.choices(WORDS[:8], k=30)) for _ in range(300)]  # most runs are in several documents
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    index_of(tmp_path / "whole", [path], 3)
    monkeypatch.setattr(decontaminate, "RunWriter", functools.partial(external.RunWriter, run_records=100))
    monkeypatch.setattr(decontaminate, "merge_runs", functools.partial(external.merge_runs, memory_bytes=1000))
    index_of(tmp_path / "runs", [path], 3)
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "runs").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "runs" / name).read_bytes()


def test_a_key_that_is_null_is_as_one_that_is_missing(tmp_path: Path) -> None:
    rows = [{"text": "one two three", "answer": None}, {"text": "four five six", "answer": "seven"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        index = index_of(tmp_path / f"index {name}", [str(tmp_path / name)], 3, ("text", "answer"))
        assert index.find("one two three") is not None
        assert index.find("five six seven") is not None
    (tmp_path / "b.jsonl").write_text('{"text": null}')
    with pytest.raises(UserError, match="'text' is null, not a string; name the keys"):
        index_of(tmp_path / "none", [str(tmp_path / "b.jsonl")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "fine"}\n{"txt": "x"}\n',
            r"evaluation file .*e\.jsonl line 2: missing key.*decontaminate\.text_keys, now text$",
        ),
        ('{"text": 3}\n', r"line 1: wrong type: 'text' is a number"),
        ("{\n", r"line 1: malformed JSON.*; mend it"),
    ],
)
def test_an_evaluation_document_that_cannot_be_read_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        index_of(tmp_path / "index", [str(path)])
    assert "\n" not in str(caught.value)


def test_a_missing_column_or_file_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a"]}), tmp_path / "e.parquet")
    message = r"evaluation file .*no column 'text' among 'question'.*decontaminate\.text_keys"
    with pytest.raises(UserError, match=message):
        index_of(tmp_path / "index", [str(tmp_path / "e.parquet")])
    with pytest.raises(UserError, match=r"decontaminate\.files: .*nothing: no such file"):
        evaluation_files(DecontaminateConfig(files=[str(tmp_path / "nothing")]))
    assert evaluation_files(DecontaminateConfig()) == []


def test_a_contaminated_document_is_dropped_or_only_reported(tmp_path: Path) -> None:
    path = tmp_path / "exam.txt"
    path.write_text(QUESTION)
    index_of(tmp_path / "index", [str(path)])
    open_index.cache_clear()
    detail = f'"if a train leaves the station at noon and travels at 60 miles" is in {path}:0'
    drop, report = (
        Screening(CleanConfig(), decontaminate=DecontaminateConfig(action=action), evaluation=tmp_path / "index")
        for action in ("drop", "report")
    )
    assert drop(QUESTION) == Screened(QUESTION, CONTAMINATED, detail)
    assert report(QUESTION) == Screened(QUESTION, contamination=detail)
    assert drop("something else") == report("something else") == Screened("something else")
