"""python -m tools.train_tokenizer: the file it writes, what it takes from its input, and its errors."""

import gzip
import itertools
import json
import pydoc_data.topics
import re
import subprocess
from pathlib import Path

import pytest
import tiktoken.load

from megagpt.corpus.finding import find_files
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.training import train_bpe
from tests.forked import run_module
from tools.train_tokenizer import Sample

ROOT = Path(__file__).parents[3]
TOPICS = [text for _, text in sorted(pydoc_data.topics.topics.items())]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module("tools.train_tokenizer", *arguments)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TOPICS[:40]))
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in TOPICS[40:60])
    for number, text in enumerate(TOPICS[60:]):
        (folder / f"c{number:03}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_the_file_is_the_vocabulary_of_the_text_for_tiktokens_loader_and_ours(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "own.tiktoken"
    done = run("--input", corpus, "--text-key", "body", "--vocab-size", 1000, "--output", output)
    assert (done.returncode, done.stderr) == (0, "")
    ranks = train_bpe(TOPICS, 1000)
    assert tiktoken.load.load_tiktoken_bpe(str(output)) == ranks
    tokenizer = load_tokenizer(output)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (1000, 999)
    assert f"{output}: 1,000 entries, sha256 {tokenizer.vocab_sha256}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input", "no/such/*.txt"], 1, r"input no/such/\*.txt: no such file, folder or match"),
        (["--input", "{corpus}", "--vocab-size", 256], 2, r"--vocab-size.*257"),
        (["--input", "{corpus}", "--output", "{corpus}"], 2, r"--output .*: is a folder; name a file in it"),
        (
            ["--input", "{corpus}", "--vocab-size", 300, "--output", "/proc/own.tiktoken"],
            1,
            r"/proc/own.tiktoken: cannot be written: ",
        ),
        (
            ["--input", "{corpus}/c000.txt", "--vocab-size", 9999999],
            1,
            r"a vocabulary of [\d]+ entries only; give more",
        ),
        (["--input", "{corpus}/a.jsonl", "--text-key", "txt"], 1, r"a vocabulary of 257 entries only.*no key 'txt'"),
        (["--input", "{corpus}", "--output", "gpt2.tiktoken"], 2, r"--output gpt2\.tiktoken: gpt2 names another tok"),
        ([], 2, r"Missing option '--input'"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    arguments: list[str], code: int, message: str, corpus: Path, tmp_path: Path
) -> None:
    defaults: list[object] = [] if "--output" in arguments else ["--output", tmp_path / "own.tiktoken"]
    done = run(*defaults, *(str(argument).format(corpus=corpus) for argument in arguments))
    assert done.returncode == code
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_unquoted_pattern_gives_the_same_file_as_a_quoted_one(corpus: Path, tmp_path: Path) -> None:
    for output, inputs in (("quoted", [f"{corpus}/c*.txt"]), ("unquoted", sorted(corpus.glob("c*.txt")))):
        done = run("--input", *inputs, "--vocab-size", 300, "--output", tmp_path / output)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "quoted").read_bytes() == (tmp_path / "unquoted").read_bytes()


@pytest.mark.slow
def test_the_file_of_an_earlier_run_is_no_text_to_train_on(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TOPICS[:20]), encoding="utf-8")
    files = []
    for _ in range(2):
        done = run("--input", tmp_path, "--vocab-size", 300, "--output", tmp_path / "own.tiktoken")
        assert (done.returncode, done.stderr) == (0, "")
        files.append((tmp_path / "own.tiktoken").read_bytes())
    assert files[0] == files[1]


@pytest.mark.slow
def test_records_that_are_no_documents_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in TOPICS[:30]]
    lines[3:3] = ["{broken", '{"text": 7}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    done = run("--input", tmp_path / "x.jsonl", "--vocab-size", 300, "--output", tmp_path / "own.tiktoken")
    assert done.returncode == 0
    assert re.search(r"left out 2 bad records, the first: .*x.jsonl, byte \d+: malformed JSON", done.stdout)


def sample_of(paths: list[Path], target_bytes: int) -> tuple[list[str], int]:
    sample = Sample(find_files([str(path) for path in paths]), target_bytes, "text")
    return list(sample), sample.bytes


def test_a_large_enough_sample_is_the_whole_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOPICS))
    with gzip.open(tmp_path / "b.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(TOPICS))
    texts, size = sample_of([tmp_path], 10**8)
    assert texts == [*TOPICS, "\n".join(TOPICS)]
    assert size == sum(len(text.encode()) for text in texts)


def test_a_sample_is_taken_evenly_from_all_over_the_input_and_in_whole_documents(tmp_path: Path) -> None:
    documents = [f"{number:06} " * 100 for number in range(20_000)]  # 14 MB
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:10_000]))
    for number, text in enumerate(documents[10_000:10_500]):
        (tmp_path / f"b{number:04}.txt").write_text(text * 20)
    texts, size = sample_of([tmp_path], 1_400_000)
    assert 1_400_000 <= size < 1_400_000 + 2**20
    assert set(texts) <= {*documents[:10_000], *(text * 20 for text in documents[10_000:])}
    from_lines = [int(text[:6]) for text in texts if int(text[:6]) < 10_000]
    assert max(right - left for left, right in itertools.pairwise(from_lines)) < 2000
    assert 0.4 < sum(len(text) for text in texts if int(text[:6]) < 10_000) / size < 0.6


def test_a_single_huge_document_is_cut_to_the_sample(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 3_000_000)
    texts, size = sample_of([tmp_path], 2_000_001)
    assert texts == ["é" * 1_000_000]
    assert size == 2_000_001
