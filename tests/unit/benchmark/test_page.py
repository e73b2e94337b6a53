"""docs/performance.md is what docs/measurements gives, and says so where a measurement is missing, old or damaged."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megagpt.benchmark.page import PICTURES, TEMPLATE, drawn, is_drawn_from, render
from megagpt.benchmark.suite import CPU, GPU, Entry
from megagpt.errors import UserError
from tests.forked import run_module
from tests.unit.benchmark.results import MACHINE, judged, measurement, write_all

DOCS = Path(__file__).parents[3] / "docs"
ENTRIES = {entry.name: entry for entry in (*CPU, *GPU)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A documentation in which everything is measured."""
    shutil.copy(DOCS / TEMPLATE, tmp_path)
    write_all(tmp_path / "measurements")
    return tmp_path


def performance_docs(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return run_module("tools.performance_docs", *arguments)


def section(page: str, title: str) -> str:
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_committed_page_and_picture_are_current():
    done = performance_docs("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_numbers_are_those_of_the_results(folder: Path):
    page = render(folder)
    assert page == render(folder), "the same each time"
    assert "Not measured." not in page
    assert "4 cores of Abacus 9000 (amx_bf16); 33 GiB of memory; 4 threads; python 3.12.1, torch 2.9.9" in page
    assert "measured on 2026-03-04 at revision abc1234, on this machine" in page
    assert "321 to 321 GFLOP/s in a product of bf16 matrices, and 43 to 43 GB/s" in page
    small = section(page, "Training step, small model")
    assert "    python -m tools.benchmark train --of train_small\n" in small
    assert "| this project | 2 | 4,096 |  |" in small
    assert "| nanoGPT, compiled, autocast | 2.5 | 3,277 | 1.25 (1.00 to 1.50) |" in small
    assert "| small | 8 | 361 | 111 | 1.50 (1.25 to 1.75) | 61% |" in section(page, "Sampling")
    assert "| 10 | 4.5 | 0.45 | 1 | 151 |" in section(page, "From text to tokens")
    assert "| depth | 1, 2, 4, 8 | 1.5, 2, 4, 8 | 1.5, 1, 1, 1 |" in section(page, "Growth of a training step")
    assert "| depth | 1 | 0.5 | 1 |\n|  | 2 | 0.5 | 0.5 |" in section(page, "Growth of a training step")
    assert "| start of a blend | 2.5 s | 1.25 to 5 | <= 2 s | MISSED |" in section(page, "Reading datasets")
    assert "stalled training for 0.16 s where a synchronous one took\n1.26 s" in section(page, "Checkpoints")


def test_targets_are_one_table_of_what_is_met_missed_and_not_measured(folder: Path):
    targets = section(render(folder), "Targets")
    assert (
        "| Training step, small model | speedup over nanogpt, compiled | 1.25 x | 1 to 1.5 | >= 1.3 x | MISSED |"
        in targets
    )
    assert "| Training step, small model | speedup over nanogpt | 5 x | 4.75 to 5.25 | >= 4 x | met |" in targets
    assert "| Sampling | gpt2_124m, batch 1: speedup over transformers | not measured |  | >= 3 x |  |" in targets
    missed = sum(line.endswith("| MISSED |") for line in targets.splitlines())
    assert f"Targets that are missed: {missed}." in targets


def test_a_section_tells_where_its_machine_and_revision_are_others(folder: Path):
    gpus = [{"name": "NVIDIA H100", "memory_gib": 80}] * 8
    rates = {"cpu": MACHINE["rates"]["cpu"], "cuda": {"bf16_gflops": 654_321.0, "read_gb_per_second": 2345.0}}
    other = MACHINE | {"gpus": gpus, "driver": "555.1", "cuda": "12.8", "rates": rates}
    for name, changes in {
        "gpu_train_124m": {"machine": other},
        "data": {"revision": {"commit": "def5678", "changed": True}, "date": "2026-05-06T00:00:00+00:00"},
        "checkpoint": {"revision": None},
    }.items():
        (folder / f"measurements/{name}.json").write_text(json.dumps(measurement(ENTRIES[name], **changes)))
    page = render(folder)
    on_gpu = section(page, ENTRIES["gpu_train_124m"].title)
    assert "8 x NVIDIA H100 with 80 GiB, driver 555.1, CUDA 12.8" in on_gpu
    assert "its cuda at 654,321 GFLOP/s in products of bf16 matrices and 2,345 GB/s from memory" in on_gpu
    assert "| this project | 2 | 4,096 |  | 123 |\n" in on_gpu
    assert "MFU 53% with 6 layers: of the device's dense bf16 peak" in on_gpu
    assert "Measured on 2026-05-06; at revision def5678 with uncommitted changes." in section(page, "Reading datasets")
    assert "At a revision that is not known." in section(page, "Checkpoints")
    assert "abc1234" not in section(page, "Sampling"), "it is in the head"


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_missing_is_not_measured_and_says_how_it_would_be(folder: Path, name: str):
    (folder / f"measurements/{name}.json").unlink()
    text = section(render(folder), ENTRIES[name].title)
    command = text.split("\n")[1]
    assert command.startswith(f"    python -m tools.benchmark {ENTRIES[name].words.split(' --plot')[0]}")
    assert text.split("\n")[2:4] == ["", "Not measured."]


def test_a_page_without_any_measurement_is_a_page(folder: Path):
    shutil.rmtree(folder / "measurements")
    page = render(folder)
    assert "Nothing is measured yet." in page
    assert page.count("Not measured.") == len(ENTRIES)


def test_a_new_measurement_has_a_section_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    entry = Entry("new", "Something new", "new configs/small.yaml")
    monkeypatch.setattr("megagpt.benchmark.page.CPU", (*CPU, entry))
    assert "Not measured." in section(render(folder), entry.title)
    (folder / "measurements/new.json").write_text(json.dumps(measurement(entry)))
    page = render(folder)
    assert "| something else | 5 s | 2.5 to 10 | <= 6 s | met |" in section(page, entry.title)
    assert f"| {entry.title} | something else | 5 s | 2.5 to 10 | <= 6 s | met |" in section(page, "Targets")


def test_starts_show_where_the_time_went(folder: Path, monkeypatch: pytest.MonkeyPatch):
    entry = Entry("start", "Time to the first step", "start configs/small.yaml")
    monkeypatch.setattr("megagpt.benchmark.page.CPU", (*CPU, entry))
    parts = {"cold": {"data": 1.5, "first step": 30.0}, "warm": {"data": 1.25, "first step": 6.0}}
    starts = {name: {"seconds": judged(f"{name} start", 31.0, 40.0), "parts": parts[name]} for name in parts}
    (folder / "measurements/start.json").write_text(json.dumps(measurement(entry) | starts))
    text = section(render(folder), entry.title)
    assert "| cold start | 31 s | 15.5 to 62 | <= 40 s | met |" in text
    assert "| first step | 30 | 6 |" in text


@pytest.mark.parametrize("name", ["train_small", "generate", "corpus", "growth", "data", "checkpoint"])
@pytest.mark.parametrize("damage", ["no json", "a list", "no head", "no machine", "no result", "other types"])
def test_a_damaged_result_is_one_line_with_its_file(folder: Path, name: str, damage: str):
    path = folder / f"measurements/{name}.json"
    whole = measurement(ENTRIES[name])
    head = {key: whole[key] for key in ("benchmark", "command", "date", "revision", "machine")}
    path.write_text(
        {
            "no json": "{",
            "a list": "[]",
            "no head": json.dumps({key: value for key, value in whole.items() if key != "machine"}),
            "no machine": json.dumps(whole | {"machine": {"cpus": 2}}),
            "no result": json.dumps(head),
            "other types": json.dumps(head | {key: 7 for key in whole if key not in head}),
        }[damage]
    )
    if (name, damage) == ("corpus", "no result"):  # of no part
        render(folder)
        return
    with pytest.raises(UserError, match=r"measure it again") as caught:
        render(folder)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_knows_what_it_was_drawn_from(name: str):
    picture = PICTURES[name]
    result = measurement(ENTRIES[picture.measurement])
    content = drawn(picture, result)
    assert is_drawn_from(content, picture, result)
    other = json.loads(json.dumps(result))
    other[picture.part]["again"] = 1
    assert not is_drawn_from(content, picture, other)
    assert not is_drawn_from(content[:50], picture, result)
    assert (np.asarray(Image.open(io.BytesIO(content)).convert("L")) < 100).mean() > 0.002
    assert len(content) < 100_000


@pytest.mark.slow
def test_the_command_writes_page_and_picture_and_tells_when_one_is_stale(folder: Path):
    page, picture = folder / "performance.md", folder / "performance_growth.png"
    done = performance_docs("--folder", folder, "--check")
    assert (done.returncode, done.stderr) == (1, f"error: {page}: No such file or directory\n")
    assert performance_docs("--folder", folder).returncode == 0
    assert page.read_text() == render(folder)
    assert performance_docs("--folder", folder, "--check").returncode == 0
    page.write_text("old")
    done = performance_docs("--folder", folder, "--check")
    assert (done.returncode, done.stderr) == (1, f"error: {page}: not current; run python -m tools.performance_docs\n")
    assert page.read_text() == "old"
    page.write_text(render(folder))
    Image.new("L", (9, 9)).save(picture)
    done = performance_docs("--folder", folder, "--check")
    assert done.stderr == f"error: {picture}: not current; run python -m tools.performance_docs\n"
    none = performance_docs("--folder", folder / "none")
    assert (none.returncode, none.stderr.count("\n")) == (1, 1)
