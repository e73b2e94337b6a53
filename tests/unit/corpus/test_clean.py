"""Cleaning: what it repairs, what it must never touch."""

import unicodedata

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.clean import clean
from megagpt.corpus.config import CleanConfig

NO_REPAIR = CleanConfig(repair_encoding=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def test_indentation_tabs_and_inner_spaces_of_code_stay() -> None:
    code = "def f(x):\n\tif x:\n\t\treturn  x   # comment\n\n    y = 1\n"
    assert clean(code) == code.rstrip("\n")


def test_the_first_lines_indentation_stays_though_blank_lines_before_it_go() -> None:
    assert clean("\n \n    indented\nnot") == "    indented\nnot"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc", "a\nb\nc"),
        ("page one\fpage two\vrest", "page one\npage two\nrest"),
        ("a\u2028b\u2029c é", "a\nb\nc é"),
        ("trailing  \t\nspace\u00a0", "trailing\nspace"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("a\n\n\nb", "a\n\n\nb"),
        ("a\x00b\x07c\x7fd\ufeffe\ufff9f\uffffg", "abcdefg"),
        ("windows\x92s", "windows’s"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("e\u0301", "é"),
        ("e\x07\u0301", "é"),
        ("cafÃ© au lait\nplain", "café au lait\nplain"),
        ("Ã\x85ngstrÃ¶m", "Ångström"),
        ("“quotes” ﬁne &amp; ＦＵＬＬ", "“quotes” ﬁne &amp; ＦＵＬＬ"),
        (" \n\t\n\x07", ""),
        ("", ""),
    ],
)
def test_each_kind_of_damage_is_repaired_and_nothing_else(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_without_repair_wrongly_decoded_text_stays() -> None:
    assert clean("cafÃ© au lait", NO_REPAIR) == "cafÃ© au lait"


@given(TEXT)
def test_cleaned_text_is_normal_and_has_no_control_characters_or_spaces_at_line_ends(text: str) -> None:
    cleaned = clean(text)
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not [c for c in cleaned if unicodedata.category(c) == "Cc" and c not in "\n\t"]
    assert "\n\n\n\n" not in cleaned
    assert cleaned == cleaned.strip("\n")
    assert all(line == line.rstrip() for line in cleaned.split("\n"))


def test_without_repair_the_next_line_character_breaks_lines_and_other_c1_controls_go() -> None:
    assert clean("a\x85b\x92c", NO_REPAIR) == "a\nbc"


@given(st.text(st.characters(exclude_categories=["C"]) | st.sampled_from(" \t\n\r\f"), max_size=200))
def test_without_repair_every_visible_character_stays_in_order(text: str) -> None:
    cleaned = clean(text, NO_REPAIR)
    assert "".join(cleaned.split()) == "".join(unicodedata.normalize("NFC", text).split())


@given(TEXT)
def test_cleaning_clean_text_again_changes_nothing(text: str) -> None:
    once = clean(text, NO_REPAIR)
    assert clean(once, NO_REPAIR) == once


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["cafÃ©", "naïve", "plain", "â€œquoteâ€\x9d", "日本語", "Ã\x85", " ", "\n"]), max_size=12)
)
def test_the_repair_is_ftfys_own_of_the_whole_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    expected = ftfy.fix_text(
        text,
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization="NFC",
    )
    assert clean(text).split() == expected.split()
