"""Studies: what they ask for, and that what cannot be run is refused as a whole before anything starts."""

import math
from pathlib import Path

import pytest

from megagpt.config import check_batch
from megagpt.errors import ConfigError
from megagpt.scaling.study import load_study, plan
from tests.unit.scaling.fake_studies import write_config, write_study

ROOT = Path(__file__).parents[3]
SHIPPED = [file for file in sorted(ROOT.glob("configs/scaling/*.yaml")) if not file.stem.startswith("laws_")]


def test_a_study_is_every_combination_on_every_number_of_ranks(tmp_path):
    matrix = {
        "parallel.zero_stage": [1, 3],
        "size": {"small": {"model.num_layers": 1}, "large": {"model.num_layers": 4, "train.micro_batch_size": 2}},
    }
    other = write_config(tmp_path, "other.yaml", model={"hidden_size": 64})
    study = load_study(write_study(tmp_path, matrix=matrix, repeats=3))
    study = study.model_copy(update={"configs": [*study.configs, str(other)]})
    entries = plan(study, "strong")
    found = {
        (entry.config.model.hidden_size, entry.config.parallel.zero_stage, entry.config.model.num_layers,
         entry.ranks, entry.repeat)
        for entry in entries
    }  # fmt: skip
    assert len(entries) == len(found) == 2 * 2 * 2 * 4 * 3
    assert {entry.config.train.micro_batch_size for entry in entries if entry.config.model.num_layers == 4} == {2}
    assert len({entry.name for entry in entries}) == len(entries)
    assert {entry.curve for entry in entries} == {
        f"{name}, zero_stage {stage}, {size}"
        for name in ("tiny", "other") for stage in (1, 3) for size in ("small", "large")
    }  # fmt: skip


def test_strong_scaling_keeps_the_global_batch_and_weak_scaling_that_of_a_rank(tmp_path):
    study = load_study(write_study(tmp_path, ranks=[2, 4, 16]))
    assert {entry.config.train.global_batch_size for entry in plan(study, "strong")} == {64}
    batches = {entry.ranks: entry.config.train.global_batch_size for entry in plan(study, "weak")}
    assert batches == {2: 64, 4: 128, 16: 512}


@pytest.mark.parametrize(("rule", "power"), [("none", 0), ("sqrt", 0.5), ("linear", 1)])
def test_the_learning_rate_grows_with_the_batch_as_the_study_says(tmp_path, rule, power):
    study = load_study(write_study(tmp_path, ranks=[2, 4, 16], lr_scaling=rule, overrides={"optimizer.lr": 1e-3}))
    weak = {entry.ranks: entry.config.optimizer.lr for entry in plan(study, "weak")}
    assert weak == pytest.approx({ranks: 1e-3 * (ranks / 2) ** power for ranks in (2, 4, 16)})
    assert {entry.config.optimizer.lr for entry in plan(study, "strong")} == {1e-3}


def test_nodes_are_counted_from_the_ranks_and_the_other_way_round(tmp_path):
    assert load_study(write_study(tmp_path, ranks=[1, 4, 16, 8], ranks_per_node=8)).sizes() == [
        (1, 1), (4, 1), (8, 1), (16, 2),
    ]  # fmt: skip
    assert load_study(write_study(tmp_path, ranks=[], nodes=[3, 1], ranks_per_node=4)).sizes() == [(4, 1), (12, 3)]


def test_a_run_measures_each_step_and_neither_evaluates_nor_saves_meanwhile(tmp_path):
    study = load_study(write_study(tmp_path, steps=33))
    config = plan(study, "strong")[0].config
    assert (config.train.steps, config.logging.every, config.checkpoint.every) == (33, 1, 0)
    assert config.data.validation == []
    assert config.schedule.warmup_steps == 33, "short runs stay below the peak of the learning rate"


def test_everything_that_is_wrong_with_the_runs_is_told_at_once(tmp_path):
    study = load_study(write_study(tmp_path, ranks=[1, 3, 5], overrides={"train.run_dir": "x", "modle.bias": True},
                                   matrix={"train.precision": ["bf16", "int8"]}))  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        plan(study, "strong")
    lines = str(caught.value).splitlines()
    assert "3 problems in the 6 runs of the study" in lines[0]
    for expected in ("train.run_dir is the folder that --output names", "did you mean model?",
                     "train.precision: expected bf16, fp16 or fp32"):  # fmt: skip
        assert sum(expected in line for line in lines) == 1, expected

    with pytest.raises(ConfigError) as caught:
        plan(load_study(write_study(tmp_path, ranks=[1, 3, 5])), "strong")
    assert [ranks for ranks in (1, 3, 5) if f"among {ranks} ranks" in str(caught.value)] == [3, 5]


