"""report.json and report.html, against a recount from the lists and indices of the dataset."""

import json
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megagpt.data.indexed import IndexedDataset
from megagpt.errors import UserError
from tests.unit.corpus.test_pipeline import contents, interrupt, removed_of, run
from tests.unit.corpus.texts import document, edited, write_jsonl

EVIL = "</pre><script>alert(1)</script> & <b>\x1b[31m \u202eevil\u0085 \u00e9\U0001f600"
FRENCH = "Le chat dort sur la table de la cuisine pendant que la pluie tombe doucement sur le jardin. "
ENGLISH = "The cat sleeps on the table of the kitchen while the rain falls softly on the garden outside. "
OPTIONS: dict[str, Any] = {
    "max_bad": 0.5,
    "validation_fraction": 0.2,
    "clean": {"enabled": False},
    "filter": {"enabled": True, "languages": ["en", "la", "eo"], "min_words": 10, "min_language_probability": 0.5}
    | dict.fromkeys(("min_stop_words", "max_top_2gram", "max_top_3gram", "max_top_4gram"))
    | {f"max_duplicate_{words}grams": None for words in range(5, 11)},
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Documents of two languages, too short ones, ones that act on a page, near and exact copies, broken lines."""
    rng = random.Random(3)
    texts = [ENGLISH + document(rng, rng.randrange(200, 300)) for _ in range(40)]
    near = [edited(text, rng, 2) for text in texts[:6]] + [edited(texts[0], rng, 2) for _ in range(4)]
    short = [f"{EVIL} {number}" for number in range(7)]
    french = [FRENCH * number for number in range(1, 5)]
    write_jsonl(tmp_path / "in/a.jsonl", [*texts[:20], *short[:2], *french])
    write_jsonl(tmp_path / "in/b.jsonl", [*texts[20:], *near, *texts[5:9], *short[2:]])
    with open(tmp_path / "in/b.jsonl", "a") as file:
        file.write("broken\n" * 5 + '{"text": 1}\n')
    (tmp_path / "in/empty.txt").write_text("")
    return tmp_path


def json_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text("ascii"))


def lengths_of(folder: Path) -> list[int]:
    datasets = [IndexedDataset(folder / split) for split in ("train", "validation")]
    return [len(dataset.document(number)) for dataset in datasets for number in range(dataset.num_documents)]


def test_the_numbers_are_those_of_the_lists_and_indices(corpus: Path) -> None:
    run(corpus, **OPTIONS)
    report, removed, lengths = json_of(corpus / "out"), removed_of(corpus / "out"), lengths_of(corpus / "out")
    assert {entry["reason"]: entry["documents"] for entry in report["removed"]} == Counter(
        record["reason"] for record in removed
    )
    assert {entry["stage"] for entry in report["removed"]} == {"filter", "exact", "near"}
    assert report["counts"]["documents"] == len(removed) + len(lengths) == 40 + 10 + 7 + 4 + 4
    assert report["tokens"] == sum(lengths)
    texts = [json.loads(line)["text"] for name in "ab" for line in lines_of(corpus / f"in/{name}.jsonl")]
    assert report["counts"]["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert sum(entry["bytes"] for entry in report["removed"]) == report["counts"]["text_bytes"] - sum(
        length - 1 for length in lengths
    )
    for entry in report["removed"]:  # the tokenizer makes a token of every byte, and one ends the document
        assert entry["estimated_tokens"] == entry["bytes"] + entry["documents"]
    funnel = report["funnel"]
    assert [step["stage"] for step in funnel] == ["read", "clean", "filter", "decontaminate", "exact", "near"]
    for name in ("documents", "bytes", "estimated_tokens"):
        assert funnel[0][name] - sum(step[f"removed_{name}"] for step in funnel) == funnel[-1][name]
    assert funnel[-1]["documents"] == len(lengths)
    assert funnel[-1]["estimated_tokens"] == sum(lengths)


def lines_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith('{"id"')]


def test_the_histogram_counts_every_document_in_its_power_of_two(corpus: Path) -> None:
    run(corpus, **OPTIONS | {"dedup": {"method": "none"}, "filter": {"enabled": False}})
    bins, lengths = json_of(corpus / "out")["lengths"], lengths_of(corpus / "out")
    for entry in bins:
        assert entry["documents"] == sum(entry["least"] <= length <= entry["most"] for length in lengths)
    assert sum(entry["documents"] for entry in bins) == len(lengths)
    assert [entry["least"] for entry in bins[1:]] == [entry["most"] + 1 for entry in bins[:-1]]


def test_languages_are_counted_where_the_filter_looked_for_them(corpus: Path) -> None:
    run(corpus, **OPTIONS)
    languages = {entry["language"]: entry for entry in json_of(corpus / "out")["languages"]}
    short = 7
    assert sum(entry["documents"] for entry in languages.values()) == 65 - short
    assert languages["fr"]["documents"] == 4
    assert languages["fr"]["bytes"] == sum(len((FRENCH * number).encode()) for number in range(1, 5))
    run(corpus, "plain", **OPTIONS | {"filter": {"enabled": False}})
    assert json_of(corpus / "plain")["languages"] == []
    assert "<h2>Languages" not in (corpus / "plain/report.html").read_text()


@pytest.mark.parametrize("chunk_mb", [0.002, 0.005])
def test_examples_are_the_first_whatever_the_input_is_cut_into(corpus: Path, chunk_mb: float) -> None:
    run(corpus, "whole", **OPTIONS)
    report = run(corpus, "cut", execution={"chunk_mb": chunk_mb}, **OPTIONS)
    assert report.stages[0].tasks > 5
    whole, cut = json_of(corpus / "whole"), json_of(corpus / "cut")
    for name in ("removed", "lengths", "languages", "quarantine", "funnel", "counts", "splits", "config", "plan_hash"):
        assert cut[name] == whole[name], name
    assert cut["near_duplicates"]["largest"] == whole["near_duplicates"]["largest"]
    by_reason: dict[str, list[str]] = {}
    for record in removed_of(corpus / "whole"):
        by_reason.setdefault(record["reason"], []).append(record["id"])
    for entry in whole["removed"]:
        assert [example["id"] for example in entry["examples"]] == by_reason[entry["reason"]][:3]


def test_duplicates_are_shown_beside_what_stays_in_their_stead(corpus: Path) -> None:
    run(corpus, **OPTIONS)
    report = json_of(corpus / "out")
    survivors = {record["id"]: record["survivor"] for record in removed_of(corpus / "out")}
    (near,) = [entry for entry in report["removed"] if entry["key"] == "near"]
    for example in near["examples"]:
        assert example["survivor"] == survivors[example["id"]]
        text, survivor = example["text"], example["survivor_text"]
        assert text != survivor
        assert text[:20] == survivor[:20]
        assert "edited" in text
    sizes = Counter(survivor for survivor in survivors.values() if survivor)
    largest = report["near_duplicates"]["largest"]
    assert {cluster["survivor"]: cluster["documents"] - 1 for cluster in largest} == sizes
    assert [cluster["documents"] for cluster in largest] == sorted((size + 1 for size in sizes.values()), reverse=True)
    assert report["near_duplicates"]["clusters"] == len(sizes)


def test_what_could_not_be_read_is_shown_with_its_first_places(corpus: Path) -> None:
    run(corpus, **OPTIONS)
    records = [json.loads(line) for line in (corpus / "out/quarantine.jsonl").read_text().splitlines()]
    quarantine = {entry["reason"]: entry for entry in json_of(corpus / "out")["quarantine"]}
    assert {reason: entry["records"] for reason, entry in quarantine.items()} == Counter(
        record["reason"] for record in records
    )
    assert quarantine["malformed JSON"]["examples"] == [r for r in records if r["reason"] == "malformed JSON"][:3]
    assert (quarantine["empty"]["is_harmless"], quarantine["wrong type"]["is_harmless"]) == (True, False)


class Page(HTMLParser):
    """The tags of a page, and the texts of its <pre> elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []
        self._in_text = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag == "pre":
            self._in_text = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_text = self._in_text and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._in_text:
            self.texts[-1] += data


def test_the_page_shows_texts_that_would_act_on_it_as_they_are(corpus: Path) -> None:
    run(corpus, **OPTIONS)
    source = (corpus / "out/report.html").read_bytes().decode()
    page = Page(source)
    assert f"{EVIL} 0".replace("\x1b", "\u241b") in page.texts
    assert page.tags["script"] == page.tags["b"] - source.count("<b>") == 0
    assert not re.search(r"https?:|@import|url\(", source)
    assert all(character.isprintable() or character in "\n\t\u202e\u0085" for character in source)


def test_rates_and_times_count_this_run_alone(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = run(corpus, "fresh", **OPTIONS)
    extract = fresh.stages[0]
    assert (extract.documents, extract.bytes) == (65, fresh.counts["input_bytes"])
    assert extract.bytes
    assert extract.megabytes_per_second == pytest.approx(extract.bytes / 1e6 / extract.seconds)
    with monkeypatch.context() as patch:
        patch.setattr("megagpt.corpus.pipeline.join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, **OPTIONS)
    report = run(corpus, **OPTIONS)
    assert [stage.documents for stage in report.stages] == [None] * len(report.stages)
    assert report.stages[0].reused == report.stages[0].tasks
    assert contents(corpus / "out") == contents(corpus / "fresh")
    assert sum(report.work_bytes.values()) > report.counts["kept_text_bytes"]
    assert set(report.work_bytes) == {stage.name for stage in report.stages} - {"join"}


def test_the_report_is_no_obstacle_to_replacing_a_dataset(corpus: Path) -> None:
    run(corpus, **OPTIONS)
    run(corpus, overwrite=True, **OPTIONS | {"seed": 1})
    manifest = json.loads((corpus / "out/manifest.json").read_text())
    assert not {"report.json", "report.html"} & set(manifest["checksums"])
    (corpus / "out/report.json").rename(corpus / "out/notes.json")
    with pytest.raises(UserError, match=r"'notes\.json' in it is no part"):
        run(corpus, overwrite=True, **OPTIONS | {"seed": 2})
