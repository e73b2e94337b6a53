"""python -m tools.report: the table against a recount of the records, and a page that is safe and needs nothing."""

import base64
import math
import re
import statistics
import subprocess
import time
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megagpt.errors import UsageError, UserError
from megagpt.training.history import TRAIN_FIELDS, read_histories
from megagpt.training.metrics import Record
from megagpt.training.report import MOST_EVENTS, Summary, listed_events, table_rows, write_report
from tests.forked import run_module
from tests.unit.training.fake_runs import FakeRun, write_records

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """The table, the events, and everything that a page loads."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")], "no handlers"
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "small":
            self.rows[-1][-1] += "\n"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def row(self, title: str) -> list[str]:
        """The cells of the summary beside this title."""
        (found,) = [cells[1:] for cells in self.rows if cells and cells[0] == title]
        return found


def recount(records: list[Record]) -> dict[str, Any]:
    """What Summary says, by other means: the steps that count by going back at each record."""
    kept: list[Record] = []
    for record in records:
        if record["kind"] in ("train", "start"):
            same = record["kind"] == "train"
            kept = [one for one in kept if one["step"] < record["step"] or (one["step"] == record["step"] and not same)]
        if record["kind"] == "train":
            kept.append(record)
    losses: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["kind"] == "validation":
            losses.setdefault(record["dataset"], {})[record["step"]] = record
    saved = [record for record in records if record["kind"] == "checkpoint"]
    return {
        "steps": kept[-1]["step"],
        "tokens": kept[-1]["tokens"],
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in kept),
        "tokens_per_second_per_rank": statistics.median(record["tokens_per_second_per_rank"] for record in kept),
        "mfu": statistics.median(record["mfu"] for record in kept),
        "goodput": kept[-1]["goodput"],
        "skipped_steps": kept[-1]["skipped_steps"],
        "wall_seconds": records[-1]["time"] - records[0]["time"],
        "restarts": sum(record["kind"] == "start" for record in records) - 1,
        "spikes": sum(record.get("event") == "spike" for record in records),
        "rollbacks": sum(record.get("event") == "rollback" for record in records),
        "checkpoints": len(saved),
        "checkpoint_stall_seconds": statistics.median(record["stall_seconds"] for record in saved),
        "checkpoint_bytes": statistics.median(record["bytes"] for record in saved),
        "last": {name: by_step[max(by_step)] for name, by_step in losses.items()},
        "best": {name: min(by_step.values(), key=lambda one: one["loss"]) for name, by_step in losses.items()},
    }


@pytest.mark.parametrize("keep_repeated", [False, True])
def test_the_summary_is_a_recount_of_the_records(tmp_path, keep_repeated):
    fake = FakeRun(keep_repeated=keep_repeated, checkpoint_every=70)
    fake.records.insert(-1, {"kind": "event", "step": 1990, "time": fake.records[-1]["time"], "event": "rollback"})
    (run,) = read_histories([fake.write(tmp_path / "run")])
    summary, expected = Summary.of(run), recount(fake.records)
    for which in ("last", "best"):
        for name, record in expected.pop(which).items():
            found = getattr(summary, which)[name]
            bits = record["bits_per_byte"]
            assert (found.step, found.loss, found.bits_per_byte) == (record["step"], record["loss"], bits)
            assert found.perplexity == pytest.approx(math.exp(record["loss"]))
    assert {name: getattr(summary, name) for name in expected} == pytest.approx(expected)
    assert summary.world_sizes == (16, 8, 16)
    assert summary.state == "finished"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[FakeRun], Path]:
    """Two runs with the same folder name, one of them hostile in all its names and messages, and their report."""
    folder = tmp_path_factory.mktemp("runs")
    plain = FakeRun(steps=400, ranks=(8, 4), stops_at=(250,), spikes=(310,))
    evil = FakeRun(steps=400, ranks=(8,), stops_at=(), batch_size=512, datasets=(f"{EVIL}/validation",), spikes=())
    evil.records[-1]["reason"] = f'{EVIL} <img src="http://x/y.png">'
    (folder / "out").mkdir()
    (folder / "out" / "step_time.png").write_bytes(b"of an earlier report")
    (folder / "out" / "notes.png").write_bytes(b"not of a report")
    write_report([plain.write(folder / "a" / EVIL[:8]), evil.write(folder / EVIL[:8])], folder / "out")
    return [plain, evil], folder / "out"


def test_the_page_shows_the_numbers_of_the_records(comparison):
    fakes, folder = comparison
    page, (plain, evil) = Page(folder), [recount(fake.records) for fake in fakes]
    rate = plain["tokens_per_second"] / 1e3
    assert page.row("Steps") == ["400", "400"]
    assert page.row("Tokens") == ["105M", "210M"], "400 x 256 x 1,024 and twice that"
    assert page.row("Tokens/s, median")[0] == f"{rate:.3g}k"
    assert page.row("Restarts") == ["1", "0"]
    assert page.row("Ranks") == ["8 → 4", "8"]
    assert page.row("Goodput") == [f"{100 * one['goodput']:.1f} %" for one in (plain, evil)]
    last = plain["last"]["wiki/validation"]
    bits, perplexity = last["bits_per_byte"], math.exp(last["loss"])
    expected = f"{last['loss']:.4f}\nstep 400, perplexity {perplexity:.2f}, {bits:.4f} bits per byte"
    assert page.row("wiki/validation: last loss") == [expected, "–"]
    assert page.row("Checkpoint size, median") == ["1.49 GB", "1.49 GB"]
    start = datetime.fromtimestamp(fakes[0].records[0]["time"], timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    assert [start, "0", "start", "world size 8, ZeRO stage 1, bf16, micro-batch 32"] in page.rows


def test_the_page_carries_its_pictures_and_loads_nothing(comparison):
    _, folder = comparison
    page = Page(folder)
    assert page.loaded
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert not re.search(r"url\(|@import", page.source)
    carried = {base64.b64decode(address.split(",")[1]) for address in page.loaded}
    names = {"loss", "validation_loss", "throughput", "gradient_norm", "learning_rate", "goodput", "time", "step_time"}
    files = {file.stem: file.read_bytes() for file in folder.glob("*.png") if file.stem != "notes"}
    assert files.keys() == names
    assert set(files.values()) <= carried
    assert len(carried) == 2 * len(files), "each for a light and a dark screen"
    assert all(content.startswith(b"\x89PNG") for content in carried)


def test_names_and_messages_are_text_never_markup(comparison):
    _, folder = comparison
    page = Page(folder)
    assert "script" not in page.tags
    assert len([tag for tag in page.tags if tag == "img"]) == 8
    assert f'{EVIL} <img src="http://x/y.png">' in page.text
    assert f"{EVIL}/validation: last loss" in page.text


def test_pictures_of_an_earlier_report_go_and_other_files_stay(comparison, tmp_path):
    _, folder = comparison
    assert (folder / "step_time.png").read_bytes() != b"of an earlier report"
    assert (folder / "notes.png").read_bytes() == b"not of a report"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.png").write_bytes(b"of an earlier report")
    write_report([write_records(tmp_path / "run", [{"kind": "start", "step": 0}])], tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["report.html"]
    assert "Nothing to draw yet" in Page(tmp_path / "out").text


@pytest.mark.parametrize("field", [*TRAIN_FIELDS[1:], "time", "everything"])
def test_a_field_that_is_missing_makes_its_numbers_unknown_and_nothing_else(tmp_path, field):
    whole = FakeRun(steps=200, ranks=(8,), stops_at=())
    records = [
        {key: value for key, value in record.items() if key in ("kind", "step") or field not in (key, "everything")}
        for record in whole.records
    ]
    rows = [
        dict(table_rows([Summary.of(read_histories([write_records(tmp_path / name, content)])[0])]))
        for name, content in (("whole", whole.records), ("part", records))
    ]
    if field == "everything":
        rows[0] = {"Steps": ["200"], "Restarts": ["0"], "Loss spikes": ["0"], "Rollbacks": ["0"], "Checkpoints": ["2"],
                   "State": ["stopped: no reason is recorded"]}  # fmt: skip
    gone = {"tokens": "Tokens", "loss": "Training loss, median of the last 2 %", "mfu": "MFU, median",
            "goodput": "Goodput", "skipped_steps": "Skipped steps", "time": "Wall time",
            "tokens_per_second": "Tokens/s, median"}  # fmt: skip
    validation = [title for title in rows[0] if field == "loss" and "validation" in title]
    assert rows[1] == {title: cells for title, cells in rows[0].items() if title not in (gone.get(field), *validation)}


@pytest.mark.parametrize("fields", [("kind", "step", "loss"), ("kind", "step", "tokens_per_second", "dataset", "loss")])
def test_a_report_of_old_files_has_the_pictures_that_they_allow(tmp_path, fields):
    records = [{key: value for key, value in record.items() if key in fields} for record in FakeRun(steps=60).records]
    write_report([write_records(tmp_path / "run", records)], tmp_path / "out")
    rate = {"throughput.png"} if "tokens_per_second" in fields else set()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"loss.png", "report.html"} | rate


def test_a_run_that_is_going_on_says_when_it_was_last_heard_from(tmp_path):
    records = FakeRun(steps=100).records[:-1]
    (run,) = read_histories([write_records(tmp_path / "run", [*records[:-1], records[-1] | {"time": 86_400.0}])])
    assert Summary.of(run).state == "no stop recorded; last heard from 1970-01-02 00:00:00 UTC"


def test_of_too_many_events_the_oldest_spikes_are_left_out_of_the_list(tmp_path):
    kinds = ["start", *["event"] * 500, "stop"]
    records = [{"kind": kind, "step": step, "event": "spike"} for step, kind in enumerate(kinds)]
    (run,) = read_histories([write_records(tmp_path / "run", records)])
    listed = listed_events(run)
    assert len(listed) == MOST_EVENTS
    assert [listed[0].kind, listed[1].step, listed[-1].kind] == ["start", 501 - (MOST_EVENTS - 2), "stop"]


def test_a_million_records_take_seconds(tmp_path):
    line = '{"kind":"train","step":%d,"time":%d,"tokens":%d,"loss":%d.5,"tokens_per_second":%d}\n'
    with (tmp_path / "metrics.jsonl").open("w") as file:
        file.writelines(line % (step, step, 8 * step, 2 + step % 3, step % 1001) for step in range(1, 1_000_001))
    start = time.process_time()
    (summary,) = write_report([tmp_path], tmp_path / "report")
    assert time.process_time() - start < 30, "about 5 s of CPU time"
    assert (summary.steps, summary.tokens, summary.tokens_per_second) == (10**6, 8 * 10**6, 500)
    assert (tmp_path / "report" / "report.html").stat().st_size < 5e6


def test_an_output_that_is_a_file_or_cannot_be_made_is_refused(tmp_path):
    run = write_records(tmp_path / "run", [{"kind": "start", "step": 0}])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file: is a file; name a folder"):
        write_report([run], tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        write_report([run], tmp_path / "file" / "below")


def command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_module("tools.report", *arguments, folder=folder)


@pytest.mark.slow
def test_the_command_writes_beside_one_run_and_into_the_current_folder_for_several(tmp_path):
    for name, loss in (("one", 3.25), ("two", 3.5)):
        records = [{"kind": "validation", "step": step, "dataset": "wiki", "loss": loss} for step in (10, 20)]
        write_records(tmp_path / name, records)
    done = command("one", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "one: 20 steps, wiki 3.2500\none/report/report.html\n"
    assert "3.2500" in Page(tmp_path / "one" / "report").text
    done = command("one", "two", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "one: 20 steps, wiki 3.2500\ntwo: 20 steps, wiki 3.5000\nreport/report.html\n"
    assert "2 runs" in Page(tmp_path / "report").text
    assert (tmp_path / "report" / "validation_loss.png").exists()


@pytest.mark.slow
def test_the_errors_of_the_command_are_one_line(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text('{"kind":"train","step":1}\noops\n{"kind":"train","step":2}\n')
    for arguments, code, message in (
        (["absent"], 2, "error: absent: no run: it has no metrics.jsonl; give the folder that train.run_dir names"),
        (["bad"], 1, "error: bad/metrics.jsonl:2: not a record of metrics; the file is damaged"),
    ):
        done = command(*arguments, folder=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", message + "\n")
