"""The learning rate, against torch's own schedulers and the shapes' definitions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config.schema import ScheduleConfig
from megagpt.training.schedule import Schedule

STEPS, PEAK = 200, 3e-4


def rates(**settings: object) -> list[float]:
    schedule = ScheduleConfig.model_validate(settings)
    built = Schedule.build(schedule, PEAK, STEPS)
    return [built.rate(step, step + 1) for step in range(STEPS + 20)]


@pytest.mark.parametrize(
    ("name", "fall"),
    [
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=160, eta_min=PEAK / 10)),
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=160)),
    ],
)
def test_warmup_and_fall_equal_torch_schedulers(name, fall):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 40, 1.0, total_iters=39)
    reference = []
    for _ in range(40):
        reference.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warmup.step()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = fall(optimizer)
    for _ in range(160):
        reference.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(name=name, warmup_steps=40)[:STEPS] == pytest.approx(reference, rel=1e-6)


def test_constant_stays_at_the_peak_after_warmup():
    assert rates(name="constant", warmup_steps=10)[10:] == [PEAK] * (STEPS + 10)


def test_wsd_holds_the_peak_and_falls_at_the_end_of_the_run():
    values = rates(name="wsd", warmup_steps=10, decay_steps=50, min_lr_ratio=0.0)
    assert values[10:151] == [PEAK] * 141
    assert values[175] == pytest.approx(PEAK / 2)
    assert values[STEPS:] == [0.0] * 20


def test_a_schedule_differs_from_another_only_where_the_run_has_been():
    def schedule(total: int, **settings: object) -> Schedule:
        return Schedule.build(ScheduleConfig.model_validate({"warmup_steps": 10, **settings}), PEAK, total)

    wsd = {"name": "wsd", "decay_steps": 90}
    assert schedule(200_000, **wsd).difference(schedule(100_000, **wsd), 99_910) is None
    assert "was 100000 and is now 200000" in schedule(200_000, **wsd).difference(schedule(100_000, **wsd), 100_000)
    assert schedule(300).difference(schedule(200), 10) is None  # in the warm-up
    assert schedule(300).difference(schedule(200), 50)
    assert schedule(300).kept_by(schedule(200)) == 190
    kept = Schedule.build(ScheduleConfig(warmup_steps=10, decay_steps=190), PEAK, 300)
    assert kept.difference(schedule(200), 200) is None
    assert schedule(300, min_lr_ratio=0.2).kept_by(schedule(200)) is None
    assert schedule(300, **wsd).kept_by(schedule(200, **wsd)) is None


@given(
    name=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    warmup=st.integers(0, STEPS),
    decay=st.one_of(st.none(), st.integers(1, 2 * STEPS)),
    ratio=st.floats(0, 1),
)
def test_rate_rises_in_warmup_then_never_rises_and_stays_within_its_bounds(name, warmup, decay, ratio):
    values = rates(name=name, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=ratio)
    assert all(earlier < later for earlier, later in itertools.pairwise(values[:warmup]))
    fall = values[warmup:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(fall))
    assert all(PEAK * ratio * (1 - 1e-9) <= value <= PEAK * (1 + 1e-9) for value in fall)
    assert all(value > 0 for value in values[:warmup])
