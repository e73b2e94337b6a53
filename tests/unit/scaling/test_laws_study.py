"""Ladders: what they train, and that what cannot be fitted or run is refused as a whole before anything starts."""

from pathlib import Path

import pytest
import yaml

from megagpt.errors import ConfigError, UsageError
from megagpt.model.counts import flops_per_token
from megagpt.scaling.laws.study import load_laws, plan_laws, rung
from megagpt.training.horizon import horizon
from megagpt.training.schedule import Schedule
from tests.unit.scaling.fake_ladders import SIZES, create_ladder, finish_run, write_ladder

ROOT = Path(__file__).parents[3]


def planned(folder, *changes, **keys):
    study = load_laws(write_ladder(folder, **keys), changes)
    return study, plan_laws(study)


def test_every_size_meets_every_budget_with_a_schedule_of_its_own(tmp_path):
    study, entries = planned(tmp_path, tokens=[2e6, 8e6], flops=[1e13], warmup_share=0.1)
    assert len(entries) == len(SIZES) * 3
    for entry in entries:
        one, train = rung(study, entry.curve, entry.config), entry.config.train
        step = train.global_batch_size * entry.config.seq_len
        if "tokens" in entry.curve:
            assert abs(one.tokens - float(entry.curve.split()[1])) <= step / 2
        else:
            assert one.flops == pytest.approx(1e13, rel=0.02)
            assert one.tokens == round(1e13 / flops_per_token(entry.config.model, 16) / step) * step
        schedule = Schedule.of(entry.config, horizon(entry.config))
        assert schedule.rate(round(0.1 * train.steps), train.steps) == pytest.approx(study.lr, rel=0.01)
        assert schedule.rate(train.steps - 1, train.steps) == pytest.approx(0.1 * study.lr, rel=0.02), "it ends there"
    assert len({entry.name for entry in entries}) == len(entries)


def test_learning_rates_follow_the_power_law_or_mup(tmp_path):
    study, entries = planned(tmp_path, lr_exponent=-0.25)
    first = study.parameters(entries[0].config.model)
    for entry in entries:
        share = study.parameters(entry.config.model) / first
        assert entry.config.optimizer.lr == pytest.approx(1e-2 * share**-0.25)
        assert entry.config.model.mup_base_width is None
    _, entries = planned(tmp_path, transfer="mup")
    assert {entry.config.optimizer.lr for entry in entries} == {1e-2}
    assert {entry.config.model.mup_base_width for entry in entries} == {32}


def test_n_counts_what_the_study_says(tmp_path):
    _, entries = planned(tmp_path)
    model = entries[0].config.model
    counted = {count: planned(tmp_path, count=count)[0].parameters(model) for count in ("all", "body")}
    assert counted["all"] - counted["body"] == (128 + 16) * 32, "tokens and learned positions"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"flops": [4e12, 1e12]}, "1e+12 follows 4e+12; give the budgets ascending"),
        ({"flops": [1e12]}, "fewer than 2 budgets, too few for a law"),
        ({"sizes": dict(list(SIZES.items())[:2])}, "2 of them are too few for a law; give 3 or more"),
        ({"sizes": dict(reversed(SIZES.items()))}, r"w128 \(\d+,\d+ parameters\) follows w256"),
        ({"flops": [1e10, 1e12]}, "1e10 FLOPs of w256 are 1 steps; give 20 at least"),
        ({"overrides": {"optimizer.lr": 0.1}}, "overrides: optimizer.lr is the study's `lr`"),
        ({"overrides": {"data.validation": []}}, "data.validation: is empty"),
        ({"transfer": "mup", "lr_exponent": -0.1}, "is for transfer=power"),
        ({"transfer": "mup", "sizes": SIZES | {"wide": {"model.hidden_size": 512, "model.num_attention_heads": 16}}},
         "wide has heads of 32 and w32 of 16"),
        ({"sizes": SIZES | {"w256": {"model.hiden_size": 64}}}, "did you mean model.hidden_size"),
        ({"ranks": 3}, "3"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_or_fitted_is_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message.replace("+", r"\+") if "(" not in message else message):
        planned(tmp_path, **keys)


def test_a_size_whose_folder_belongs_to_another_configuration_is_refused_by_name(tmp_path):
    study, _ = planned(tmp_path)
    made = create_ladder(tmp_path / "out", study)
    finish_run(made.entries[0], 3.0)
    changed, _ = planned(tmp_path, "sizes.w32={model.hidden_size: 48, model.num_attention_heads: 3}")
    with pytest.raises(UsageError) as caught:
        create_ladder(tmp_path / "out", changed)
    assert made.entries[0].name in str(caught.value)
    assert "model.hidden_size 32 there and 48 here" in str(caught.value)
    again = create_ladder(tmp_path / "out", study)
    assert [entry.state for entry in again.entries[:2]] == ["finished", "missing"]


@pytest.mark.parametrize(
    "path", sorted(ROOT.joinpath("configs/scaling").glob("laws_*.yaml")), ids=lambda path: path.stem
)
def test_a_shipped_ladder_can_be_planned(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.idx").touch()
    paths = [f"data.{name}=[{{path: {tmp_path / name}}}]" for name in ("train", "validation")]
    study = load_laws(path, paths)
    assert len(plan_laws(study)) == len(study.sizes) * (len(study.tokens) + len(study.flops))
    assert yaml.safe_load(path.read_text())["lr"] == study.lr
