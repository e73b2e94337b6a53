"""Generated documents for the tests of the corpus, and independent definitions to compare with."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

WORDS = tuple(f"{stem}{ending}" for stem in ("al", "bor", "cen", "dru", "el", "fi", "gor") for ending in "abcdefghij")


def document(rng: random.Random, words: int) -> str:
    """Random words, in lines."""
    return " ".join(rng.choice(WORDS) + ("\n" if rng.random() < 0.1 else "") for _ in range(words))


def edited(text: str, rng: random.Random, changes: int) -> str:
    """`text` with some words replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), changes):
        words[place] = "edited" + str(rng.randrange(1000))
    return " ".join(words)


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
    """The set of runs of `size` words."""
    words = text.split()
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def jaccard(left: str, right: str) -> float:
    """Exact similarity of two texts' shingles."""
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def write_jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    """One document a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path
