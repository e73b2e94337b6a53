"""Training of an own BPE, against the tokenizers library's own encoding."""

import hashlib
import os
import pydoc_data.topics
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from megagpt.errors import UsageError, UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.tokenizer.ranks import BYTE_RANKS, format_rank_file, write_rank_file
from megagpt.tokenizer.training import train_bpe

ROOT = Path(__file__).parents[3]
TOPICS = [text for _, text in sorted(pydoc_data.topics.topics.items())]
VOCAB_SIZE = 2000


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "own.tiktoken"
    write_rank_file(train_bpe(TOPICS, VOCAB_SIZE), path)
    return load_tokenizer(path)


def trained_by_library(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizers library's byte-level BPE as its documentation makes one, without special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return trained_by_library(TOPICS, VOCAB_SIZE - 1)


def test_the_size_counts_the_end_of_document_token_which_comes_last(own: Tokenizer) -> None:
    assert (own.vocab_size, own.eod_id) == (VOCAB_SIZE, VOCAB_SIZE - 1)


def test_text_encodes_as_by_the_tokenizers_library(own: Tokenizer, library: tokenizers.Tokenizer) -> None:
    for text in [*TOPICS, Path(random.__file__).read_text(encoding="utf-8"), "naïve 漢字 12345\r\n\r\n\t x  \n"]:
        assert own.encode(text) == library.encode(text).ids


@given(text=st.text() | st.text(st.sampled_from("the ins'\n\t0é"), max_size=200))
def test_any_text_encodes_as_by_the_tokenizers_library(
    own: Tokenizer, library: tokenizers.Tokenizer, text: str
) -> None:
    assert own.encode(text) == library.encode(text).ids
    assert own.decode(own.encode(text)) == text


def test_repetitive_text_encodes_as_by_the_tokenizers_library(tmp_path: Path) -> None:
    # Runs and overlaps of few letters give merges that could be ambiguous: pairs of pairs of the same letters.
    noise = random.Random(0)
    for alphabet in ["a", "ab", "ab ", "abc", "aé"] * 20:
        texts = ["".join(noise.choices(alphabet, k=noise.randint(1, 60))) for _ in range(20)]
        vocab_size = noise.randint(258, 275)
        library = trained_by_library(texts, vocab_size - 1)
        if library.get_vocab_size() < vocab_size - 1:
            continue
        write_rank_file(train_bpe(texts, vocab_size), tmp_path / "own")
        own = load_tokenizer(tmp_path / "own")
        for text in [*texts, *("".join(noise.choices(alphabet, k=length)) for length in (7, 40, 300))]:
            assert own.encode(text) == library.encode(text).ids


@pytest.mark.slow
def test_training_gives_the_same_file_in_every_process() -> None:
    code = (
        "import hashlib, pydoc_data.topics\n"
        "from megagpt.tokenizer.ranks import format_rank_file\n"
        "from megagpt.tokenizer.training import train_bpe\n"
        "texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]\n"
        f"print(hashlib.sha256(format_rank_file(train_bpe(texts, {VOCAB_SIZE}))).hexdigest())"
    )
    here = hashlib.sha256(format_rank_file(train_bpe(TOPICS, VOCAB_SIZE))).hexdigest()
    for parallel in ("true", "false"):
        environment = os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": "random"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == here


def test_common_words_become_one_token(own: Tokenizer) -> None:
    assert all(len(own.encode(word)) == 1 for word in (" the", " object", "\n  "))


def test_lone_surrogates_and_nuls_do_not_stop_training() -> None:
    assert len(train_bpe(["a\ud800\x00b" * 9, "\ud83d\ude00" * 9], 260)) == 259


@pytest.mark.parametrize("stretch", ["a", "ACGT", " ", "\n\t"])
def test_stretches_that_are_no_words_do_not_slow_training_down(stretch: str) -> None:
    noise = random.Random(0)
    start = time.monotonic()
    train_bpe([*TOPICS[:20], "".join(noise.choices(stretch, k=500_000))], 1000)
    assert time.monotonic() - start < 20


def test_the_smallest_vocabulary_is_the_bytes() -> None:
    assert sorted(train_bpe(["some text"], 257)) == sorted(BYTE_RANKS)


def test_a_size_without_room_for_the_bytes_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="vocabulary size 256: needs 257 or more"):
        train_bpe(TOPICS, 256)


@pytest.mark.parametrize("texts", [[], [""], ["abab"]])
def test_too_little_text_is_an_error_that_says_how_many_entries_it_gives(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r"a vocabulary of 2\d\d entries only; give more text, or ask for no more"):
        train_bpe(texts, 8192)
