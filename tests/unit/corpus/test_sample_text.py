"""Generated corpora: the same bytes for the same seed, with exactly the duplicates that truth.json tells."""

import itertools
import json
import random
from pathlib import Path

import pytest

from megagpt.corpus.sample_text import (
    SHINGLE_WORDS,
    TRUTH_NAME,
    jaccard,
    library_sources,
    sample_documents,
    shingles,
    write_sample_corpus,
)
from tests.unit.corpus import texts


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_the_truth_is_that_of_the_texts(tmp_path: Path) -> None:
    corpus = write_sample_corpus(tmp_path, 2_000_000, seed=5, document_bytes=2000, exact_share=0.1, near_share=0.2)
    documents = [str(document["text"]) for document in read(tmp_path)]
    assert [document["id"] for document in read(tmp_path)] == list(range(corpus.documents))
    assert corpus.text_bytes == sum(len(text.encode()) for text in documents) >= 2_000_000
    assert SHINGLE_WORDS == 5
    exact = [copy for copy in corpus.copies if documents[copy.number] == documents[copy.original]]
    near = [copy for copy in corpus.copies if documents[copy.number] != documents[copy.original]]
    assert 0.05 < len(exact) / corpus.documents < 0.15
    assert 0.15 < len(near) / corpus.documents < 0.25
    for copy in corpus.copies:
        assert copy.original < copy.number
        assert copy.jaccard == pytest.approx(texts.jaccard(documents[copy.number], documents[copy.original]))
    similarities = [copy.jaccard for copy in near]
    assert min(similarities) < 0.65 < 0.95 < max(similarities) < 1
    truth = json.loads((tmp_path / TRUTH_NAME).read_text())
    assert [(copy["number"], copy["original"]) for copy in truth["copies"]] == [
        (copy.number, copy.original) for copy in corpus.copies
    ]


def test_documents_that_are_no_copies_have_little_in_common() -> None:
    documents = [sample.text for sample in itertools.islice(sample_documents(1, 4000), 150)]
    assert max(jaccard(left, right) for left, right in itertools.combinations(documents, 2)) < 0.3
    sizes = [len(text) for text in documents]
    assert 3500 < min(sizes) <= max(sizes) < 4500


def test_the_seed_decides_about_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample_corpus(tmp_path / name, 100_000, seed, files=3)
    contents = {name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in "abc"}
    assert contents["a"] == contents["b"] != contents["c"]
    assert len(contents["a"]) == 4


def test_similarity_is_that_of_the_runs_of_five_words() -> None:
    rng = random.Random(1)
    left = texts.document(rng, 50)
    right = texts.edited(left, rng, 3)
    assert shingles(left) == texts.shingles(left)
    assert jaccard(left, right) == texts.jaccard(left, right) < 1
    assert jaccard("a b", "a b") == 1
    assert jaccard("a b", "a c") == 0


def test_the_sources_are_the_librarys_without_its_tests() -> None:
    sources = list(library_sources())
    assert Path(random.__file__).resolve() in {source.resolve() for source in sources}
    assert not [source for source in sources if "site-packages" in source.parts or "test" in source.parts]
