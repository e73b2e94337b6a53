"""Fits of step times: known coefficients are recovered, and intervals hold what they should."""

import numpy as np
import pytest

from megagpt.scaling.fits import Fit, fit_curve
from megagpt.scaling.measurements import Mean, measure
from tests.unit.scaling.fake_studies import measured_study

RANKS = np.array([1, 2, 4, 8, 16, 32, 64])
LAWS = {
    "trees": ("strong", "c log2 R", lambda r: 0.05 + 2 / r + 0.012 * np.log2(r), (2, 0.05, 0.012)),
    "rings": ("strong", "c (R - 1)", lambda r: 0.05 + 2 / r + 0.002 * (r - 1), (2, 0.05, 0.002)),
    "weak trees": ("weak", "c log2 R", lambda r: 1 + 0.1 * (1 - 1 / r) + 0.02 * np.log2(r), (1, 0.1, 0.02)),
    "weak rings": ("weak", "c (R - 1)", lambda r: 1 + 0.1 * (1 - 1 / r) + 0.004 * (r - 1), (1, 0.1, 0.004)),
}


def fit(kind, truth, noise, seed=0, ranks=RANKS, draws=200):
    random = np.random.default_rng(seed)
    times = truth(ranks) * (1 + noise * random.standard_normal(len(ranks)))
    means = [Mean(time, noise * time, 9) for time in times]
    return Fit(kind, ranks, means, seed=seed, draws=draws)


@pytest.mark.parametrize("law", LAWS)
def test_known_coefficients_are_recovered(law):
    kind, growth, truth, coefficients = LAWS[law]
    found = fit(kind, truth, noise=1e-4)
    (right,) = [form for form in found.forms if form.terms[-1] == growth]
    assert right.weight > 0.8, "the other form hardly describes it"
    values = [interval.value for interval in right.coefficients.values()]
    assert values == pytest.approx(coefficients, rel=0.05)
    for truth_value, interval in zip(coefficients, right.coefficients.values(), strict=True):
        assert interval.low <= truth_value <= interval.high


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("noise", [0.005, 0.03])
def test_the_interval_of_a_prediction_holds_the_truth(law, noise):
    kind, _, truth, _ = LAWS[law]
    further = [128, 512]
    hits = []
    for seed in range(30):
        found = fit(kind, truth, noise, seed)
        base = truth(1.0) if kind == "weak" else truth(1.0) / np.array(further)
        for at, seconds, share, ideal in zip(further, found.seconds(further), found.efficiency(further),
                                             np.broadcast_to(base, 2), strict=True):  # fmt: skip
            hits += [seconds.low <= truth(at) <= seconds.high, share.low <= ideal / truth(at) <= share.high]
    assert np.mean(hits) > 0.85, "95 %, and 120 tries of which four at a time depend on one fit"


def test_a_prediction_is_the_less_certain_the_further_away_and_the_noisier():
    kind, _, truth, _ = LAWS["trees"]

    def width(noise, at):
        (interval,) = fit(kind, truth, noise).seconds([at])
        return interval.high / interval.low

    assert width(0.01, 32) < width(0.01, 128) < width(0.01, 1024)
    assert width(0.005, 1024) < width(0.05, 1024)


def test_amdahl_s_law_is_recovered_and_told_from_what_it_does_not_describe():
    pure = fit("strong", lambda r: 0.1 + 1.9 / r, noise=0.01)
    share = pure.amdahl.serial_share
    assert share.value == pytest.approx(0.05, rel=0.1)
    assert share.low <= 0.05 <= share.high
    assert pure.amdahl.misfit < 2
    rings = fit("strong", lambda r: 0.1 + 1.9 / r + 0.01 * (r - 1), noise=0.01)
    assert rings.amdahl.misfit > 3
    assert rings.misfit < 2
    assert fit("weak", LAWS["weak trees"][2], noise=0.01).amdahl is None


def test_points_that_no_form_describes_make_the_interval_wider():
    """A jump between nodes, say: the times are exact, but the law is wrong."""

    def jump(ranks):
        return (0.1 + 2 / ranks) * np.where(np.asarray(ranks) > 4, 1.3, 1.0)

    random = np.random.default_rng(0)
    smooth = fit("strong", lambda r: 0.1 + 2 / r, noise=0.005).seconds([32])[0]
    means = [Mean(t * (1 + 0.005 * random.standard_normal()), 0.005 * t, 9) for t in jump(RANKS)]
    jumped = Fit("strong", RANKS, means, draws=200)
    assert jumped.misfit > 3
    assert jumped.seconds([32])[0].high / jumped.seconds([32])[0].low > 2 * smooth.high / smooth.low - 1


@pytest.mark.parametrize("law", LAWS)
def test_two_numbers_of_ranks_leave_the_form_open(law):
    kind, _, truth, _ = LAWS[law]
    found = fit(kind, truth, noise=0.01, ranks=RANKS[:2], draws=300)
    assert found.misfit is None
    assert len(found.forms) == 3
    assert all(form.weight > 0.2 for form in found.forms)
    near, far = found.seconds([2, 64])
    assert near.high / near.low < 1.2
    assert far.high / far.low > 2
    assert far.low <= truth(64) <= far.high


@pytest.mark.parametrize("law", ["rings", "weak trees"])
def test_forms_that_fit_as_well_as_each_other_count_alike(law):
    """Three numbers of ranks, three coefficients: both forms go through all points."""
    kind, _, truth, _ = LAWS[law]
    found = fit(kind, truth, noise=0.01, ranks=RANKS[:3], draws=600)
    assert [form.weight for form in found.forms] == pytest.approx([0.5, 0.5], abs=0.08)


def test_the_same_times_give_the_same_fit():
    first, second = (fit("strong", LAWS["trees"][2], 0.02).seconds([256]) for _ in range(2))
    assert first == second


def test_points_whose_ranks_shared_cores_are_left_out(tmp_path):
    folder = measured_study(tmp_path, "strong", lambda entry: max(0.25, 1 / entry.stored.ranks), ranks=[1, 2, 4, 8])
    folder.entries[3].last.shared_cores = 4
    (curve,) = measure(folder).curves
    found = fit_curve("strong", curve)
    assert list(found.ranks) == [1, 2, 4]
    assert found.seconds([8])[0].value == pytest.approx(0.125, rel=0.2)
    for entry in folder.entries[1:]:
        entry.last.shared_cores = 1
    assert fit_curve("strong", measure(folder).curves[0]) is None
