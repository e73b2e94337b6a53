"""A run's history says what its records say: which of them count, what time they cover, what happened."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import UsageError, UserError
from megagpt.training.history import Columns, distinct_names, read_histories
from tests.unit.training.fake_runs import FakeRun, write_records


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_of_a_step_done_again_the_last_record_counts_and_a_start_ends_what_was_beyond_it(happenings):
    columns = Columns(("step", "loss"), Path("metrics.jsonl"))
    counted: list[tuple[int, int]] = []
    for number, (is_start, step) in enumerate(happenings):
        if is_start:
            columns.restart(step)
            counted = [record for record in counted if record[0] <= step]
        else:
            columns.add(number + 1, {"step": step, "loss": number})
            counted = [record for record in counted if record[0] < step] + [(step, number)]
    columns.close()
    assert list(zip(columns.counted("step"), columns.counted("loss"), strict=True)) == counted


@pytest.mark.parametrize("keep_repeated", [False, True])
def test_the_parts_of_the_time_are_means_times_steps_and_the_rest_of_the_wall_time(tmp_path, keep_repeated):
    records = FakeRun(keep_repeated=keep_repeated).records
    (run,) = read_histories([write_records(tmp_path / "run", records)])
    sums = dict.fromkeys(("data", "forward_backward", "optimizer", "step", "checkpoint", "evaluation"), 0.0)
    step = 0
    for record in records:
        if record["kind"] == "train":
            for part in sums:
                sums[part] += record[f"{part}_seconds"] * (record["step"] - step)
        if record["kind"] in ("start", "train"):
            step = record["step"]
    spent, wall = run.time_spent(), records[-1]["time"] - records[0]["time"]
    assert spent["data"] == pytest.approx(sums["data"])
    assert spent["forward-backward"] == pytest.approx(sums["forward_backward"])
    assert spent["optimizer"] == pytest.approx(sums["optimizer"])
    assert spent["checkpoint"] == pytest.approx(sums["checkpoint"])
    assert spent["evaluation"] == pytest.approx(sums["evaluation"])
    assert sum(list(spent.values())[:4]) == pytest.approx(sums["step"])
    assert sum(spent.values()) == pytest.approx(wall)
    assert spent["not training"] > 3 * 400, "three pauses of at least 400 seconds"


def test_a_record_after_a_rollback_covers_as_many_steps_as_the_others(tmp_path):
    records = [{"kind": "train", "step": step, "step_seconds": 1.0} for step in (10, 20, 30, 20, 30, 40)]
    (run,) = read_histories([write_records(tmp_path / "run", records)])
    assert run.steps_covered().tolist() == [10] * 6
    assert run.time_spent()["rest of step"] == 60


def test_the_time_of_older_files_comes_from_their_checkpoints_and_evaluations(tmp_path):
    """They have no time, and neither parts of a step nor checkpoint_seconds in their training records."""
    records = [
        {"kind": "train", "step": 10, "step_seconds": 2.0, "data_seconds": 0.5},
        {"kind": "validation", "step": 10, "dataset": "a", "loss": 3.0, "seconds": 7.0},
        {"kind": "checkpoint", "step": 10, "path": "x", "seconds": 3.0},
        {"kind": "train", "step": 15, "step_seconds": 1.0, "data_seconds": 0.5},
    ]
    (run,) = read_histories([write_records(tmp_path / "run", records)])
    expected = {"data": 7.5, "rest of step": 17.5, "checkpoint": 3.0, "evaluation": 7.0}
    assert {part: seconds for part, seconds in run.time_spent().items() if seconds} == expected
    assert run.wall_seconds is None
    assert run.starts == []


def test_events_are_starts_stops_and_a_kill_where_no_stop_was_recorded(tmp_path):
    (run,) = read_histories([FakeRun().write(tmp_path / "run")])
    kinds = [(event.kind, event.step) for event in run.events if event.kind not in ("spike", "changed")]
    assert kinds == [
        *(("start", 0), ("killed", 700), ("start", 700)),
        *(("stop", 1100), ("start", 1100), ("killed", 1500), ("start", 1500), ("stop", 2000)),
    ]
    assert [start.world_size for start in run.starts] == [16, 16, 8, 16]
    text = run.starts[2].text
    assert text == "world size 8, ZeRO stage 1, bf16, micro-batch 32, continues from step_00001100"
    assert [event.text for event in run.events if event.kind == "changed"] == [
        "world size 16 -> 8",
        "world size 8 -> 16",
    ]


def test_ranks_and_tokens_are_those_in_force_at_each_record(tmp_path):
    (run,) = read_histories([FakeRun().write(tmp_path / "run")])
    steps, ranks = run.train.values["step"], run.ranks()
    assert set(ranks[steps <= 1100]) == {16}
    assert set(ranks[(steps > 1100) & (steps <= 1500)]) == {8}
    assert set(ranks[steps > 1500]) == {16}
    assert run.tokens_at(np.array([0.0, 5.0, 1000.0])).tolist() == [0, 5 * 256 * 1024, 1000 * 256 * 1024]


def test_null_and_numbers_that_are_not_finite_are_missing_values(tmp_path):
    lines = ['{"kind":"train","step":1,"loss":null}', '{"kind":"train","step":2,"loss":NaN,"lr":Infinity}']
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"kind":"train","step":3,"loss":2.5}', ""]))
    (run,) = read_histories([tmp_path])
    assert [math.isnan(loss) for loss in run.train.values["loss"]] == [True, True, False]
    assert np.isnan(run.train.values["lr"]).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind":"train",', "not a record of metrics"),
        ("[1]", "not a record of metrics"),
        ('{"kind":"train"}', "not a record of metrics"),
        ("\udcff\udcfe", "not a record of metrics"),
        ('{"kind":"train","step":null}', "step is None, not a number"),
        ('{"kind":"train","step":"last"}', "step is 'last', not a number"),
        ('{"kind":"train","step":7,"loss":"high"}', "loss is 'high', not a number"),
        ('{"kind":"train","step":7,"loss":[1.0]}', "loss is '\\[1.0\\]', not a number"),
        ('{"kind":"validation","step":7,"dataset":"a","loss":{}}', "loss is '{}', not a number"),
        ('{"kind":"stop","step":7,"time":"noon"}', "time is 'noon', not a number"),
        ('{"kind":"start","step":7,"world_size":"8"}', "world_size is '8', not a number"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path, line, message):
    good = json.dumps({"kind": "train", "step": 1, "loss": 3.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_bytes((good + line + "\n" + good).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"metrics\.jsonl:2: {message}"):
        read_histories([tmp_path])


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = FakeRun().write(tmp_path / "run") / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # in the middle of the last stop
    (run,) = read_histories([tmp_path / "run"])
    assert run.last_step == 2000
    assert run.events[-1].kind == "changed"


def test_folders_that_are_no_run_empty_or_given_twice_are_refused(tmp_path):
    run = FakeRun(steps=20).write(tmp_path / "run")
    with pytest.raises(UsageError, match=r"absent: no run: it has no metrics\.jsonl"):
        read_histories([run, tmp_path / "absent"])
    with pytest.raises(UsageError, match="is given twice"):
        read_histories([run, tmp_path / "run" / ".." / "run"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no records yet"):
        read_histories([tmp_path / "empty"])


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5, unique=True)
)
def test_names_are_distinct_ends_of_the_paths_and_no_longer_than_needed(paths):
    absolute = [("/", *path) for path in paths]
    names = distinct_names([Path(*path) for path in absolute])
    assert len(set(names)) == len(names)
    ends = [Path(name).parts for name in names]
    assert all(path[-len(end) :] == end for path, end in zip(absolute, ends, strict=True))
    length = max(map(len, ends)) - 1
    assert length == 0 or len({path[-length:] for path in absolute}) < len(paths), "shorter ones are not distinct"


def test_control_characters_of_names_and_messages_are_shown_not_obeyed(tmp_path):
    records = [
        {"kind": "start", "step": 0, "time": 1.0},
        {"kind": "event", "step": 0, "time": 1.0, "event": "spike", "message": "red \x1b[31m\nline"},
        {"kind": "event", "step": 0, "time": 1.0, "event": "other", "value": 3},
    ]
    (run,) = read_histories([write_records(tmp_path / "a\x07b", records)])
    assert run.name == "a\u2407b"
    assert [event.text for event in run.events] == ["", "red \u241b[31m\u240aline", "value 3"]
