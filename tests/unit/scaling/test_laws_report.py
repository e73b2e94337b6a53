"""The page of a ladder: its numbers against the law that made the losses, failures kept, and nothing that it loads."""

import json

import numpy as np
import pytest
from PIL import Image

from megagpt.scaling.laws.ladder import read_ladder
from megagpt.scaling.laws.report import write_laws_report
from megagpt.scaling.laws.study import load_laws
from tests.unit.scaling.fake_ladders import LAW, create_ladder, finish_run, finished_ladder, write_ladder
from tests.unit.scaling.test_report import Page
from tools.scaling import app

EVIL = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A finished ladder, and its report."""
    folder = finished_ladder(tmp_path_factory.mktemp("ladder"))
    return folder, write_laws_report(folder)


def test_the_largest_runs_are_predicted_by_the_others(ladder):
    _, reported = ladder
    held = reported.findings.held_out
    assert {one.run.size for one in held} == {"w32", "w64", "w128", "w256"}
    assert {round(one.run.flops / 6.4e13, 1) for one in held} == {1.0}
    for one in held:
        truth = float(LAW.loss(one.run.parameters, one.run.tokens))
        assert one.predicted.value == pytest.approx(truth, rel=0.005), "of 0.2 % noise"
        assert one.predicted.low < truth < one.predicted.high
    rows = [row for row in Page(reported.page).rows if row and row[0] == "w128, 6.4e13 FLOPs"]
    assert rows[0][1] == f"{next(one.run.loss for one in held if one.run.size == 'w128'):.4f}"


def test_the_page_has_the_law_and_the_best_sizes(ladder):
    _, reported = ladder
    page = Page(reported.page)
    (ours,) = [row for row in page.rows if row and row[0] == "this ladder"]
    for cell, truth in zip(ours[1:6], (LAW.E, LAW.A, LAW.B, LAW.alpha, LAW.beta), strict=True):
        value, _, interval = cell.partition("|")
        low, high = map(float, interval.split(" to "))
        assert low <= float(value) <= high
        assert float(value) == pytest.approx(truth, rel=0.25)
    assert any(row and row[0] == "Hoffmann et al. 2022" and row[1] == "1.69" for row in page.rows)
    for best in reported.findings.best:
        assert best.parameters.value == pytest.approx(
            LAW.optimum(best.flops, reported.findings.cost).parameters, rel=0.2
        )
        assert best.by_isoflop == pytest.approx(best.parameters.value, rel=0.5)
    assert [best.flops for best in reported.findings.best] == pytest.approx([6.4e13, 6.4e14, 6.4e15], rel=0.02)


def test_the_page_loads_nothing_and_carries_every_picture(ladder):
    _, reported = ladder
    page = Page(reported.page)
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    files = sorted(reported.page.parent.glob("*.png"))
    assert [path.stem for path in files] == ["best_size", "isoflop", "loss", "residuals"]
    assert len(page.loaded) == len(files)
    for path in files:
        gray = np.asarray(Image.open(path).convert("L"))
        assert (gray < 100).mean() > 0.002


def test_the_json_file_says_what_the_page_says(ladder):
    _, reported = ladder
    found = json.loads((reported.page.parent / "results.json").read_text())
    assert found["law"]["alpha"]["value"] == reported.findings.fit.law.alpha
    assert [run["loss"] for run in found["runs"]] == [run.loss for run in reported.findings.ladder.runs]
    assert len(found["held_out"]) == len(found["isoflops"]) == 4


def test_a_failed_run_and_one_that_diverged_are_named_and_the_fit_goes_on(tmp_path):
    folder = finished_ladder(tmp_path)
    first, second, third = folder.entries[:3]
    attempt = first.begin()
    first.log(attempt).write_text(f"error: {EVIL} out of memory\n", encoding="utf-8")
    first.end(attempt, -9, keep_checkpoints=False)
    finish_run(second, float("nan"))
    finish_run(third, 3.0, step=5)
    reported = write_laws_report(folder)
    page = Page(reported.page)
    problems = reported.findings.ladder.problems
    assert problems[first.name] == f"failed with exit code -9: {EVIL} out of memory"
    assert "it diverged" in problems[second.name]
    assert "not of its last step" in problems[third.name]
    assert len(reported.findings.ladder.runs) == 13
    assert reported.findings.fit.law.alpha == pytest.approx(LAW.alpha, rel=0.2)
    assert "script" not in page.tags
    assert any("w32, 1e12 FLOPs: failed with exit code -9" in line for line in reported.lines())


def test_too_few_finished_runs_make_no_law_but_a_page_that_says_why(tmp_path, capsys):
    folder = create_ladder(tmp_path / "out", load_laws(write_ladder(tmp_path)))
    assert "Nothing yet: no run has finished." in Page(write_laws_report(folder).page).text
    for entry in folder.entries[:6]:
        finish_run(entry, 3.0)
    app(["report", str(folder.path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "No law: there are 6 finished runs of 2 sizes" in printed
    assert "w128, 1e12 FLOPs: not started yet" in printed
    assert len(read_ladder(folder).runs) == 6


def test_check_says_what_would_run_and_leaves_nothing_behind(tmp_path, capsys):
    path = write_ladder(tmp_path, overrides={"train.device": "cpu"})
    app(["laws", str(path), "--output", str(tmp_path / "out"), "--check"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert "N 30,080, 5,298 steps, D 5,425,152, 1e+12 FLOPs, lr 0.01" in lines[0].replace("1.00e+12", "1e+12")
    assert not (tmp_path / "out").exists()
