"""Each filter: what it removes and what not, at its threshold, against counts by hand or plain definitions."""

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.corpus.config import FilterConfig
from megagpt.corpus.filters import CHECKS, first_failure, measured
from megagpt.corpus.filters.language import known_languages
from megagpt.corpus.filters.measured import Measured
from megagpt.corpus.reasons import REASONS, STAGES
from tests.unit.corpus.filters import texts

OFF = {
    name: None
    for name, field in FilterConfig.model_fields.items()
    if name.startswith(("min_", "max_")) and name != "min_language_probability"
} | {"lorem_ipsum": False}


def failure(text: str, **checks: Any) -> tuple[str, str] | None:
    """Name of the check that fails and what it says, with all others turned off."""
    found = first_failure(Measured(text), FilterConfig.model_validate(OFF | checks))
    return (found[0].name, found[1]) if found else None


def name(text: str, **checks: Any) -> str | None:
    found = failure(text, **checks)
    return found[0] if found else None


def test_with_everything_off_everything_stays() -> None:
    for text in ("", " ", "{", "a a a a a a a a a a a a\n" * 50, "lorem ipsum"):
        assert failure(text) is None


def test_every_check_has_a_reason_of_its_own_and_all_reasons_of_the_stage_are_checked() -> None:
    reasons = [reason for reason, _ in CHECKS]
    assert sorted(reasons) == sorted(reason for reason in REASONS if reason.stage == "filter")
    assert len({reason.key for reason in REASONS}) == len(REASONS) < 256
    assert {reason.stage for reason in REASONS} == set(STAGES)


@pytest.mark.parametrize(
    ("text", "fails", "passes", "reason", "detail"),
    [
        ("abcdef", {"min_characters": 7}, {"min_characters": 6}, "too_few_characters", "6 characters, fewer than 7"),
        ("abcdef", {"max_characters": 5}, {"max_characters": 6}, "too_many_characters", "6 characters, more than 5"),
        ("one two\nthree", {"min_words": 4}, {"min_words": 3}, "too_few_words", "3 words, fewer than 4"),
        ("one two\nthree", {"max_words": 2}, {"max_words": 3}, "too_many_words", "3 words, more than 2"),
        (
            "ab abcd",
            {"min_mean_word_length": 3.1},
            {"min_mean_word_length": 3},
            "short_words",
            "3.000 characters a word, less than 3.1",
        ),
        (
            "ab äbcd",
            {"max_mean_word_length": 2.9},
            {"max_mean_word_length": 3},
            "long_words",
            "3.000 characters a word, more than 2.9",
        ),
        ("# a #b c", {"max_hashes": 0.49}, {"max_hashes": 0.5}, "hashes", "0.500 hash signs a word, more than 0.49"),
        (
            "a... b… c d",
            {"max_ellipses": 0.4},
            {"max_ellipses": 0.5},
            "ellipses",
            "0.500 ellipses a word, more than 0.4",
        ),
        (
            "- a\n\n • b\n* c\nd",
            {"max_bullet_lines": 0.7},
            {"max_bullet_lines": 0.75},
            "bullet_lines",
            "0.750 of the lines begin with a bullet, more than 0.7",
        ),
        (
            "a...\nb… \n\nc. d\ne",
            {"max_ellipsis_lines": 0.4},
            {"max_ellipsis_lines": 0.5},
            "ellipsis_lines",
            "0.500 of the lines end with an ellipsis, more than 0.4",
        ),
        (
            "it's 12 + x_1 é __ (a) b",
            {"min_alphabetic_words": 0.7},
            {"min_alphabetic_words": 0.625},
            "not_alphabetic",
            "0.625 of the words have a letter, less than 0.7",
        ),
        (
            "The theory OF bees",
            {"min_stop_words": 3},
            {"min_stop_words": 2},
            "few_stop_words",
            "2 of the stop words, fewer than 3",
        ),
        ("text {x", {"curly_bracket": True}, {"curly_bracket": False}, "curly_bracket", "at character 5"),
        ("Lorem Ipsum dolor", {"lorem_ipsum": True}, {"lorem_ipsum": False}, "lorem_ipsum", "lorem ipsum"),
        (
            "Enable JavaScript\nour Privacy Policy\na\nb",
            {"max_boilerplate_lines": 0.49},
            {"max_boilerplate_lines": 0.5},
            "boilerplate_lines",
            "0.500 of the lines are boilerplate, more than 0.49",
        ),
        (
            'One is 1.5 or e.g.x. "Two?" Three!\nFour',
            {"min_sentences": 4},
            {"min_sentences": 3},
            "few_sentences",
            "3 sentences, fewer than 4",
        ),
        (
            'a.\nb\nc!\n"d"\n',
            {"min_punctuated_lines": 0.8},
            {"min_punctuated_lines": 0.75},
            "unpunctuated_lines",
            "0.750 of the lines end like a sentence, less than 0.8",
        ),
        (
            "123456789\n 1234567890\n12\n\nab",
            {"max_short_lines": 0.7, "short_line": 10},
            {"max_short_lines": 0.75, "short_line": 10},
            "short_lines",
            "0.750 of the lines have fewer than 10 characters, more than 0.7",
        ),
        (
            "a\nb\n a\nccc\na",
            {"max_duplicate_lines": 0.3},
            {"max_duplicate_lines": 0.4},
            "duplicate_lines",
            "0.400 of the lines are repeated, more than 0.3",
        ),
        (
            "a\nb\n a\nccc\naä\naä",
            {"max_duplicate_line_characters": 0.2},
            {"max_duplicate_line_characters": 0.3},
            "duplicate_line_characters",
            "0.300 of the characters are in repeated lines, more than 0.2",
        ),
        (
            "a\nb\n\nc\n \na\nb\n\n\nd",
            {"max_duplicate_paragraphs": 0.2},
            {"max_duplicate_paragraphs": 0.25},
            "duplicate_paragraphs",
            "0.250 of the paragraphs are repeated, more than 0.2",
        ),
        (
            "aaa\n\nb\n\naaa\n\nccc",
            {"max_duplicate_paragraph_characters": 0.2},
            {"max_duplicate_paragraph_characters": 0.3},
            "duplicate_paragraph_characters",
            "0.300 of the characters are in repeated paragraphs, more than 0.2",
        ),
    ],
)
def test_a_threshold_separates_what_stays_from_what_goes(
    text: str, fails: dict[str, Any], passes: dict[str, Any], reason: str, detail: str
) -> None:
    assert failure(text, **fails) == (reason, detail)
    assert failure(text, **passes) is None