def test_a_batch_that_cannot_be_cut_is_refused_as_training_would_refuse_it(tmp_path):
    ranks = range(1, 13)
    study = load_study(write_study(tmp_path, ranks=list(ranks), overrides={"train.micro_batch_size": 4}))
    with pytest.raises(ConfigError) as caught:
        plan(study, "strong")
    refused = set()
    for count in ranks:
        try:
            check_batch(64, 4, count)
        except ConfigError as error:
            refused.add(str(error))
    assert refused
    assert {line.strip() for line in str(caught.value).splitlines()[1:]} == refused


def test_a_missing_dataset_is_told_before_anything_runs(tmp_path):
    study = load_study(write_study(tmp_path, overrides={"data.train": [{"path": "no/such"}]}))
    with pytest.raises(ConfigError, match=r"no/such\.idx does not exist"):
        plan(study, "strong")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ranks": [2, 2]}, "given twice"),
        ({"ranks": []}, "`ranks` or `nodes`"),
        ({"nodes": [1]}, "one of them"),
        ({"ranks": [], "nodes": [1]}, "ranks_per_node"),
        ({"ranks": [4, 12], "ranks_per_node": 8}, "12 ranks do not fill nodes of 8"),
        ({"ranks": [0]}, "ranks: expected a list"),
        ({"discard_steps": 21}, "leaves 9 of 30 steps"),
        ({"repeats": 2}, "choose 1, or 3 and more"),
        ({"matrix": {"parallel.zero_stage": []}}, "parallel.zero_stage has no values"),
        ({"matrix": {"zero_stage": [1]}}, "zero_stage is not section.key"),
        ({"matrix": {"a": {"b": {"model": {}}}}}, "model is not section.key"),
        ({"matrix": {"train.seed": [1]}, "overrides": {"train.seed": 2}}, "train.seed is set by overrides and by"),
        ({"overrides": {"train": {"seed": 2}}}, "train is not section.key"),
        ({"rank": [1]}, "did you mean ranks?"),
    ],
)  # fmt: skip
def test_an_impossible_study_is_told_what_to_mend(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as caught:
        load_study(write_study(tmp_path, **keys))
    assert "study.yaml:" in str(caught.value)


def test_a_prediction_for_more_ranks_than_the_batch_has_sequences_is_refused(tmp_path):
    study = load_study(write_study(tmp_path, extrapolate_to=[32, 48], overrides={"train.micro_batch_size": 2}))
    with pytest.raises(ConfigError, match="extrapolate_to: the batch of tiny is for 32 ranks at most, not for 48"):
        plan(study, "strong")
    assert plan(study, "weak")


def test_configurations_with_the_same_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_config(tmp_path / folder, train={"seed": ord(folder)})
    study = load_study(write_study(tmp_path, configs=[str(tmp_path / folder / "tiny.yaml") for folder in ("a", "b")]))
    curves = {entry.curve: entry.config.train.seed for entry in plan(study, "weak")}
    assert curves == {"a/tiny": ord("a"), "b/tiny": ord("b")}


def test_null_may_be_written_out(tmp_path):
    assert load_study(write_study(tmp_path, cores_per_rank=None), ["ranks_per_node=null"]).cores_per_rank is None


def test_two_names_for_one_configuration_are_refused(tmp_path):
    study = load_study(write_study(tmp_path, matrix={"a": {"x": {"train.seed": 1}, "y": {"train.seed": 1}}}))
    with pytest.raises(ConfigError, match="x and y are the same configuration"):
        plan(study, "strong")


def test_changes_reach_the_study_and_the_configuration_of_its_runs(tmp_path):
    path = write_study(tmp_path, overrides={"train.seed": 3, "train.precision": "fp32"})
    study = load_study(path, ["ranks=[2]", "steps=50", "train.seed=4", "model.dropout=0.5"])
    (entry,) = plan(study, "strong")
    train = entry.config.train
    assert (entry.ranks, train.steps, train.seed, train.precision) == (2, 50, 4, "fp32")
    assert entry.config.model.dropout == 0.5


def test_a_run_is_known_by_all_that_it_is_and_by_nothing_else(tmp_path):
    def names(*changes: str, **keys: object) -> set[str]:
        return {entry.identity for entry in plan(load_study(write_study(tmp_path, **keys), changes), "strong")}

    known = names()
    assert names("keep_checkpoints=true", "extrapolate_to=[64]") == known
    assert names("ranks=[1,2]") < known
    for change in ("steps=31", "train.seed=1", "optimizer.lr=1e-3", "ranks_per_node=4"):
        assert names(change) != known


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_a_shipped_study_can_be_run(tmp_path, monkeypatch, file, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for folder in ("quickstart/tokens", "corpus"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "train.idx").touch()
    study = load_study(file)
    entries = plan(study, kind)
    assert len(entries) == len({entry.curve for entry in entries}) * len(study.sizes()) * study.repeats
    assert all(math.log2(ranks).is_integer() for ranks, _ in study.sizes())
