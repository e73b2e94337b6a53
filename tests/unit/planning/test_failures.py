"""The closed forms of checkpoint interval and goodput against runs that are played failure by failure."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from megagpt.planning.failures import best_interval, goodput, reliability

HOUR = 3600.0


def played_goodput(interval, stall, write, restart, mtbf, segments=20_000, seed=0):
    """Training time over time of a run with exponential failures, of checkpoints that are written beside training.

    A checkpoint counts `write - stall` seconds after training goes on; what fails before that goes back one more.
    """
    generator = np.random.default_rng(seed)
    clock, failure = 0.0, generator.exponential(mtbf)
    saved, done, behind = 0.0, 0.0, write - stall  # training time that a restart begins at, that is reached
    due = np.inf  # when the checkpoint that is being written counts
    while done < segments * interval:
        end = clock + interval + stall  # of this segment and its checkpoint's stall
        if failure >= end:
            if due <= end:
                saved, due = done, np.inf
            clock, done = end, done + interval
            if behind <= 0:
                saved = done
            else:
                due = clock + behind
            continue
        if due <= failure:
            saved = done
        due = np.inf
        clock = failure
        while True:  # a failure during a restart begins it anew
            failure = clock + generator.exponential(mtbf)
            if failure >= clock + restart:
                clock += restart
                break
            clock = failure
        done = saved
    return done / clock


@pytest.mark.parametrize("mtbf", [2 * HOUR, 10 * HOUR])
@pytest.mark.parametrize(("stall", "write"), [(60.0, 60.0), (10.0, 200.0), (300.0, 300.0)])
def test_goodput_is_that_of_runs_played_failure_by_failure(stall, write, mtbf):
    expected = reliability(1, mtbf, stall, write, restart_seconds=400.0)
    played = played_goodput(expected.interval_seconds, stall, write, 400.0, mtbf)
    assert expected.goodput == pytest.approx(played, abs=0.01)


@pytest.mark.parametrize("mtbf", [HOUR, 24 * HOUR])
@pytest.mark.parametrize("cost", [5.0, 60.0, 600.0])
def test_no_other_interval_gives_a_better_goodput(cost, mtbf):
    best = minimize_scalar(lambda interval: -goodput(interval, cost, 300.0, mtbf), bounds=(1.0, 10 * mtbf),
                           method="bounded", options={"xatol": 1.0})  # fmt: skip
    assert goodput(best_interval(cost, mtbf), cost, 300.0, mtbf) == pytest.approx(-best.fun, rel=1e-3)


def test_with_rare_failures_the_interval_is_youngs():
    assert best_interval(30.0, 1e9) == pytest.approx((2 * 30.0 * 1e9) ** 0.5, rel=1e-3)


def test_a_thousand_nodes_fail_a_thousand_times_as_often():
    one, many = (reliability(nodes, 6300 * HOUR, 10.0, 60.0, 600.0) for nodes in (1, 1000))
    assert one.mtbf_seconds == pytest.approx(1000 * many.mtbf_seconds)
    assert many.failures(1e6) == pytest.approx(1e6 / many.goodput / (6.3 * HOUR))
    assert many.goodput < one.goodput < 1


def test_what_fails_before_it_is_saved_never_ends():
    assert reliability(10**9, HOUR, 100.0, 100.0, 600.0).goodput == 0
    assert reliability(10**9, HOUR, 100.0, 100.0, 600.0).failures(1.0) == float("inf")
