"""A scaling study as YAML, and the runs that it asks for: all of them are checked before the first one starts.

Every combination of `configs` and of `matrix` is a curve; a curve has a run for every number of ranks (and repeat).
Strong scaling keeps the global batch, train.global_batch_size; weak scaling takes that for the smallest number of ranks
and lets it grow in proportion. A run is known by the hash of its resolved configuration, its ranks and its nodes.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, JsonValue, ValidationInfo, field_validator

from megagpt.config import RunConfig, check_batches
from megagpt.config.loading import load_section
from megagpt.config.schema import Section
from megagpt.config.yaml12 import describe_error, dump, parse
from megagpt.errors import ConfigError
from megagpt.training.history import distinct_names

Kind = Literal["strong", "weak", "laws"]
Ranks = Annotated[int, Field(gt=0)]

LEAST_MEASURED_STEPS = 10

# What short runs for timing have no use for. `overrides` and `matrix` may change it.
_LEAN = {
    "data.validation": [],
    "evaluation.prompts": [],
    "checkpoint.every": 0,
    "schedule.name": "constant",
    "schedule.decay_steps": None,
    "schedule.warmup_tokens": None,
    "schedule.decay_tokens": None,
}
# What the study says itself, and how a user says it.
_OWNED = {
    "train.run_dir": "is the folder that --output names",
    "train.steps": "is the study's `steps`",
    "train.tokens": "would contradict the study's `steps`",
    "train.rampup_start": "would change the batch while it is measured",
    "train.rampup_increment": "would change the batch while it is measured",
    "train.rampup_samples": "would change the batch while it is measured",
    "checkpoint.resume": "belongs to the study: every run starts anew",
    "logging.every": "is 1: each step is measured",
}


class StudyConfig(Section):
    """What a scaling study varies and what it holds."""

    configs: list[str] = Field(min_length=1)
    """Configurations of runs (models, say); each has curves of its own."""
    ranks: list[Ranks] = Field([])
    """Numbers of ranks (processes, each with a GPU or CPU cores); or give `nodes`."""
    nodes: list[Ranks] = Field([])
    """Numbers of nodes, each with `ranks_per_node` ranks."""
    ranks_per_node: int | None = Field(None, gt=0)
    """Ranks of a node; null: all ranks of a run are on one."""
    overrides: dict[str, JsonValue] = Field({})
    """Keys and values of the configuration that hold for every run: {train.micro_batch_size: 8}."""
    matrix: dict[str, list[JsonValue] | dict[str, dict[str, JsonValue]]] = Field({})
    """Axes: a key with its values ([1, 2, 3]), or any name with settings by label ({small: {model.num_layers: 6}})."""
    steps: int = Field(40, gt=0)
    """Optimizer steps of each run."""
    discard_steps: int = Field(10, gt=0)
    """First steps after each start of a run that are not measured: compilation, caches, connections."""
    repeats: int = Field(1, gt=0)
    """Runs of each kind: 1 (intervals of steps of one run only), or 3 and more (intervals of runs)."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """How optimizer.lr grows with the global batch, from that of the smallest number of ranks on (weak scaling)."""
    cores_per_rank: int | None = Field(None, gt=0)
    """CPU cores of a rank; null: the ranks share what the machine, or the job, has."""
    extrapolate_to: list[Ranks] = Field([])
    """Numbers of ranks to predict; empty: doubled up to eight times the largest measured."""
    keep_checkpoints: bool = False
    """Whether the checkpoint that a run ends with stays in the folder of the study."""

    @field_validator("ranks", "nodes", "extrapolate_to")
    @classmethod
    def _check_distinct(cls, counts: list[int]) -> list[int]:
        if len(set(counts)) < len(counts):
            raise ValueError(f"a number is given twice in {dump(counts, flow=True).strip()}; give each once")
        return sorted(counts)

    @field_validator("ranks_per_node")
    @classmethod
    def _check_nodes(cls, ranks_per_node: int | None, info: ValidationInfo) -> int | None:
        ranks, nodes = info.data.get("ranks"), info.data.get("nodes")
        if ranks is None or nodes is None:
            return ranks_per_node
        if bool(ranks) == bool(nodes):
            raise ValueError("give `ranks` or `nodes` with `ranks_per_node`, one of them")
        if nodes and not ranks_per_node:
            raise ValueError("`nodes` needs it: ranks = nodes x ranks_per_node")
        if ranks_per_node:
            for count in ranks:
                if count > ranks_per_node and count % ranks_per_node:
                    raise ValueError(f"{count} ranks do not fill nodes of {ranks_per_node}; choose a multiple")
        return ranks_per_node

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if whole := [key for key in overrides if "." not in key]:
            raise ValueError(f"{whole[0]} is not section.key, as in {{train.micro_batch_size: 8}}")
        return overrides

    @field_validator("matrix")
    @classmethod
    def _check_matrix(cls, matrix: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        taken = dict.fromkeys(info.data.get("overrides") or {}, "overrides")
        for axis, values in matrix.items():
            if not values:
                raise ValueError(f"{axis} has no values; give some, or leave it out")
            for key in _keys(axis, values):
                if "." not in key:
                    raise ValueError(
                        f"{key} is not section.key; or give settings by label: {{a: {{section.key: value}}}}"
                    )
                if key in taken:
                    raise ValueError(f"{key} is set by {taken[key]} and by {axis}; keep one")
                taken[key] = axis
        return matrix

    @field_validator("discard_steps")
    @classmethod
    def _check_discard(cls, discard: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps and steps - discard < LEAST_MEASURED_STEPS:
            raise ValueError(f"leaves {max(0, steps - discard)} of {steps} steps to measure; leave 10 or more")
        return discard

    @field_validator("repeats")
    @classmethod
    def _check_repeats(cls, repeats: int) -> int:
        if repeats == 2:
            raise ValueError("two runs give no useful interval (12.7 standard errors wide); choose 1, or 3 and more")
        return repeats

    def sizes(self) -> list[tuple[int, int]]:
        """(ranks, nodes) of the points of a curve, ascending."""
        if self.nodes:
            assert self.ranks_per_node
            return [(count * self.ranks_per_node, count) for count in self.nodes]
        return [(count, math.ceil(count / (self.ranks_per_node or count))) for count in self.ranks]


@dataclass(frozen=True)
class Entry:
    """One run of a study."""

    curve: str
    """What tells its curve from the others: "gpt2_124m, zero_stage 1"."""
    ranks: int
    nodes: int
    repeat: int
    """Counts from 1."""
    config: RunConfig
    """Resolved, without a run folder of its own."""

    @property
    def identity(self) -> str:
        """Hash of all that the run is."""
        what = {"config": self.described(), "ranks": self.ranks, "nodes": self.nodes, "repeat": self.repeat}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Of its folder: readable, and distinct by the identity."""
        words = re.sub(r"[^A-Za-z0-9_.]+", "-", self.curve).strip("-.")[:80] or "curve"
        run = f"-run{self.repeat}" if self.repeat > 1 else ""
        return f"{words}-{self.ranks}ranks{run}-{self.identity[:8]}"

    def described(self) -> dict[str, Any]:
        """The configuration as JSON, without the run folder."""
        tree = self.config.model_dump(mode="json")
        del tree["train"]["run_dir"]
        return tree


