"""metrics.jsonl survives kills, and its mirrors show what it says."""

import errno
import json

import pytest

from megagpt.errors import UserError
from megagpt.training.metrics import JsonLines, drop_records_after, read_metrics
from megagpt.training.sinks import describe, duration


def write(path, records):
    sink = JsonLines(path)
    for record in records:
        sink.write(record)
    sink.close(completed=True)


def test_records_come_back_in_order_over_two_openings(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "train", "step": 1, "loss": 0.1 + 0.2}])
    write(path, [{"kind": "train", "step": 2, "loss": 1e-300}])
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 0.1 + 0.2), (2, 1e-300)]


def test_a_line_cut_short_by_a_kill_is_left_out_and_later_lines_stay_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "train", "step": step} for step in (1, 2, 3)])
    path.write_bytes(path.read_bytes()[:-5])
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert drop_records_after(path, 2) == 0
    write(path, [{"kind": "train", "step": 3}])
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_damage_in_the_middle_is_named_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"step":\n{"kind": "train", "step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a record of metrics"):
        list(read_metrics(path))


def test_resuming_drops_only_what_was_logged_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": kind, "step": step} for step in range(1, 6) for kind in ("train", "validation")])
    assert drop_records_after(path, 3) == 4
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 1, 2, 2, 3, 3]


def test_an_evaluation_that_is_made_again_is_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": kind, "step": step} for step in (1, 2) for kind in ("train", "validation", "sample")])
    assert drop_records_after(path, 2, evaluates_again=True) == 2
    assert [r["kind"] for r in read_metrics(path)] == ["train", "validation", "sample", "train"]


def test_a_full_disk_keeps_records_waiting_until_there_is_room(tmp_path, monkeypatch):
    sink = JsonLines(tmp_path / "metrics.jsonl")
    file, full = sink._file, []

    class Disk:
        def write(self, data: bytes) -> int:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(data[:10])  # and never more at once

        def __getattr__(self, name: str):
            return getattr(file, name)

    sink._file = Disk()
    sink.write({"kind": "train", "step": 1})
    full.append(True)
    sink.write({"kind": "train", "step": 2})
    full.clear()
    sink.write({"kind": "train", "step": 3})
    sink.close(completed=True)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (725, "12m05s"), (11_220, "3h07m"), (187_200, "2d04h")],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_console_line_shows_skipped_steps_and_mfu_only_when_there_are_some():
    record = {
        "kind": "train",
        "step": 20,
        "loss": 4.25,
        "lr": 3e-4,
        "grad_norm": 1.5,
        "step_seconds": 0.5,
        "tokens_per_second": 16384.0,
        "mfu": None,
        "peak_memory_bytes": 3 << 30,
        "straggler_ratio": 1.0,
        "slowest_rank": 0,
        "skipped_steps": 0,
        "eta_seconds": 90.0,
    }
    plain = describe(record, 200)
    assert plain.startswith("step  20/200  loss 4.2500  lr 3.00e-04")
    assert "mfu" not in plain
    assert "skipped" not in plain
    busy = describe(record | {"mfu": 0.523, "skipped_steps": 2}, 200)
    assert "mfu 52.3%" in busy
    assert "skipped 2" in busy


def test_numbers_that_are_not_finite_are_null_so_that_every_line_is_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [{"kind": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5}])
    (line,) = path.read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 0.5}
