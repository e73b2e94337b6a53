"""Every file in configs/data/: it loads as --config does, and keeps and removes what its kind of text asks for."""

import random
from pathlib import Path

import pytest

from megagpt.config.loading import load_section
from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.screening import Screened, Screening
from tests.unit.corpus.filters import texts

FOLDER = Path(__file__).parents[3] / "configs/data"
PRESETS = ["books", "code", "permissive", "web", "wikipedia"]


def load(preset: str) -> CorpusConfig:
    overrides = [("input", ["texts"]), ("output", "dataset")]
    return load_section(CorpusConfig, FOLDER / f"{preset}.yaml", overrides)


def screened(preset: str, text: str) -> Screened:
    config = load(preset)
    return Screening(config.clean, config.filter, config.decontaminate)(text)


def removed_for(preset: str, text: str) -> str | None:
    reason = screened(preset, text).reason
    return reason.key if reason else None


def test_there_is_a_preset_for_each_kind() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_loads_and_names_how_it_is_used(preset: str) -> None:
    config = load(preset)
    assert config.clean.enabled
    assert config.filter.enabled == (preset != "permissive")
    assert f"--config configs/data/{preset}.yaml" in (FOLDER / f"{preset}.yaml").read_text()


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("web", texts.PROSE),
        ("web", texts.WIKIPEDIA),
        ("wikipedia", texts.WIKIPEDIA),
        ("wikipedia", texts.GERMAN),
        ("code", texts.PYTHON),
        ("permissive", texts.MENU),
        ("permissive", "short"),
    ],
)
def test_what_a_preset_is_made_for_stays_as_it_is(preset: str, text: str) -> None:
    found = screened(preset, text)
    assert (found.text, found.reason) == (text.strip("\n"), None)


def test_a_long_text_stays_among_books_and_a_page_does_not() -> None:
    rng = random.Random(0)
    words = sorted({word.strip(".,:;").lower() for word in (texts.PROSE + texts.WIKIPEDIA).split()})
    novel = " ".join(["the " + " ".join(rng.choices(words, k=11)) + "." for _ in range(9000)])  # 108,000 words
    assert removed_for("books", novel) is None
    assert removed_for("web", novel) == "filter.too_many_words"
    assert removed_for("books", texts.PROSE) == "filter.too_few_words"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (texts.MENU, "filter.short_lines"),
        (texts.SPAM, "filter.top_2gram"),
        (texts.GERMAN, "filter.language"),
        (texts.PROSE[:200], "filter.too_few_words"),
        ("Lorem ipsum dolor sit amet. " + texts.PROSE, "filter.lorem_ipsum"),
        (texts.PROSE + "\nPlease enable JavaScript.\nWe use cookies.\nPrivacy policy.", "filter.boilerplate_lines"),
        (texts.PROSE * 2, "filter.duplicate_lines"),
        (" ".join(texts.PROSE.split()) * 2, "filter.duplicate_5grams"),
    ],
)
def test_pages_that_are_no_text_go_for_the_right_reason(text: str, reason: str) -> None:
    assert removed_for("web", text) == reason


def test_addresses_are_masked_in_pages_and_not_in_books() -> None:
    text = texts.PROSE + "\nWrite to keeper@lighthouse.example.com, from 8.8.8.8.\n"
    assert "Write to <email>, from <ip>." in screened("web", text).text
    assert "keeper@lighthouse.example.com" in screened("books", text).text