# Runs of words, from the definitions in the paper and in repetition.py


def covered(words: list[str], size: int, chosen: list[int]) -> float:
    """Share of the words' characters in the runs that begin at `chosen`."""
    places = {place + i for place in chosen for i in range(size)}
    return sum(len(words[place]) for place in places) / sum(map(len, words))


def runs_of(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


def top_share_by_definition(text: str, size: int) -> float:
    words = text.split()
    runs = runs_of(words, size)
    counts = Counter(runs)
    if not counts or max(counts.values()) < 2:
        return 0
    frequent = [run for run in counts if counts[run] == max(counts.values())]  # in the order of the text
    top = max(frequent, key=lambda run: sum(map(len, run)))
    return covered(words, size, [place for place, run in enumerate(runs) if run == top])


def repeated_share_by_definition(text: str, size: int) -> float:
    words = text.split()
    runs = runs_of(words, size)
    repeated = [place for place, run in enumerate(runs) if run in runs[:place]]
    return covered(words, size, repeated) if repeated else 0


REPETITIVE = st.lists(st.sampled_from(["a", "bb", "ccc", "ää", "日本", "."]), max_size=60).flatmap(
    lambda words: st.lists(st.sampled_from([" ", "  ", "\n", "\n\n"]), min_size=len(words), max_size=len(words)).map(
        lambda spaces: "".join(itertools.chain.from_iterable(zip(words, spaces, strict=True)))
    )
)


@settings(max_examples=300)
@given(REPETITIVE, st.integers(2, 4), st.floats(0, 1))
def test_the_most_frequent_run_covers_what_the_definition_says(text: str, words: int, most: float) -> None:
    share = top_share_by_definition(text, words)
    expected = f"{share:.3f} of the words' characters are in one run of {words} words, more than {most:g}"
    found = failure(text, **{f"max_top_{words}gram": most})
    assert found == ((f"top_{words}gram", expected) if share > most else None)


@settings(max_examples=300)
@given(REPETITIVE, st.integers(5, 10), st.floats(0, 1))
def test_repeated_runs_cover_what_the_definition_says(text: str, words: int, most: float) -> None:
    share = repeated_share_by_definition(text, words)
    expected = f"{share:.3f} of the words' characters are in repeated runs of {words} words, more than {most:g}"
    found = failure(text, **{f"max_duplicate_{words}grams": most})
    assert found == ((f"duplicate_{words}grams", expected) if share > most else None)


@given(REPETITIVE)
def test_lines_and_paragraphs_repeat_as_the_definition_says(text: str) -> None:
    def shares(parts: list[str]) -> tuple[float, float]:
        again = [part for place, part in enumerate(parts) if part in parts[:place]]
        return len(again) / len(parts), sum(map(len, again)) / sum(map(len, parts))

    lines = [line.strip() for line in text.splitlines() if line.strip()]
    paragraphs = ["\n".join(lines) for lines in _groups(text)]
    for kind, parts in (("line", lines), ("paragraph", paragraphs)):
        if len(parts) > 1:
            count, characters = shares(parts)
            for key, share in ((f"{kind}s", count), (f"{kind}_characters", characters)):
                found = failure(text, **{f"max_duplicate_{key}": 0.0})
                assert (found is None) == (share == 0)
                assert found is None or found[1].startswith(f"{share:.3f} ")


def _groups(text: str) -> list[list[str]]:
    """Lines between blank lines, with the whitespace at the ends of the group removed."""
    groups = itertools.groupby(text.split("\n"), key=lambda line: bool(line.strip()))
    return [["\n".join(lines).strip()] for filled, lines in groups if filled]


def test_with_the_default_thresholds_a_text_that_is_said_twice_goes_for_its_runs() -> None:
    once = " ".join(texts.PROSE.split())
    assert first_failure(Measured(once), FilterConfig()) is None
    found = first_failure(Measured(f"{once} {once}"), FilterConfig())
    assert found is not None
    assert found[0].name == "duplicate_5grams"
    assert found[1].startswith("0.500 ")


# Languages


def test_a_language_that_is_not_wanted_goes() -> None:
    assert name(texts.PROSE, languages=["en"]) is None
    assert name(texts.GERMAN, languages=["de", "fr"]) is None
    found = failure(texts.GERMAN, languages=["en"])
    assert found is not None
    assert found[0] == "language"
    assert found[1].startswith("language de (")
    assert found[1].endswith(", en (0.00)")


def test_an_unknown_language_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"no language 'english'; choose from .*, en,"):
        FilterConfig(languages=["english"])
    assert {"en", "de", "zh", "ar", "hi"} <= known_languages()


def test_scores_agree_with_the_librarys_own() -> None:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    from megagpt.corpus.filters.language import _identifier

    original = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    for text in (texts.PROSE, texts.GERMAN, texts.MENU, "bonjour", ""):
        expected = dict(original.rank(text))
        assert dict(_identifier().rank(text)) == pytest.approx(expected, abs=1e-4)


# Measuring


def test_of_a_long_document_the_beginning_is_looked_at_but_all_words_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "SAMPLE", 10)
    document = Measured("one two three four five six\nseven eight")
    assert document.words == ["one", "two", "th"]
    assert document.num_words == 8


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t日é"), max_size=80))
def test_lengths_of_words_are_in_characters(text: str) -> None:
    words = [word.decode() for word in text.encode().split()]
    assert Measured(text).word_lengths.tolist() == list(map(len, words))


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n.#…-"), max_size=80))
def test_no_text_breaks_the_filters(text: str) -> None:
    thresholds = {"min_words": None, "min_characters": None, "max_short_lines": 0.9, "min_sentences": 1}
    first_failure(Measured(text), FilterConfig.model_validate(thresholds))
