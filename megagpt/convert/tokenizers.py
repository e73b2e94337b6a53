"""Byte-level BPE between tiktoken's ranks and the files of Hugging Face's tokenizers.

tiktoken merges the pair whose union has the lowest rank, tokenizers applies a list of merges in their order. Applying
our rule to the bytes of each token gives the one pair it arises from, and these pairs in the order of ranks are that
list. Either direction is proven on texts of all scripts, in which the two libraries must give the same ids.

One difference is meant: text that spells a special token becomes that token in Hugging Face's libraries, and ordinary
tokens here.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from megagpt.convert.writing import write_json
from megagpt.data.manifest import TokenizerInfo
from megagpt.errors import UserError
from megagpt.tokenizer import TOKENIZER_NAMES, Tokenizer
from megagpt.tokenizer.fast import proof_texts
from megagpt.tokenizer.ranks import (
    BYTE_RANKS,
    Ranks,
    token_bytes,
    token_characters,
    vocabulary_sha256,
    write_rank_file,
)
from megagpt.tokenizer.tokenizer import END_OF_DOCUMENT, GPT2_PATTERN

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a Hugging Face folder says of tokens and of what to do with them."""

PROOF_TEXTS = 200
"""Texts of the proof, spread over all that there are; it takes a second."""

_UNNAMED = "huggingface"

# Vocabularies with a name, by their fingerprint: the name, and the end of a document. r50k_base is gpt2's.
_NAMED = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": ("gpt2", 50256),
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": ("p50k_base", 50256),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": ("cl100k_base", 100257),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": ("o200k_base", 199999),
    vocabulary_sha256(BYTE_RANKS): ("bytes", 256),
}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """The files from which AutoTokenizer makes `tokenizer`. Raises UserError if the libraries' ids would differ."""
    theirs = to_huggingface(tokenizer)
    if differing := _first_difference(tokenizer, theirs):
        raise UserError(
            f"tokenizer {tokenizer.name}: Hugging Face's library gives other ids for text such as {differing!r}; "
            "give --tokenizer none to convert the weights alone"
        )
    theirs.save(str(folder / "tokenizer.json"))
    end = {"bos_token": END_OF_DOCUMENT, "eos_token": END_OF_DOCUMENT, "unk_token": END_OF_DOCUMENT}
    write_json(folder / "special_tokens_map.json", end)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **end,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
        },
    )


