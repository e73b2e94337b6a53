"""Unicode normal forms and work on lines, in a time and memory that grow linearly with any text.

The order of combining marks in a run of them costs the square of its length. Texts have a few in a row; what has more
than 30 is an attack or a picture. As in the Stream-Safe Text Format (Unicode Standard Annex #15, section 13), 30 of a
run stay; the rest goes, instead of being kept apart by marks of no meaning.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Literal

_MOST_MARKS = 30
_BLOCK_CHARACTERS = 1 << 14
_MARKS = range(0x300, 0x20000)  # where all characters of a combining class are
_DECOMPOSED_TO_MARKS = "\u0f73\u0f75\u0f81\uff9e\uff9f"  # of no combining class themselves
_BEYOND_TABLE = "\U00010000-\U0001ffff"  # for sets with such characters `re` has no table, and is slow


def normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    """The normal form of a text, of which a run of more than 30 combining marks keeps the first 30."""
    if not text.isascii():
        likely, exact = _too_many_marks()
        if likely.search(text):
            text = exact.sub(_first_marks, text)
    return unicodedata.normalize(form, text)


@functools.cache
def _too_many_marks() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds a run that is too long: one that may find others, but is fast, and the exact one."""
    marks = _DECOMPOSED_TO_MARKS + "".join(filter(unicodedata.combining, map(chr, _MARKS)))
    coarse = "".join(mark for mark in marks if ord(mark) < 0x10000) + _BEYOND_TABLE
    likely, exact = (re.compile(f"[{chars}](?:[{chars}]){{{_MOST_MARKS},}}") for chars in (coarse, marks))
    return likely, exact


def _first_marks(run: re.Match[str]) -> str:
    return unicodedata.normalize("NFD", run[0][:_MOST_MARKS])[:_MOST_MARKS]


def map_lines(change: Callable[[list[str]], list[str]], text: str) -> str:
    """The text with its lines as `change` makes them, some at a time: a list of all could take 80 times the text."""
    if len(text) <= _BLOCK_CHARACTERS:
        return "\n".join(change(text.split("\n")))
    blocks, start = [], 0
    while start <= len(text):
        end = text.find("\n", start + _BLOCK_CHARACTERS)
        end = len(text) if end < 0 else end
        blocks.append("\n".join(change(text[start:end].split("\n"))))
        start = end + 1
    return "\n".join(blocks)