def load_study(path: str | Path, changes: Sequence[str] = ()) -> StudyConfig:
    """Read a study and apply changes: `key=value` of the study, `section.key=value` of the runs' configuration.

    Raises ConfigError that names every problem at once.
    """
    of_study, of_runs = split_changes(changes)
    study = load_section(StudyConfig, path, of_study)
    if not of_runs:
        return study
    return load_section(StudyConfig, path, [*of_study, ("overrides", study.overrides | of_runs)])


def split_changes(changes: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Changes to a study, and keys and values of those to its runs' configuration. Raises ConfigError."""
    of_study, of_runs = [], {}
    for change in changes:
        key, _, text = change.partition("=")
        if key.partition(".")[0] not in RunConfig.model_fields:
            of_study.append(change)
            continue
        try:
            of_runs[key], _, _ = parse(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {change}: {describe_error(error, text)}") from None
    return of_study, of_runs


def plan(study: StudyConfig, kind: Kind) -> list[Entry]:
    """Every run of the study, curve by curve. Raises ConfigError with all that is wrong with any of them."""
    problems: dict[str, None] = {f"{where}: {key} {why}": None for where, key, why in _misplaced(study)}
    curves = list(_curves(study))
    entries: list[Entry] = []
    for curve, file, settings in curves:
        for ranks, nodes in study.sizes():
            try:
                config = _resolve(study, kind, file, settings, ranks)
                check_batches(config.train.batches, config.train.micro_batch_size, ranks)
            except ConfigError as error:
                problems |= dict.fromkeys(_problems(error))
                continue
            entries += [Entry(curve, ranks, nodes, repeat, config) for repeat in range(1, study.repeats + 1)]
            most = config.train.global_batch_size // (config.train.micro_batch_size or 1)
            if kind == "strong" and (beyond := [count for count in study.extrapolate_to if count > most]):
                problem = f"extrapolate_to: the batch of {curve} is for {most} ranks at most, not for {beyond[-1]}"
                problems[problem] = None
    missing = {source.path for entry in entries for source in entry.config.data.train
               if not Path(f"{source.path}.idx").exists()}  # fmt: skip
    problems |= {f"data.train: {path}.idx does not exist; make the dataset with tools.preprocess": None
                 for path in sorted(missing)}  # fmt: skip
    known: dict[str, Entry] = {}
    for entry in entries:
        if other := known.get(entry.identity):
            problems[f"matrix: {other.curve} and {entry.curve} are the same configuration; keep one"] = None
        known[entry.identity] = entry
    if problems:
        total = len(curves) * len(study.sizes()) * study.repeats
        if len(problems) == 1:
            raise ConfigError(next(iter(problems)))
        raise ConfigError("\n  ".join([f"{len(problems)} problems in the {total} runs of the study", *problems]))
    return entries


def _keys(axis: str, values: list[Any] | dict[str, dict[str, Any]]) -> list[str]:
    """The keys of the configuration that an axis of the matrix sets."""
    return [axis] if isinstance(values, list) else list(dict.fromkeys(itertools.chain(*values.values())))


def _misplaced(study: StudyConfig) -> Iterator[tuple[str, str, str]]:
    """(where, key, why) of every key that is not for a study to set."""
    for key in study.overrides:
        if key in _OWNED:
            yield "overrides", key, _OWNED[key]
    for axis, values in study.matrix.items():
        for key in _keys(axis, values):
            if key in _OWNED:
                yield "matrix", key, _OWNED[key]


def _curves(study: StudyConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, configuration file, settings) of every curve."""
    axes: list[list[tuple[str, dict[str, Any]]]] = []
    for axis, values in study.matrix.items():
        if isinstance(values, list):
            short = axis.rpartition(".")[2]
            axes.append([(f"{short} {dump(value, flow=True).strip()}", {axis: value}) for value in values])
        else:
            axes.append([(label, settings) for label, settings in values.items()])
    titles = distinct_names([Path(file).with_suffix("") for file in study.configs])
    for file, title in zip(study.configs, titles, strict=True):
        for chosen in itertools.product(*axes):
            names = [title] if len(study.configs) > 1 or not axes else []
            settings = {key: value for _, part in chosen for key, value in part.items()}
            yield ", ".join(names + [name for name, _ in chosen]), file, settings


def _resolve(study: StudyConfig, kind: Kind, file: str, settings: dict[str, Any], ranks: int) -> RunConfig:
    """The configuration of a run."""
    owned = dict.fromkeys(_OWNED) | {"train.steps": study.steps, "checkpoint.resume": "auto", "logging.every": 1}
    del owned["train.run_dir"]
    keys = _LEAN | {"schedule.warmup_steps": study.steps} | study.overrides | settings
    keys = {key: value for key, value in keys.items() if key not in _OWNED} | owned
    config = load_section(RunConfig, file, list(keys.items()))
    fewest = study.sizes()[0][0]
    if kind == "strong" or ranks == fewest:
        return config
    batch = config.train.global_batch_size
    check_batches(config.train.batches, config.train.micro_batch_size, fewest)
    growth = ranks / fewest
    power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[study.lr_scaling]
    keys |= {"train.global_batch_size": batch * ranks // fewest, "optimizer.lr": config.optimizer.lr * growth**power}
    return load_section(RunConfig, file, list(keys.items()))


def _problems(error: ConfigError) -> list[str]:
    """The problems of a ConfigError, one line each; with several the first line counts them."""
    lines = [line.strip() for line in str(error).splitlines()]
    return lines if len(lines) == 1 else lines[1:]
