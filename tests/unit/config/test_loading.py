import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.config import load_config, save_config
from megagpt.config.loading import load_section
from megagpt.config.schema import RunConfig
from megagpt.errors import ConfigError

MINIMAL = "data: {train: [{path: a}]}\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a configuration file c.yaml into an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str) -> str:
        Path("c.yaml").write_text(text, encoding="utf-8")
        return "c.yaml"

    return write_text


def problems(path: str, *overrides: str) -> list[str]:
    """The lines of the error that loading raises, without the heading that several have."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    heading, *rest = str(caught.value).splitlines()
    if not rest:
        return [heading]
    assert heading == f"{len(rest)} problems in the configuration"
    return [line.strip() for line in rest]


def test_values_come_from_defaults_then_file_then_overrides_in_order(write):
    path = write(MINIMAL + "train: {steps: 500, seed: 3}\n")
    config = load_config(path, ["train.steps=200", "train.steps=300", "optimizer.betas=[0.8, 0.9]"])
    assert (config.train.steps, config.train.seed, config.train.global_batch_size) == (300, 3, 32)
    assert config.optimizer.betas == (0.8, 0.9)


def test_overrides_reach_into_lists_and_free_mappings(write):
    path = write("data: {train: [{path: a}, {path: b, weight: 2}]}\n")
    config = load_config(
        path,
        ["data.train.1.path=x", "data.validation=[{path: v}]", "deepspeed.zero_optimization.overlap_comm=false"],
    )
    assert [(source.path, source.weight) for source in config.data.train] == [("a", 1.0), ("x", 2.0)]
    assert config.data.validation[0].path == "v"
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": False}}


def test_an_override_changes_only_its_own_place_where_the_file_shares_a_value_by_alias(write):
    path = write("data: {train: &both [{path: a}], validation: *both}\n")
    config = load_config(path, ["data.train.0.path=b"])
    assert (config.data.train[0].path, config.data.validation[0].path) == ("b", "a")


def test_a_section_with_nothing_below_it_has_its_defaults(write):
    assert load_config(write(MINIMAL + "logging:\n  # every: 1\n")).logging.every == 10


def test_values_given_as_they_are_need_not_be_yaml(write):
    text = "a\x7f\udcff: [b"
    config = load_section(RunConfig, write(MINIMAL), [("train.run_dir", text), ("train.steps", 300)])
    assert (config.train.run_dir, config.train.steps) == (text, 300)
    with pytest.raises(ConfigError, match=r"^override train\.steps='x': train\.steps: expected a whole number above 0"):
        load_section(RunConfig, write(MINIMAL), [("train.steps", "x")])


# All problems at once, each with its place


def test_every_problem_of_file_and_overrides_is_reported_in_one_error_with_its_place(write):
    path = write(
        """\
model:
  hiden_size: 512
  num_attention_heads: 7
  position: ropee
  num_layers: true
  num_layers: 4
lr: 3
data:
  train: [{paht: a, weight: -1}, {}]
  seq_len: 512
optimizer: {lr: 3e-4x, betas: [-1, 2]}
train:
  global_batch_size: 32
  micro_batch_size: 5
  stepps: 10
  precision: fp16
  device: cpu
  compile: yes
