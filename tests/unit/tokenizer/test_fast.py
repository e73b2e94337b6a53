"""The fast backend against tiktoken: the same ids for every text, and never used where that is not proven."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megagpt.tokenizer.fast as module
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.tokenizer.fast import DocumentEncoder, known_characters
from megagpt.tokenizer.ranks import write_rank_file
from megagpt.tokenizer.training import train_bpe
from tests.unit.tokenizer.test_tokenizer import with_pattern_of

GPT2 = load_tokenizer("gpt2")
NEWEST = "\u088f"  # a letter since Unicode 17
pytest.importorskip("gigatoken")


@pytest.fixture
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof in a moment."""
    monkeypatch.setattr(module, "known_characters", lambda: np.arange(0x20, 0x250))
    monkeypatch.setattr(module, "RANDOM_TEXTS", 400)


@pytest.fixture(scope="module")
def fast() -> DocumentEncoder:
    """After the whole proof."""
    return DocumentEncoder(GPT2, "gigatoken")


def reference(text: str, tokenizer: Tokenizer = GPT2) -> list[int]:
    return tokenizer.encoding.encode_ordinary(text)


pieces = st.sampled_from(module._PIECES) | st.text(max_size=5)
texts = st.lists(pieces, max_size=40).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_any_text_gets_the_ids_of_tiktoken(fast: DocumentEncoder, text: str) -> None:
    assert fast.encode(text).tolist() == reference(text)


def test_python_sources_and_documentation_get_the_ids_of_tiktoken(fast: DocumentEncoder) -> None:
    from pydoc_data.topics import topics

    documents = [*topics.values(), Path(module.__file__).read_text(), Path(random.__file__).read_text()]
    ids, lengths = fast.encode_documents(documents, np.uint16)
    expected = [[*reference(document), GPT2.eod_id] for document in documents]
    assert ids.dtype == np.uint16
    assert np.array_equal(ids, np.concatenate(expected))
    assert lengths.tolist() == [len(document) for document in expected]


@pytest.mark.parametrize("backend", ["auto", "tiktoken"])
def test_documents_follow_each_other_with_their_ends(backend: module.Backend) -> None:
    encoder = DocumentEncoder(GPT2, backend)
    ids, lengths = encoder.encode_documents(["one two", "", "three"], np.int32)
    assert ids.tolist() == [*reference("one two"), 50256, 50256, *reference("three"), 50256]
    assert lengths.tolist() == [3, 1, 2]
    assert ids.dtype == np.int32
    ids, lengths = encoder.encode_documents([], np.uint16)
    assert (ids.size, lengths.size, ids.dtype) == (0, 0, np.uint16)


@pytest.mark.parametrize(
    "text", ["a<|endoftext|>b", f"a{NEWEST}'s", "a\ud800b", "\U0010fffd's", "<|endoftext|>"], ids=ascii
)
def test_what_the_proof_does_not_cover_is_left_to_tiktoken(fast: DocumentEncoder, text: str) -> None:
    assert fast._fast is not None
    assert not fast._fast.can_encode(text)
    assert np.array_equal(fast.encode(text), GPT2.encode_to_numpy(text))


def test_the_characters_of_the_proof_are_those_that_python_knows() -> None:
    known = set(known_characters().tolist())
    assert {ord(c) for c in "aé中😀\u0301\n\0\U000e0067"} <= known
    assert not {0x88F, 0xD800, 0x40000, 0xF0000, 0x10FFFF} & known
    assert len(known) > 130_000


def test_long_documents_are_cut_where_tiktoken_cuts_them(fast: DocumentEncoder) -> None:
    for text in (" " * 1_000_001, "ab " * 400_000, "a" * 600_000):
        assert np.array_equal(fast.encode(text), GPT2.encode_to_numpy(text))


