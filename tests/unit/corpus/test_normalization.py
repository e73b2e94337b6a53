"""Normal forms are Unicode's, but for endless runs of combining marks; any text takes a time that grows linearly."""

import time
import unicodedata
from typing import Literal

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megagpt.corpus import clean, normalization
from megagpt.corpus.normalization import map_lines, normalize

FORMS: list[Literal["NFC", "NFKC"]] = ["NFC", "NFKC"]
MARKED = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("ae\u0301\u0316\u0344\u0f73\uff9e\U0001d165")
)


@pytest.mark.parametrize("form", FORMS)
@given(MARKED)
def test_a_text_of_few_marks_in_a_row_has_the_normal_form_of_unicode(form: Literal["NFC", "NFKC"], text: str) -> None:
    if "m" * 31 not in "".join("m" if is_mark(character) else "." for character in text):
        assert normalize(form, text) == unicodedata.normalize(form, text)


def is_mark(character: str) -> bool:
    return unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) > 0


def test_every_character_that_unicode_sorts_as_a_mark_is_counted_and_no_other() -> None:
    _, exact = normalization._too_many_marks()
    for character in map(chr, range(0x110000)):
        assert (exact.fullmatch(character * 31) is not None) == is_mark(character)


@pytest.mark.parametrize("mark", ["\u0301", "\u0316", "\uff9e", "\U0001d165", "\U0001e944"])
def test_of_a_run_of_marks_the_first_30_stay(mark: str) -> None:
    for count, left in ((30, 30), (31, 30), (1000, 30)):
        assert normalize("NFC", f"q{mark * count}z q{mark}") == f"q{mark * left}z q{mark}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unit", ["\u0301\u0316", "\u0344\u0f73", "\uff9e\u0301", "\U0001d165\u0301", "\u0f73"])
def test_a_long_run_of_marks_takes_no_long_time(form: Literal["NFC", "NFKC"], unit: str) -> None:
    start = time.monotonic()
    assert len(normalize(form, "a" + unit * 200_000)) < 100
    assert time.monotonic() - start < 2


@settings(max_examples=300, deadline=None)
@example("日本\nÃ x", 30)  # bad at the beginning of a line only
@example("日本\n\x92x", 30)
@given(
    st.lists(
        st.sampled_from(["cafÃ©", "Ã ", "Â ", "œ", "naïve", "plain", "â€œq”", "日本", "\x85", "\x92", "вЂ", "x", " "])
        | st.just("\n"),
        max_size=40,
    ).map("".join),
    st.integers(1, 30),
)
def test_lines_are_repaired_as_ftfy_repairs_each_wherever_the_text_is_cut_into_blocks(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalization, "_BLOCK_CHARACTERS", size)
        found = map_lines(clean._repaired, text)
    assert found == "\n".join(ftfy.fix_text(line, clean._REPAIR) for line in text.split("\n"))


@given(st.text("ab\n"), st.integers(1, 10))
def test_every_line_is_changed_once(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(normalization, "_BLOCK_CHARACTERS", size)
        found = map_lines(lambda lines: [f"<{line}>" for line in lines], text)
    assert found == "\n".join(f"<{line}>" for line in text.split("\n"))