"""
    )
    overrides = ["train.run_dir=5", "modle.x=3", "train.seed", "data.train.7.path=x", "schedule.wurmup_steps=1e3"]
    assert problems(path, *overrides) == [
        "c.yaml:2: model.hiden_size: unknown key; did you mean model.hidden_size?",
        "c.yaml:3: model.num_attention_heads: 7 does not divide hidden_size 512; choose 1, 2, 4, 8, 16, 32, 64 or 128",
        "c.yaml:4: model.position: expected learned, sinusoidal or rope, but it is the text 'ropee'; "
        "did you mean rope?",
        "c.yaml:6: model.num_layers: given twice; remove one",
        "c.yaml:7: lr: unknown key; did you mean optimizer.lr?",
        "c.yaml:9: data.train.0.paht: unknown key; did you mean data.train.0.path?",
        "c.yaml:9: data.train.0.weight: expected a number above 0, but it is -1",
        "c.yaml:9: data.train.1.path: required, but not given; expected text",
        "c.yaml:11: optimizer.lr: expected a number above 0, but it is the text '3e-4x'",
        "c.yaml:11: optimizer.betas: expected a list of 2, each a number at least 0 and below 1, but it is [-1, 2]",
        "c.yaml:14: train.micro_batch_size: 5 does not divide train.global_batch_size 32; choose 1, 2, 4, 8, 16 or 32",
        "c.yaml:15: train.stepps: unknown key; did you mean train.steps?",
        "c.yaml:16: train.precision: fp16 needs a GPU; with train.device cpu choose bf16 or fp32",
        "c.yaml:18: train.compile: expected true or false, but it is the text 'yes'",
        "override train.run_dir=5: train.run_dir: expected text, but it is 5",
        "override modle.x=3: modle: unknown key; did you mean model?",
        "override train.seed: expected section.key=value, for example train.steps=100",
        "override data.train.7.path=x: no entry 7; the list has 2, counted from 0",
        "override schedule.wurmup_steps=1e3: schedule.wurmup_steps: unknown key; did you mean schedule.warmup_steps?",
        "override schedule.wurmup_steps=1e3: schedule.warmup_steps: expected a whole number at least 0, "
        "but it is 1000.0",
    ]


def test_a_value_from_an_override_is_never_blamed_on_the_line_that_it_replaced(write):
    path = write("data:\n  train: [{path: a, weight: 1}]\ntrain:\n  steps: 500\n")
    assert problems(path, "train.steps=x", "data.train=[{path: b, weight: 0}]", "data.train.0.path=3") == [
        "override train.steps=x: train.steps: expected a whole number above 0, but it is the text 'x'",
        "override data.train=[{path: b, weight: 0}]: data.train.0.weight: expected a number above 0, but it is 0",
        "override data.train.0.path=3: data.train.0.path: expected text, but it is 3",
    ]


def test_a_rule_between_valid_sections_is_checked_while_other_sections_have_errors(write):
    path = write(MINIMAL + "schedule: {warmup_steps: 2000}\noptimizer: {lr: no}\n")
    assert problems(path) == [
        "c.yaml:2: schedule.warmup_steps: 2000 exceeds train.steps 1000; lower it",
        "c.yaml:3: optimizer.lr: expected a number above 0, but it is the text 'no'",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.micro_batch_size=5"], "train.micro_batch_size: 5 does not divide train.global_batch_size 32"),
        (["train.steps=50"], "schedule.warmup_steps: 100 exceeds train.steps 50"),
        (["data.seq_len=257"], "data.seq_len: 257 exceeds model.max_seq_len 256"),
        (["schedule={name: wsd, decay_steps: 950}"], "schedule.decay_steps: 950 and warmup_steps 100 together exceed"),
        (["parallel={zero_stage: 0, offload_optimizer: true}"], "parallel.offload_optimizer: needs"),
        (["parallel={zero_stage: 2, offload_parameters: true}"], "parallel.offload_parameters: needs"),
        (["model.num_kv_heads=4"], "model.num_kv_heads: 4 does not divide num_attention_heads 6; choose 1, 2, 3 or 6"),
        (["model.hidden_size=30", "model.position=rope"], "model.position: rope needs an even head size"),
        (
            ["model.hidden_size=33", "model.num_attention_heads=3", "model.position=sinusoidal"],
            "model.position: sinusoidal needs an even hidden_size",
        ),
        (["optimizer.lr=.inf"], "optimizer.lr: expected a number above 0, but it is .inf"),
        (["deepspeed=3"], "deepspeed: expected a mapping of JSON values, but it is 3"),
        (["model=3"], "model: expected a section with vocab_size, vocab_multiple_of, num_layers"),
        (["evaluation.metrics=[a]"], "evaluation.metrics: unknown key; evaluation has every, batches"),
        (
            ["train.every=1"],
            "train.every: unknown key; did you mean checkpoint.every, evaluation.every or logging.every?",
        ),
        (["data.train=[{path: a, path: b}]"], "0.path is given twice; remove one"),
        (["train.seed="], "no value after '='; write train.seed=null to unset it"),
        (["=3"], "expected section.key=value"),
        (["train.seed=[1"], "line 1: not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
    ],
)
def test_each_contradiction_and_wrong_override_is_one_line_that_names_the_key(write, overrides, message):
    (line,) = problems(write(MINIMAL), *overrides)
    assert line.startswith("override " if "schedule.warmup" not in message else "c.yaml: ")
    assert message in line


# Files that are no configuration


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "c.yaml: the configuration is empty; it needs at least data.train"),
        (b"# nothing\n", "c.yaml: the configuration is empty; it needs at least data.train"),
        (b"- a\n", "c.yaml: expected sections (model, data, "),
        (b"model:\n  a: 1\n b: 2\n", "c.yaml:3: not valid YAML: while parsing a block mapping, expected <block end>"),
        (b"model: {a: \x00}\n", "c.yaml:1: not valid YAML: unacceptable character #x0000"),
        (b"a: \xff\n", "c.yaml: not UTF-8 text: invalid start byte at byte 3"),
        (b"a: 1\n---\nb: 2\n", "c.yaml:2: not valid YAML: expected a single document"),
        (b"a: &x [*x]\n", "c.yaml:1: not valid YAML: an alias contains itself"),
        (b"\na: !!python/name:os.system\n", "c.yaml:2: not valid YAML: could not determine a constructor"),
        (b"? [a, b]\n: 1\n", "c.yaml:1: not valid YAML: while constructing a mapping, found unhashable key"),
        (b"train: {steps: 500}\n", "c.yaml: data: required, but not given; expected a section with train"),
        (
            b"data:\n",
            "c.yaml:1: data.train: required, but not given; expected a list of {path, weight, name}, at least 1",
        ),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line_with_its_line_number(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_bytes(content)
    (line,) = problems("c.yaml")
    assert line.startswith(message)


def test_a_file_that_cannot_be_read_is_one_line_with_the_reason(tmp_path):
    assert problems(f"{tmp_path}/none.yaml") == [
        f"{tmp_path}/none.yaml: cannot read the configuration file: No such file or directory"
    ]
    assert problems(str(tmp_path)) == [f"{tmp_path}: cannot read the configuration file: Is a directory"]


@given(st.text(), st.lists(st.text()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_and_any_override_is_a_configuration_or_a_configuration_error(tmp_path, text, overrides):
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + text, encoding="utf-8")
    try:
        load_config(path, overrides)
    except ConfigError:
        return


# Saving

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)
#: Texts that some YAML version takes for another type, which a careless writer leaves unquoted.
treacherous = st.sampled_from(
    ["3e-4", "1e5", "no", "on", "~", "null", "", "true", "010", "0x1F", "1_000", "1:30", "2024-01-01", ".inf", "<<",
     "=", "- a", "a: b", "a #b", "'", '"', "\n", " a ", "!x", "&x", "*x", "%x", "@x", "`", "{", "]", "\x85", "\ufeff"]
)  # fmt: skip
texts = st.text() | treacherous
positive = st.floats(min_value=1e-30, max_value=1e30)
sources = st.lists(st.fixed_dictionaries({"path": texts, "weight": positive}), min_size=1, max_size=3)
trees = st.fixed_dictionaries(
    {"data": st.fixed_dictionaries({"train": sources, "validation": sources, "document_mask": st.booleans()})},
    optional={
        "model": st.builds(
            lambda heads, size, norm: {"num_attention_heads": heads, "hidden_size": heads * size, "norm": norm},
            st.integers(1, 64),
            st.integers(1, 256),
            st.sampled_from(["layernorm", "rmsnorm"]),
        ),
        "optimizer": st.fixed_dictionaries(
            {"lr": positive, "betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2), "eps": positive}
        ),
        "train": st.fixed_dictionaries({"run_dir": texts, "seed": st.integers(0, 2**63 - 1)}),
        "checkpoint": st.fixed_dictionaries({"resume": texts}),
        "deepspeed": st.dictionaries(texts, json_values | treacherous, max_size=4),
    },
)


@given(trees)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_saved_configuration_loads_as_exactly_the_same_one(tmp_path, tree):
    config = RunConfig.model_validate(tree)
    save_config(config, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == config
    assert repr(loaded) == repr(config)  # tells 1 from 1.0 and True in the free mapping


def test_saving_leaves_the_old_file_whole_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    config = RunConfig.model_validate({"data": {"train": [{"path": "a"}]}})
    save_config(config, path)
    before = path.read_text()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_config(config.model_copy(update={"deepspeed": {"a": 1}}), path)
    assert path.read_text() == before
