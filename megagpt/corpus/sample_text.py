"""Corpora of any size, for measurements and tests, from the text that every Python installation carries.

A document is paragraphs of documentation (docstrings of the standard library, pydoc's topics) in random order, with an
invented word now and then, so that the vocabulary grows with the corpus as it does in real text (Heaps 1978). A given
share of the documents are exact copies or edited copies of earlier ones. Who copies whom, and the exact Jaccard
similarity of their shingles, is known. The same arguments give the same bytes on the same version of Python.
"""

import functools
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megagpt.errors import UserError

TRUTH_NAME = "truth.json"
SHINGLE_WORDS = 5

_TESTS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_SHORTEST_PARAGRAPH, _LONGEST_PARAGRAPH = 80, 1000  # characters
_INVENTED_EVERY = 100  # words
_SYLLABLES = ("ba", "chi", "dor", "el", "fun", "gra", "hin", "jo", "kal", "lem", "mi", "nor", "pel", "qua", "ri", "stu")
_MOST_REPLACED, _MOST_CUT = 0.06, 0.4  # of the words: a similarity of about 0.55 or 0.6
_ORIGINALS = 1000  # documents, drawn from all so far, that copies are made of


@dataclass(frozen=True)
class Sample:
    """A document."""

    number: int
    """Its place in the corpus, from 0."""
    text: str
    original: int | None = None
    """Number of the document that it was made from."""
    jaccard: float | None = None
    """Exact similarity to that document's text, by runs of 5 words; 1: an exact copy."""


@dataclass(frozen=True)
class Copy:
    """A planted duplicate; see `Sample`."""

    number: int
    original: int
    jaccard: float


@dataclass(frozen=True)
class SampleCorpus:
    """What was written."""

    documents: int
    text_bytes: int
    copies: list[Copy]


def library_sources() -> Iterator[Path]:
    """The modules of the standard library but its tests, in order."""
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        if not _TESTS & set(source.relative_to(library).parts):
            yield source


def sample_documents(
    seed: int, document_bytes: int = 8000, exact_share: float = 0.0, near_share: float = 0.0
) -> Iterator[Sample]:
    """Documents of about `document_bytes`, without end; the shares are of all documents.

    Of the edited copies, half have single words replaced, one to 6% of them, and half have one stretch of words cut
    out, one to 40% of them.
    """
    rng = random.Random(seed)
    originals: list[Sample] = []
    fresh = number = 0
    while True:
        kind = rng.random()
        if originals and kind < exact_share + near_share:
            original = rng.choice(originals)
            text = original.text if kind < exact_share else _edited(original.text, rng)
            yield Sample(number, text, original.number, jaccard(original.text, text))
        else:
            sample = Sample(number, _document(rng, document_bytes))
            fresh += 1
            if len(originals) < _ORIGINALS:  # sampling from a stream (Vitter 1985, algorithm R)
                originals.append(sample)
            elif (place := rng.randrange(fresh)) < _ORIGINALS:
                originals[place] = sample
            yield sample
        number += 1


def write_sample_corpus(
    folder: Path,
    text_bytes: int,
    seed: int = 0,
    document_bytes: int = 8000,
    exact_share: float = 0.05,
    near_share: float = 0.05,
    files: int = 4,
) -> SampleCorpus:
    """Write `files` .jsonl files with at least `text_bytes` of text together, with keys `id` (the number) and `text`,
    and truth.json. Holds in memory the documents that copies may be made of, and the list of copies. What an earlier
    call left in the folder is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part_*.jsonl"):
        old.unlink()
    samples = sample_documents(seed, document_bytes, exact_share, near_share)
    copies: list[Copy] = []
    documents = written = 0
    for file in range(files):
        with open(folder / f"part_{file:02d}.jsonl", "w", encoding="utf-8") as lines:
            while written < text_bytes * (file + 1) / files:
                sample = next(samples)
                lines.write(json.dumps({"id": sample.number, "text": sample.text}) + "\n")
                written += len(sample.text.encode())
                documents += 1
                if sample.original is not None and sample.jaccard is not None:
                    copies.append(Copy(sample.number, sample.original, sample.jaccard))
    corpus = SampleCorpus(documents, written, copies)
    (folder / TRUTH_NAME).write_text(json.dumps(asdict(corpus)), encoding="utf-8")
    return corpus


def jaccard(left: str, right: str) -> float:
    """Exact similarity of two texts, 0 to 1: shared runs of 5 words over all of them."""
    if left == right:
        return 1.0
    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def shingles(text: str) -> set[tuple[str, ...]]:
    """The set of runs of 5 words; a shorter text is one run."""
    words = text.split()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


@functools.cache
def _paragraphs() -> tuple[str, ...]:
    """All different paragraphs of this Python's documentation. UserError: it comes without its sources."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    for source in library_sources():
        texts += _DOCSTRING.findall(source.read_text(encoding="utf-8", errors="replace"))
    paragraphs = (paragraph.split() for text in texts for paragraph in text.split("\n\n"))
    shortened = (" ".join(words)[:_LONGEST_PARAGRAPH] for words in paragraphs)
    found = tuple(dict.fromkeys(paragraph for paragraph in shortened if len(paragraph) >= _SHORTEST_PARAGRAPH))
    if len(found) < 1000:
        raise UserError(f"{sysconfig.get_path('stdlib')}: Python's library is there without its sources")
    return found


def _document(rng: random.Random, size: int) -> str:
    paragraphs: list[str] = []
    while size > 0:
        paragraph = rng.choice(_paragraphs())[:size]
        words = paragraph.split(" ")
        for place in range(rng.randrange(_INVENTED_EVERY), len(words), _INVENTED_EVERY):
            words[place] = _invented(rng)
        paragraphs.append(" ".join(words))
        size -= len(paragraph) + 2
    return "\n\n".join(paragraphs)


def _edited(text: str, rng: random.Random) -> str:
    words = re.split(r"( |\n\n)", text)  # words at even places, what separates them at odd ones
    count = (len(words) + 1) // 2
    if rng.random() < 0.5:
        cut = rng.randint(1, max(1, int(count * _MOST_CUT)))
        start = rng.randint(0, count - cut)
        del words[2 * start : 2 * (start + cut)]
    else:
        for place in rng.sample(range(count), rng.randint(1, max(1, int(count * _MOST_REPLACED)))):
            words[2 * place] = _invented(rng)
    return "".join(words)


def _invented(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4)))