def to_huggingface(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """`tokenizer` as one of Hugging Face's library, with the same ids."""
    ranks, special = tokenizer.ranks, _special_tokens(tokenizer)
    vocab = {token_characters(token): rank for token, rank in ranks.items()} | special
    merges = [(token_characters(left), token_characters(right)) for left, right in _merges(ranks)]
    found = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    pattern = tokenizer.encoding._pat_str
    if _is_gpt2_pattern(pattern):
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(_onigurumas(pattern)), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        found.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    found.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return found


def read_tokenizer(folder: Path, eod_id: int | None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder as one of ours; None if it has none, or one that is no byte-level BPE.

    eod_id: the token that ends a document there, eos_token_id. Raises UserError for a damaged file.
    """
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            theirs = tokenizers.Tokenizer.from_file(str(path))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            theirs = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
            theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        else:
            return None
    except Exception as error:  # the library has no class of its own for it
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    ours = _ours(json.loads(theirs.to_str()), eod_id)
    return ours if ours is not None and _first_difference(ours, theirs) is None else None


def describe(tokenizer: Tokenizer, folder: Path) -> TokenizerInfo | None:
    """What tokenizer.json of an export in `folder` says, after its vocabulary is written there if it has no name.

    None if `load_tokenizer` could not make it again: it splits text in another way than GPT-2, or its ids have gaps.
    """
    ranks, file = tokenizer.ranks, None
    if tokenizer.name not in TOKENIZER_NAMES:
        is_own = sorted(ranks.values()) == list(range(tokenizer.eod_id)) and tokenizer.vocab_size == len(ranks) + 1
        if not is_own or not _is_gpt2_pattern(tokenizer.encoding._pat_str):
            return None
        file = f"{tokenizer.name.removesuffix('.tiktoken')}.tiktoken"
        write_rank_file(ranks, folder / file)
    return TokenizerInfo(
        name=file or tokenizer.name,
        vocab_sha256=tokenizer.vocab_sha256,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        file=file,
    )


def _ours(tree: Mapping[str, Any], eod_id: int | None) -> Tokenizer | None:
    """The tokenizer that a tokenizer.json describes, if it is a byte-level BPE."""
    pattern = _pattern(tree.get("pre_tokenizer"))
    if tree["model"]["type"] != "BPE" or tree.get("normalizer") or pattern is None or eod_id is None:
        return None
    special = {token["content"]: token["id"] for token in tree["added_tokens"]}
    vocab = {token: rank for token, rank in tree["model"]["vocab"].items() if token not in special and rank != eod_id}
    try:
        ranks: Ranks = {token_bytes(token): rank for token, rank in vocab.items()}
        merged = [ranks[token_bytes("".join(_pair(merge)))] for merge in tree["model"]["merges"]]
    except KeyError:
        return None
    if not BYTE_RANKS.keys() <= ranks.keys() or merged != sorted(merged):  # merges in another order than by rank
        return None
    # tiktoken knows the end of a document by this text, whatever the file calls it.
    special = {token: rank for token, rank in special.items() if rank != eod_id} | {END_OF_DOCUMENT: eod_id}
    sha256 = vocabulary_sha256(ranks)
    name, end = _NAMED.get(sha256, (_UNNAMED, eod_id))
    name = name if end == eod_id else _UNNAMED
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer(name, encoding, sha256)


def _pair(merge: str | list[str]) -> list[str]:
    """Earlier versions of the library wrote a pair as one text."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _pattern(pre_tokenizer: Any) -> str | None:
    """How a pre-tokenizer splits text before its bytes become characters; None if it does other things, too."""
    parts = [pre_tokenizer or {}]
    if parts[0].get("type") == "Sequence":
        parts = parts[0]["pretokenizers"]
    *splits, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    (split, *more) = splits
    regex = split.get("pattern", {}).get("Regex")
    known = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return regex.replace(r"\z", "$") if known and regex and not more and not last.get("use_regex", True) else None


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    return {name: tokenizer.encoding.encode_single_token(name) for name in tokenizer.encoding.special_tokens_set}


def _merges(ranks: Ranks) -> Iterator[tuple[bytes, bytes]]:
    """The pairs that tokens arise from, in the order in which they merge."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merged(token, ranks, rank)
        if len(parts) == 2:
            yield parts[0], parts[1]
        else:  # no text leads to it by pairs of lower rank; then by any pair
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            yield from (pair for pair in pairs if pair[0] in ranks and pair[1] in ranks)


def _merged(token: bytes, ranks: Ranks, below: int) -> list[bytes]:
    """The bytes of `token` after all merges of a rank below `below`: lowest first, the leftmost of equals."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        lowest = min(candidates)
        if lowest >= below:
            break
        at = candidates.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _is_gpt2_pattern(pattern: str) -> bool:
    """Whether text is split as GPT-2's own code does it; tiktoken's versions write that in different ways."""
    plain = pattern.replace("++", "+")
    return plain in (
        GPT2_PATTERN.replace("++", "+"),
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    )


def _onigurumas(pattern: str) -> str:
    r"""tiktoken's pattern for Oniguruma, which tokenizers uses: there {1,3}+ is not possessive, and $ ends a line."""
    return re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern).replace("$", r"\z")


def _first_difference(ours: Tokenizer, theirs: tokenizers.Tokenizer) -> str | None:
    """A text that the two encode in different ways, out of those of the proof; None if there is none."""
    special = ours.encoding.special_tokens_set
    texts = _all_proof_texts()
    for text in texts[:: max(1, len(texts) // PROOF_TEXTS)]:
        if not any(token in text for token in special) and theirs.encode(
            text, add_special_tokens=False
        ).ids != ours.encode(text):
            return text[:40]
    return None


@functools.cache
def _all_proof_texts() -> list[str]:
    return list(proof_texts())
