"""What is measured of runs: against the formula that their step times were made from."""

import math

import numpy as np
import pytest
from scipy import stats

from megagpt.scaling.measurements import Curve, Point, batch_mean, measure
from megagpt.scaling.study import load_study
from tests.unit.scaling.fake_studies import create, finish, measured_study, records, write_study
from tests.unit.training.fake_runs import write_records


@pytest.mark.parametrize("memory", [0.0, 0.6])
def test_a_mean_s_interval_holds_the_true_mean_as_often_as_it_says(memory):
    """Also where a step resembles the one before (an AR(1) series), if a little less often."""
    random, hits, tries = np.random.default_rng(0), 0, 400
    for _ in range(tries):
        noise, series = random.standard_normal(260), np.zeros(260)
        for step in range(1, 260):
            series[step] = memory * series[step - 1] + noise[step]
        interval = batch_mean(5 + series[60:]).interval
        hits += interval.low <= 5 <= interval.high
    expected = stats.binom.ppf([0.001, 0.999], tries, 0.95 if memory == 0 else 0.91) / tries
    assert expected[0] <= hits / tries <= expected[1]


def test_means_parts_and_rates_are_those_of_the_formula(tmp_path):
    folder = measured_study(tmp_path, "strong", lambda entry: 0.1 + 2 / entry.stored.ranks, noise=0.01)
    (curve,) = measure(folder).curves
    for point in curve.points:
        truth = 0.1 + 2 / point.ranks
        mean = point.step_seconds.interval
        assert mean.value == pytest.approx(truth, rel=0.01), "the slow first steps do not count"
        assert mean.low < mean.value < mean.high
        assert sum(point.parts.values()) == pytest.approx(mean.value)
        assert point.parts["forward-backward"] == pytest.approx(0.7 * mean.value)
        assert point.parts["rest of step"] == pytest.approx(0.05 * mean.value)
        assert point.tokens_per_second.value == pytest.approx(64 * 16 / mean.value)
        assert point.mean("mfu") == pytest.approx(0.4 / mean.value)
        assert point.runs[0].steps == 20


def test_efficiency_is_relative_to_the_fewest_ranks_in_both_kinds_of_scaling(tmp_path):
    strong = measured_study(tmp_path, "strong", lambda entry: 0.1 + 2 / entry.stored.ranks, noise=1e-6)
    (curve,) = measure(strong).curves
    expected = [(0.1 + 2) / ((0.1 + 2 / ranks) * ranks) for ranks in (1, 2, 4, 8)]
    assert [curve.efficiency(point).value for point in curve.points] == pytest.approx(expected, rel=1e-4)
    assert [curve.speedup(point) for point in curve.points] == pytest.approx(
        [share * ranks for share, ranks in zip(expected, (1, 2, 4, 8), strict=True)], rel=1e-4
    )
    shares = [curve.serial_share(point) for point in curve.points[1:]]
    assert shares == pytest.approx([0.1 / 2.1] * 3, rel=1e-2), "of Amdahl's law it is the serial share"

    (tmp_path / "weak").mkdir()
    weak = measured_study(tmp_path / "weak", "weak", lambda entry: 1 + 0.1 * math.log2(entry.stored.ranks), noise=1e-6)
    (curve,) = measure(weak).curves
    assert [curve.efficiency(point).value for point in curve.points] == pytest.approx(
        [1 / (1 + 0.1 * doublings) for doublings in range(4)], rel=1e-4
    )


def test_an_efficiency_s_interval_holds_the_true_one_as_often_as_it_says():
    random, hits = np.random.default_rng(0), []
    for _ in range(300):
        means = [batch_mean((2 / ranks) * (1 + 0.1 * random.standard_normal(20))) for ranks in (1, 4)]
        points = [Point(ranks, 1, 8, 128, 1e-3, [], mean, None) for ranks, mean in zip((1, 4), means, strict=True)]
        share = Curve("ideal", points).efficiency(points[1])
        hits.append(share.low <= 1 <= share.high)
    low, high = stats.binom.ppf([0.001, 0.999], 300, 0.95) / 300
    assert low <= np.mean(hits) <= high


def test_repeated_runs_are_a_point_whose_interval_is_that_of_their_means(tmp_path):
    times = {1: 1.0, 2: 1.1, 3: 1.3}
    folder = measured_study(tmp_path, "strong", lambda entry: times[entry.stored.repeat], noise=1e-9, repeats=3,
                            ranks=[1, 2])  # fmt: skip
    (curve,) = measure(folder).curves
    for point in curve.points:
        mean, error = np.mean([1, 1.1, 1.3]), stats.sem([1, 1.1, 1.3])
        expected = mean * np.exp(stats.t.interval(0.95, 2, 0, error / mean))  # of the logarithm, to first order
        interval = point.step_seconds.interval
        assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-6)


def test_the_first_steps_after_every_start_are_left_out_and_no_step_counts_twice(tmp_path):
    folder = create(tmp_path / "out", "strong", load_study(write_study(tmp_path, ranks=[2], steps=40)))
    (entry,) = folder.entries
    attempt = entry.begin()
    before = records(2, [9.0] * 10 + [1.0] * 15, tokens=64)  # requeued at step 25, from the checkpoint of step 20
    after = records(2, [7.0] * 10 + [2.0] * 10, tokens=64, first=20)
    write_records(entry.run_dir(attempt), [*before, *after, {"kind": "stop", "step": 40, "reason": "finished"}])
    entry.end(attempt, 0, keep_checkpoints=False)
    ((point,),) = (curve.points for curve in measure(folder).curves)
    assert point.runs[0].steps == 10 + 10
    assert point.step_seconds.value == pytest.approx((10 * 1.0 + 10 * 2.0) / 20)


def test_what_cannot_be_used_is_named_and_the_rest_counts(tmp_path):
    folder = create(tmp_path / "out", "strong", load_study(write_study(tmp_path, ranks=[1, 2, 4, 8, 16])))
    good, other_ranks, damaged, failed, missing = folder.entries
    finish(good, [1.0] * 30)
    finish(other_ranks, [1.0] * 30, world_size=1)
    finish(damaged, [1.0] * 30)
    path = damaged.run_dir(damaged.last) / "metrics.jsonl"
    path.write_text(path.read_text().replace("1.0", '"fast"', 9), encoding="utf-8")
    failed.end(failed.begin(), -9, keep_checkpoints=False)
    results = measure(folder)
    assert [[point.ranks for point in curve.points] for curve in results.curves] == [[1]]
    assert results.problems[other_ranks.name] == "finished, but cannot be used: ran on 1 ranks, not on 2"
    assert str(path) in results.problems[damaged.name]
    assert results.problems[failed.name] == "failed with exit code -9: killed by SIGKILL"
    assert results.problems[missing.name] == "not started yet"


def test_runs_whose_ranks_shared_cores_are_marked(tmp_path):
    folder = create(tmp_path / "out", "strong", load_study(write_study(tmp_path, ranks=[1, 2])))
    for entry in folder.entries:
        finish(entry, [1.0, 1.1] * 15)
    folder.entries[1].last.shared_cores = 1
    (curve,) = measure(folder).curves
    assert [point.shared_cores for point in curve.points] == [None, 1]