def test_starting_anew_changes_nothing(fast: DocumentEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast._fast is not None
    text = "some words that come again " * 50
    loaded = []
    for _ in range(5):
        monkeypatch.setattr(fast._fast, "_memory_left", 2000)
        for _ in range(3):
            assert fast.encode(text).tolist() == reference(text)
            loaded.append(fast._fast._bpe)
    assert len(set(map(id, loaded))) > 1


@pytest.mark.usefixtures("short_proof")
@pytest.mark.parametrize("vocab_size", [257, 300, 700])
def test_own_vocabularies_get_the_ids_of_tiktoken(tmp_path: Path, vocab_size: int) -> None:
    source = Path(random.__file__).read_text()
    write_rank_file(train_bpe([source], vocab_size), tmp_path / "own.tiktoken")
    tokenizer = load_tokenizer(tmp_path / "own.tiktoken")
    encoder = DocumentEncoder(tokenizer, "gigatoken")
    assert encoder.backend == "gigatoken"
    for text in (source, "größer 中文 'tis\r\n  x", "<|endoftext|>", "aaaa" * 100):
        assert encoder.encode(text).tolist() == reference(text, tokenizer)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_the_patterns_of_the_larger_vocabularies_split_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_pattern_of(name, monkeypatch)  # with a small vocabulary, as theirs may not be here
    encoder = DocumentEncoder(tokenizer, "gigatoken")  # after the whole proof
    for text in ("HTTPServer's12345 67\r\n\n x", "I'LL  don'T…ǅa", "Ⅷ٣٤ é\u0301E"):
        assert encoder.encode(text).tolist() == reference(text, tokenizer)
    monkeypatch.setitem(module._SCHEMES, name, "gpt2")
    with pytest.raises(UserError, match="in another way than tiktoken"):
        DocumentEncoder(tokenizer, "gigatoken")


def test_shares_of_the_proof_are_all_of_it() -> None:
    shares = [list(module._proof_share(share)) for share in range(module.PROOF_SHARES)]
    assert sum(map(len, shares)) == len(list(module.proof_texts()))
    assert set("".join(text for share in shares for text in share)) >= set(map(chr, known_characters().tolist()))


@pytest.mark.usefixtures("short_proof", "broken_library")
def test_some_share_fails_with_a_library_that_differs() -> None:
    assert not all(module.prove(GPT2, share) for share in range(module.PROOF_SHARES))


@pytest.mark.usefixtures("short_proof")
def test_every_share_succeeds_with_a_library_that_is_alike() -> None:
    assert all(module.prove(GPT2, share) for share in range(module.PROOF_SHARES))


@pytest.mark.usefixtures("short_proof")
def test_auto_begins_with_tiktoken_and_goes_on_with_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIAL_CHARACTERS", 1000)
    encoder = DocumentEncoder(GPT2)
    backends = []
    for number in range(30):
        text = f"document {number} with some words more" * 3
        assert encoder.encode(text).tolist() == reference(text)
        backends.append(encoder.backend)
    assert backends[0] == "tiktoken"
    assert backends[-1] == "gigatoken"
    assert backends == sorted(backends, reverse=True)


class _Broken:
    """A library with an error in one kind of text."""

    def __init__(self, bpe: object, wrong: str) -> None:
        self._bpe, self._wrong, self.vocab = bpe, wrong, bpe.vocab  # type: ignore[attr-defined]

    def encode(self, text: str) -> np.ndarray:
        ids = self._bpe.encode(text)  # type: ignore[attr-defined]
        return ids[:-1] if self._wrong in text else ids


@pytest.fixture(params=["\u00b2", "'ll", "= ", "\n\n", "THE"])
def broken_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    start = module._Gigatoken._start

    def broken_start(self: module._Gigatoken) -> None:
        start(self)
        self._bpe = _Broken(self._bpe, request.param)

    monkeypatch.setattr(module._Gigatoken, "_start", broken_start)


@pytest.mark.usefixtures("short_proof", "broken_library")
def test_a_library_that_differs_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gigatoken .* tokenizer gpt2: version .* in another way than tiktoken"):
        DocumentEncoder(GPT2, "gigatoken")
    monkeypatch.setattr(module, "TRIAL_CHARACTERS", 5)
    encoder = DocumentEncoder(GPT2, "auto")
    assert encoder.encode("THE = 'll").tolist() == reference("THE = 'll")
    assert encoder.encode("THE = 'll").tolist() == reference("THE = 'll")
    assert encoder.backend == "tiktoken"


@pytest.mark.usefixtures("short_proof")
def test_a_vocabulary_that_gigatoken_cannot_load_is_an_error_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("p50k_base")
    with pytest.raises(UserError, match=r"p50k_base: it cannot load the vocabulary.*dense.*choose auto or tiktoken"):
        DocumentEncoder(tokenizer, "gigatoken")
    monkeypatch.setattr(module, "TRIAL_CHARACTERS", 1)
    encoder = DocumentEncoder(tokenizer)
    for text in ("  a", "    b"):
        assert encoder.encode(text).tolist() == reference(text, tokenizer)
    assert encoder.backend == "tiktoken"


def test_without_the_package_auto_works_and_gigatoken_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    monkeypatch.setattr(module, "TRIAL_CHARACTERS", 1)
    with pytest.raises(UserError, match=r"pip install 'megagpt\[fast\]'"):
        DocumentEncoder(GPT2, "gigatoken")
    encoder = DocumentEncoder(GPT2)
    assert encoder.encode("a b").tolist() == encoder.encode("a b").tolist() == reference("a b")
