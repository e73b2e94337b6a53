"""The page of a study: its numbers against the formula, safe with hostile names, and nothing that it loads."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megagpt.errors import UsageError
from megagpt.scaling.pictures import HATCHES, MARKERS
from megagpt.scaling.report import write_report
from megagpt.scaling.study import load_study
from tests.unit.scaling.fake_studies import create, measured_study, write_study
from tools.scaling import app

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Cells of tables, row by row, and what a page loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "small":
            self.rows[-1][-1] += "|"

    def handle_data(self, data):
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """Two curves, one of them with a name to be wary of and with a failed run."""
    folder = measured_study(
        tmp_path_factory.mktemp("strong"),
        "strong",
        lambda entry: 0.05 + 2 / entry.stored.ranks + 0.01 * np.log2(entry.stored.ranks),
        matrix={"size": {"small": {"model.num_layers": 1}, EVIL: {"model.num_layers": 3}}},
        ranks=[1, 2, 4, 8, 16],
    )
    entry = next(entry for entry in folder.entries if entry.stored.curve == EVIL and entry.stored.ranks == 4)
    attempt = entry.begin()
    entry.log(attempt).write_text(f"error: {EVIL} out of memory\n", encoding="utf-8")
    entry.end(attempt, -9, keep_checkpoints=False)
    return folder, write_report(folder)


def test_the_table_has_the_numbers_of_the_formula(strong):
    _, reported = strong
    page = Page(reported.page)
    _, header = [number for number, row in enumerate(page.rows) if row and row[0] == "Ranks"]  # of the second curve
    for ranks, row in zip((1, 2, 4, 8, 16), page.rows[header + 1 :], strict=False):
        truth = 0.05 + 2 / ranks + 0.01 * np.log2(ranks)
        cells = dict(zip([head.partition("|")[0] for head in page.rows[header]], row, strict=True))
        value, _, interval = cells["Time of a step"].partition("|")
        low, high = map(float, interval.split(" to "))
        assert cells["Ranks"] == str(ranks)
        assert low <= float(value) <= high
        assert float(value) == pytest.approx(truth, rel=0.01)
        efficiency = float(cells["Efficiency"].partition(" %")[0]) / 100
        assert efficiency == pytest.approx(2.05 / (truth * ranks), rel=0.02)
        assert cells["Batch"] == "64"
        assert float(cells["Memory"]) == 1.0


def test_a_failed_run_is_on_the_page_with_its_error_and_the_others_count(strong):
    _, reported = strong
    page = Page(reported.page)
    assert [f"{EVIL}, 4 ranks", "2", "-9", f"{EVIL} out of memory"] in [row[:4] for row in page.rows]
    (curve,) = [curve for curve in reported.results.curves if curve.name == EVIL]
    assert [point.ranks for point in curve.points] == [1, 2, 8, 16]
    assert any("failed with exit code -9" in line for line in reported.lines())
    assert "script" not in page.tags
    assert "Runs were started on this machine, on a chip." in page.text


def test_the_page_loads_nothing_and_carries_every_picture(strong):
    _, reported = strong
    page = Page(reported.page)
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    files = sorted(path.stem for path in reported.page.parent.glob("*.png"))
    assert files == ["efficiency", "prediction", "throughput", "time"]
    assert len(page.loaded) == len(files)


def test_pictures_are_not_empty_and_tell_curves_apart_without_colour(strong):
    _, reported = strong
    for path in reported.page.parent.glob("*.png"):
        gray = np.asarray(Image.open(path).convert("L"))
        assert min(gray.shape) > 400
        assert (gray < 100).mean() > 0.002
    assert len(set(MARKERS)) == len(MARKERS)
    assert len(set(HATCHES.values())) == len(HATCHES)


def test_the_json_file_says_what_the_page_says(strong):
    _, reported = strong
    found = json.loads((reported.page.parent / "results.json").read_text())
    for curve, stored in zip(reported.results.curves, found["curves"], strict=True):
        assert stored["name"] == curve.name
        for point, numbers in zip(curve.points, stored["points"], strict=True):
            assert numbers["step_seconds"]["value"] == pytest.approx(point.step_seconds.value)
            assert sum(numbers["parts"].values()) == pytest.approx(numbers["step_seconds"]["value"])
        predicted = stored["fit"]["predicted"]
        assert [one["ranks"] for one in predicted] == [32, 64], "64 sequences are for 64 ranks at most"
        for one in predicted:
            truth = 0.05 + 2 / one["ranks"] + 0.01 * np.log2(one["ranks"])
            assert one["step_seconds"]["low"] < truth < one["step_seconds"]["high"]


def test_a_weak_study_says_how_the_learning_rate_grows(tmp_path):
    folder = measured_study(tmp_path, "weak", lambda entry: 1.0, lr_scaling="sqrt", extrapolate_to=[100, 2, 1000])
    reported = write_report(folder)
    page = Page(reported.page)
    assert "learning rate grows with the square root of the batch" in page.text
    assert "Karp" not in page.text
    assert reported.extrapolated["tiny"] == [100, 1000]
    assert [row[2] for row in page.rows if row and row[0] in ("1", "8")] == ["64", "512"]


def test_a_study_of_which_nothing_has_finished_has_a_page(tmp_path):
    folder = create(tmp_path / "out", "strong", load_study(write_study(tmp_path)))
    page = Page(write_report(folder).page)
    assert "Nothing yet: no run has finished." in page.text
    assert len(re.findall("not started yet", page.text)) == 4
    assert page.loaded == []


def test_the_command_reports_a_study_and_refuses_what_is_none(strong, tmp_path, capsys):
    folder, reported = strong
    app(["report", str(folder.path)], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(reported.page)
    assert sum("efficiency" in line for line in lines) == 9
    with pytest.raises(UsageError, match="no study"):
        app(["report", str(tmp_path)], standalone_mode=False)
    path = write_study(tmp_path)
    with pytest.raises(UsageError, match=r"-p: options of sbatch need --slurm"):
        app(["weak", str(path), "--output", "x", "--", "-p"], standalone_mode=False)


def test_check_says_what_would_run_and_leaves_nothing_behind(tmp_path, capsys):
    path = write_study(tmp_path, ranks=[1], overrides={"train.device": "cpu"})
    app(["strong", str(path), "--output", str(tmp_path / "out"), "--check"], standalone_mode=False)
    assert re.fullmatch(r"tiny-1ranks-\w{8}: 1 rank on 1 node, global batch 64, lr 0.0003\n", capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
