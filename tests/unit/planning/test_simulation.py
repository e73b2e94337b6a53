"""A job played on failing nodes, against players that take every step, queueing theory, and Daly's closed form."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

from megagpt.planning.failures import best_interval, goodput
from megagpt.planning.simulation.job import PARTS, Job, Preemption, play
from megagpt.planning.simulation.nodes import Wear
from megagpt.planning.simulation.stint import Saving, play_stint
from megagpt.planning.simulation.stragglers import EXACT_STEPS, SlowestNode, Stragglers
from megagpt.planning.simulation.study import estimate

HOUR, DAY = 3600.0, 86400.0
EQUAL = SlowestNode(8, 0, Stragglers())
STRAGGLERS = Stragglers(jitter=0.05, slow_share=0.2, slow_factor=1.1)


def job(**changes):
    """Ten nodes that fail once in ten hours together, saved synchronously in a minute, each replaced at once."""
    plain = Job(
        nodes=10, step_seconds=10.0, saving=Saving(every_steps=100, stall_seconds=60.0, write_seconds=60.0), spares=0,
        wear=Wear(mtbf_seconds=100 * HOUR, repair_seconds=0.0), stragglers=Stragglers(), detection_seconds=0.0,
        replacement_seconds=0.0, start_seconds=400.0,
    )  # fmt: skip
    return replace(plain, **changes)


def played(one, days, runs, seed=0):
    return [play(one, days * DAY, [seed, run]) for run in range(runs)]


def holds(interval, expected):
    """Whether it is in 1.5 intervals of 95 %: true by chance alone in 99.7 % of all tests."""
    return abs(interval.value - expected) <= 1.5 * (interval.high - interval.value)


# The slowest node


@pytest.mark.parametrize(("normal", "slow"), [(1, 0), (64, 0), (60, 4), (0, 5)])
def test_a_step_takes_as_long_as_on_the_slowest_of_so_many_nodes(normal, slow):
    generator = np.random.default_rng(1)
    every_node = np.exp(STRAGGLERS.jitter * generator.standard_normal((4000, normal + slow)))
    every_node[:, normal:] *= STRAGGLERS.slow_factor
    drawn = SlowestNode(normal, slow, STRAGGLERS).draw(np.random.default_rng(2), 4000)
    assert stats.ks_2samp(drawn, every_node.max(axis=1)).pvalue > 0.01


@pytest.mark.parametrize(("normal", "slow"), [(1, 0), (1250, 0), (1200, 50)])
def test_mean_and_deviation_are_the_integrals_over_the_density(normal, slow):
    def tail(x):
        slowed = stats.norm.cdf(np.log(x / STRAGGLERS.slow_factor) / STRAGGLERS.jitter)
        return 1 - stats.norm.cdf(np.log(x) / STRAGGLERS.jitter) ** normal * slowed**slow

    mean = quad(tail, 0, 2, points=[1, 1.2], limit=200)[0]
    square = quad(lambda x: 2 * x * tail(x), 0, 2, points=[1, 1.2], limit=200)[0]
    slowest = SlowestNode(normal, slow, STRAGGLERS)
    assert slowest.mean == pytest.approx(mean, rel=1e-6)
    assert slowest.deviation == pytest.approx((square - mean**2) ** 0.5, rel=1e-3)


def test_a_sum_that_is_not_drawn_step_by_step_has_the_same_distribution():
    slowest, generator = SlowestNode(1250, 0, STRAGGLERS), np.random.default_rng(3)
    step_by_step = [slowest.draw(generator, EXACT_STEPS + 1).sum() for _ in range(3000)]
    assert stats.ks_2samp(slowest.sums(generator, EXACT_STEPS + 1, 3000), step_by_step).pvalue > 0.01


# What is done between two failures


def step_by_step(seconds, step_seconds, factors, saving):
    """(kept steps, time that they took, kept checkpoints): every step and checkpoint one after the other."""
    clock, steps, trained, begun = 0.0, 0, 0.0, []
    while clock < seconds:
        duration = step_seconds * next(factors)
        clock, steps, trained = clock + duration, steps + 1, trained + duration
        if steps % saving.every_steps == 0:
            begun.append((clock, steps, trained))
            clock += saving.stall_seconds
    whole = [(steps, trained) for clock, steps, trained in begun if clock + saving.write_seconds <= seconds]
    return (*(whole[-1] if whole else (0, 0.0)), len(whole))


@settings(max_examples=200, deadline=None)
@given(
    seconds=st.floats(0.0, 4e4),
    step_seconds=st.sampled_from([0.5, 3.0, 40.0]),
    every=st.integers(1, 700),
    stall=st.floats(0.0, 90.0),
    behind=st.sampled_from([0.0, 50.0]),
)
def test_a_stint_of_equal_nodes_is_what_taking_every_step_comes_to(seconds, step_seconds, every, stall, behind):
    saving = Saving(every, stall, stall + min(behind, every * step_seconds))
    stint = play_stint(seconds, True, step_seconds, EQUAL, saving, np.random.default_rng(0))
    steps, trained, checkpoints = step_by_step(seconds, step_seconds, iter(lambda: 1.0, 0.0), saving)
    assert stint.steps == steps
    assert stint.step_seconds == pytest.approx(trained)
    assert stint.stall_seconds == pytest.approx(checkpoints * stall)
    assert stint.step_seconds + stint.stall_seconds + stint.lost_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("every", [7, 60])
@pytest.mark.parametrize(("jitter", "write"), [(0.05, 30.0), (0.05, 200.0), (0.5, 200.0)])
def test_a_stint_with_stragglers_loses_as_much_as_one_that_takes_every_step(every, jitter, write):
    """Stints of about 1,000 steps, so that most of one is jumped over."""
    slowest, saving = SlowestNode(20, 2, replace(STRAGGLERS, jitter=jitter)), Saving(every, 30.0, write)
    lengths = 1000 * 8.0 * slowest.mean * np.random.default_rng(4).uniform(1.2, 1.5, 300)

    def factors(generator):
        while True:
            yield from slowest.draw(generator, 500)

    generators = np.random.default_rng(5), np.random.default_rng(6)
    kept = [play_stint(seconds, True, 8.0, slowest, saving, generators[0]).steps for seconds in lengths]
    expected = [step_by_step(seconds, 8.0, factors(generators[1]), saving)[0] for seconds in lengths]
    difference = estimate(np.array(kept) - expected)
    assert holds(difference, 0.0)
    done = lengths / (8.0 * slowest.mean)
    assert stats.ks_2samp(done - kept, done - expected, method="asymp").pvalue > 0.01


def test_a_failure_while_a_checkpoint_is_written_loses_it():
    saving = Saving(every_steps=10, stall_seconds=1.0, write_seconds=50.0)

    def kept(seconds):
        return play_stint(seconds, True, 10.0, EQUAL, saving, np.random.default_rng(0)).steps

    assert kept(100.0 + 49.9) == 0
    assert kept(100.0 + 50.1) == 10
    assert kept(100.0 + 1.0 + 100.0 + 49.9) == 10


def test_what_is_not_saved_when_the_time_is_over_is_not_lost():
    saving = Saving(every_steps=10, stall_seconds=6.0, write_seconds=50.0)
    for seconds, steps, stall in ((95.0, 9.5, 0.0), (103.0, 10.0, 3.0), (2 * 106.0 + 25.0, 22.5, 12.0)):
        stint = play_stint(seconds, False, 10.0, EQUAL, saving, np.random.default_rng(0))
        assert (stint.steps, stint.stall_seconds, stint.lost_seconds) == pytest.approx((steps, stall, 0.0))


# Nodes, spares, repairs


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.5])
def test_nodes_fail_at_the_same_rate_from_the_first_day_whatever_their_age(shape):
    """An equilibrium renewal process has time / MTBF failures on average, in any stretch of time."""
    wear = Wear(mtbf_seconds=100 * HOUR, repair_seconds=0.0, shape=shape)
    for days, count in ((1, 300), (10, 60)):
        runs = played(job(nodes=50, wear=wear, start_seconds=0.0), days, count)
        assert holds(estimate([run.interruptions for run in runs]), 50 * days * DAY / wear.mtbf_seconds)


@pytest.mark.parametrize("shape", [0.7, 1.0])
@pytest.mark.parametrize("spares", [0, 1, 3])
def test_the_job_waits_while_more_nodes_are_broken_than_there_are_spares(spares, shape):
    """Each of all nodes is whole for MTBF / (MTBF + repair) of the time, so their number is binomial."""
    wear = Wear(mtbf_seconds=100 * HOUR, repair_seconds=8 * HOUR, shape=shape)
    runs = played(job(spares=spares, wear=wear, start_seconds=0.0), 200, 20)
    waiting = estimate([run.seconds["waiting"] / (200 * DAY) for run in runs])
    enough = stats.binom.sf(9, 10 + spares, 100 / 108)
    assert holds(waiting, 1 - enough)


def test_a_spare_takes_the_place_of_a_node_that_is_away():
    wear = Wear(mtbf_seconds=1000 * HOUR, repair_seconds=50 * HOUR)
    alone, spared = (played(job(spares=count, wear=wear), 60, 10) for count in (0, 5))
    for run_alone, run_spared in zip(alone, spared, strict=True):
        assert run_spared.goodput > run_alone.goodput
        assert run_spared.seconds["waiting"] < 0.1 * run_alone.seconds["waiting"]


def test_the_same_nodes_fail_at_the_same_times_however_the_run_is_saved():
    wear = Wear(mtbf_seconds=100 * HOUR, repair_seconds=5 * HOUR)
    saved = (Saving(100, 60.0, 60.0), Saving(10, 1.0, 60.0))
    first, second = (play(job(wear=wear, spares=1, saving=saving), 30 * DAY, [0, 7]) for saving in saved)
    assert [time for time, _ in first.progress] == [time for time, _ in second.progress]
    assert first.seconds["lost work"] > second.seconds["lost work"]


def test_without_a_spare_a_run_may_go_on_with_fewer_nodes():
    """Half of the nodes take twice as long, which is what is paid for not waiting."""
    wear = Wear(mtbf_seconds=1000 * HOUR, repair_seconds=100 * HOUR)
    fewer = job(wear=wear, fewer_nodes=lambda whole: (5, 20.0) if whole >= 5 else None)
    for waits, goes_on in zip(played(job(wear=wear), 60, 5), played(fewer, 60, 5), strict=True):
        assert waits.seconds["waiting"] > 0 == waits.seconds["fewer nodes"]
        assert goes_on.seconds["fewer nodes"] > 0 == goes_on.seconds["waiting"]
        assert goes_on.goodput > waits.goodput


# The whole account


@settings(max_examples=40, deadline=None)
@given(
    nodes=st.integers(1, 30),
    spares=st.integers(0, 2),
    mtbf_hours=st.floats(1.0, 500.0),
    repair_hours=st.floats(0.0, 20.0),
    every=st.integers(1, 300),
    stall=st.floats(0.0, 60.0),
    behind=st.floats(0.0, 60.0),
    preempted=st.booleans(),
)
def test_all_time_is_accounted_for(nodes, spares, mtbf_hours, repair_hours, every, stall, behind, preempted):
    one = job(
        nodes=nodes, spares=spares, wear=Wear(mtbf_hours * HOUR, repair_hours * HOUR, 0.8), stragglers=STRAGGLERS,
        saving=Saving(every, stall, stall + behind), detection_seconds=100.0, replacement_seconds=20.0,
        preemption=Preemption(5 * HOUR, HOUR) if preempted else None,
    )  # fmt: skip
    run = play(one, 4 * DAY, [0, 0])
    assert tuple(run.seconds) == PARTS
    assert sum(run.seconds.values()) == pytest.approx(4 * DAY)
    # a step may be faster than the plan's where there are few nodes; nothing else is below 0
    assert all(run.seconds[part] >= -1e-6 for part in PARTS if part != "stragglers")
    kept = [trained for _, trained in run.progress]
    assert kept == sorted(kept)


def test_the_same_seed_plays_the_same_and_another_one_does_not():
    one = job(stragglers=STRAGGLERS, wear=Wear(100 * HOUR, 3 * HOUR), spares=1)
    first, again, other = (play(one, 20 * DAY, [seed, 0]) for seed in (1, 1, 2))
    assert first == again
    assert first.seconds != other.seconds


def test_stragglers_take_their_share():
    """Without failures only they and the stalls are left."""
    one = job(wear=Wear(1e6 * DAY, 0.0), stragglers=Stragglers(jitter=0.05), start_seconds=0.0)
    mean = np.exp(0.05 * np.random.default_rng(0).standard_normal((100_000, 10))).max(axis=1).mean()
    run = play(one, 30 * DAY, [0, 0])
    assert run.goodput == pytest.approx(1000 / (1000 * mean + 60), rel=1e-3)


def test_a_preempted_run_saves_and_is_away():
    """Renewal: it trains for a while that is exponential, saves, is away, starts anew."""
    one = job(wear=Wear(1e6 * DAY, 0.0), preemption=Preemption(20 * HOUR, HOUR), start_seconds=1.0,
              saving=Saving(10**6, 0.0, 60.0))  # fmt: skip
    share = estimate([run.goodput for run in played(one, 200, 30)])
    assert holds(share, 20 * HOUR / (20 * HOUR + 60 + HOUR + 1))


# The closed form


@pytest.mark.parametrize("mtbf_hours", [20, 100, 1000])
@pytest.mark.parametrize(("every", "stall"), [(20, 60.0), (200, 60.0), (500, 300.0)])
def test_where_dalys_assumptions_hold_his_goodput_is_within_the_interval(mtbf_hours, every, stall):
    """Exponential failures, equal nodes, synchronous checkpoints, a node at hand."""
    one = job(wear=Wear(mtbf_hours * HOUR, 0.0), saving=Saving(every, stall, stall))
    simulated = estimate([run.goodput for run in played(one, 60, 40)])
    assert simulated.low <= goodput(every * 10.0, stall, 400.0, mtbf_hours * HOUR / 10) <= simulated.high
    assert simulated.high - simulated.low < 0.02


def test_the_interval_holds_the_closed_form_about_as_often_as_it_says():
    """Of 40 intervals of 95 %, 33 or fewer would hold it with a probability of 0.3 %."""
    expected = goodput(1000.0, 60.0, 400.0, 10 * HOUR)
    studies = [estimate([run.goodput for run in played(job(), 20, 12, seed)]) for seed in range(40)]
    assert sum(one.low <= expected <= one.high for one in studies) > 33


@pytest.mark.parametrize("stall", [20.0, 120.0])
def test_the_best_time_between_checkpoints_is_dalys(stall):
    """By a parabola through the simulated goodput over the interval's logarithm."""
    best = best_interval(stall, 10 * HOUR)
    steps = np.unique(np.round(best / 10.0 * np.geomspace(0.4, 2.5, 9)).astype(int))
    simulated = [
        np.mean([run.goodput for run in played(job(saving=Saving(int(every), stall, stall)), 60, 20)])
        for every in steps
    ]
    logs = np.log(steps * 10.0)
    parabola = np.polynomial.Polynomial.fit(logs, simulated, 3)
    found = minimize_scalar(lambda x: -parabola(x), bounds=(logs[0], logs[-1]), method="bounded").x
    assert np.exp(found) == pytest.approx(best, rel=0.15)
