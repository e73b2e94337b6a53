"""A scaling-law study as YAML, and the runs it asks for: every size with every budget, all checked before any starts.

A budget is a number of tokens (the same for every size) or of FLOPs (an IsoFLOP curve: larger models read fewer).
Each run has a schedule of its own that ends where its budget does: warm-up for a share of its steps, then a cosine; no
point is read off another run half-way down. The learning rate goes from size to size by a power law, or by muP.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, JsonValue, ValidationInfo, field_validator

from megagpt.config import ModelConfig, RunConfig, check_batches
from megagpt.config.loading import load_section
from megagpt.config.schema import Section
from megagpt.errors import ConfigError
from megagpt.model.counts import flops_per_token, parameter_count
from megagpt.scaling.study import Entry, split_changes

Budget = Annotated[float, Field(gt=0)]

LEAST_SIZES = 3
LEAST_STEPS = 20
"""Of a run: below, a warm-up and a cosine are no schedule."""

# `overrides` and the settings of a size may change these.
_LEAN: dict[str, Any] = {
    "evaluation.every": 0,
    "evaluation.prompts": [],
    "checkpoint.every": 0,
    "schedule.name": "cosine",
}
# What the study says itself, and how a user says it.
_OWNED = {
    "train.run_dir": "is the folder that --output names",
    "train.steps": "comes from the budgets, `tokens` and `flops`",
    "train.tokens": "comes from the budgets, `tokens` and `flops`",
    "train.rampup_start": "would make steps differ in tokens",
    "train.rampup_increment": "would make steps differ in tokens",
    "train.rampup_samples": "would make steps differ in tokens",
    "optimizer.lr": "is the study's `lr`, of its first size",
    "schedule.warmup_steps": "comes from the study's `warmup_share`",
    "schedule.warmup_tokens": "comes from the study's `warmup_share`",
    "schedule.decay_steps": "is all that follows the warm-up",
    "schedule.decay_tokens": "is all that follows the warm-up",
    "model.mup_base_width": "comes from the study's `transfer`",
    "checkpoint.resume": "belongs to the study: every run starts anew",
}
_UNSET = (
    *("train.tokens", "train.rampup_start", "train.rampup_increment", "train.rampup_samples"),
    *("schedule.warmup_tokens", "schedule.decay_steps", "schedule.decay_tokens"),
)


class LawsConfig(Section):
    """What a scaling-law study trains, and how."""

    config: str
    """Configuration of a run, which all runs share but for what this study says."""
    overrides: dict[str, JsonValue] = Field({})
    """Keys and values of the configuration that hold for every run: {train.global_batch_size: 64}."""
    sizes: dict[str, dict[str, JsonValue]]
    """Model sizes by name, from the smallest to the largest, 3 or more: {small: {model.hidden_size: 256}}."""
    tokens: list[Budget] = Field([])
    """Budgets in tokens, ascending: each size is trained on each, rounded to whole steps."""
    flops: list[Budget] = Field([])
    """Budgets in floating-point operations, ascending: each is an IsoFLOP curve over the sizes."""
    lr: float = Field(gt=0)
    """Peak learning rate of the first size, tuned for it."""
    transfer: Literal["power", "mup"] = "power"
    """How the other sizes get theirs: power (lr x (N / first N) ^ lr_exponent) or mup (Yang et al. 2022)."""
    lr_exponent: float = Field(0.0, ge=-2, le=0)
    """With transfer=power: of the power law in the number of parameters; 0: the same rate for all."""
    warmup_share: float = Field(0.05, ge=0, lt=0.5)
    """Share of each run's steps in which its learning rate rises; it falls in all others."""
    count: Literal["all", "body"] = "all"
    """What N counts: all parameters (Hoffmann et al. 2022) or body: not embeddings and head (Kaplan et al. 2020)."""
    predict_flops: list[Budget] = Field([])
    """Budgets to give the compute-optimal size for; empty: 1, 10 and 100 times the largest trained."""
    ranks: int = Field(1, gt=0)
    """Ranks of each run."""
    ranks_per_node: int | None = Field(None, gt=0)
    """Ranks of a node; null: all of a run are on one."""
    cores_per_rank: int | None = Field(None, gt=0)
    """CPU cores of a rank; null: the ranks share what the machine, or the job, has."""
    keep_checkpoints: bool = False
    """Whether the checkpoint that a run ends with stays in the folder of the study."""

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        _check_keys(overrides)
        return overrides

    @field_validator("sizes")
    @classmethod
    def _check_sizes(cls, sizes: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        if len(sizes) < LEAST_SIZES:
            raise ValueError(f"{len(sizes)} of them are too few for a law; give {LEAST_SIZES} or more")
        for settings in sizes.values():
            _check_keys(settings)
            if twice := settings.keys() & (info.data.get("overrides") or {}).keys():
                raise ValueError(f"{min(twice)} is set by overrides, too; keep one")
        return sizes

    @field_validator("tokens", "flops", "predict_flops")
    @classmethod
    def _check_ascending(cls, budgets: list[float]) -> list[float]:
        for earlier, later in itertools.pairwise(budgets):
            if later <= earlier:
                raise ValueError(f"{later:.4g} follows {earlier:.4g}; give the budgets ascending, each once")
        return budgets

    @field_validator("flops")
    @classmethod
    def _check_budgets(cls, flops: list[float], info: ValidationInfo) -> list[float]:
        if "tokens" in info.data and len(info.data["tokens"]) + len(flops) < 2:
            raise ValueError("and tokens together are fewer than 2 budgets, too few for a law; give 2 or more")
        return flops

    @field_validator("lr_exponent")
    @classmethod
    def _check_exponent(cls, exponent: float, info: ValidationInfo) -> float:
        if exponent and info.data.get("transfer") == "mup":
            raise ValueError("is for transfer=power; muP has no exponent to choose")
        return exponent

    @field_validator("ranks_per_node")
    @classmethod
    def _check_nodes(cls, ranks_per_node: int | None, info: ValidationInfo) -> int | None:
        ranks = info.data.get("ranks")
        if ranks and ranks_per_node and ranks > ranks_per_node and ranks % ranks_per_node:
            raise ValueError(f"{ranks} ranks do not fill nodes of {ranks_per_node}; choose a multiple")
        return ranks_per_node

    def parameters(self, model: ModelConfig) -> int:
        """The N of a model."""
        return parameter_count(model, embeddings=self.count == "all")


class Rung(NamedTuple):
    """What the plan says of one run."""

    size: str
    parameters: int
    """N, of what the study counts."""
    tokens: int
    """D: those of all steps."""
    flops: float
    """Of forward and backward over D, by megagpt.model.counts."""


def load_laws(path: str | Path, changes: Sequence[str] = ()) -> LawsConfig:
    """Read a study and apply changes: `key=value` of the study, `section.key=value` of the runs' configuration.

    Raises ConfigError that names every problem at once.
    """
    of_study, of_runs = split_changes(changes)
    study = load_section(LawsConfig, path, of_study)
    if not of_runs:
        return study
    return load_section(LawsConfig, path, [*of_study, ("overrides", study.overrides | of_runs)])


def plan_laws(study: LawsConfig) -> list[Entry]:
    """Every run of the study, size by size. Raises ConfigError with all that is wrong with any of them."""
    problems = {f"{where}: {key} {why}": None for where, key, why in _misplaced(study)}
    models: dict[str, RunConfig] = {}
    for size in study.sizes:
        try:
            models[size] = _resolve(study, size)
        except ConfigError as error:
            problems |= dict.fromkeys(_lines(error))
    if len(models) == len(study.sizes):
        problems |= dict.fromkeys(_unlike(study, models))
    nodes = -(-study.ranks // (study.ranks_per_node or study.ranks))
    entries: list[Entry] = []
    for size, base in models.items():
        for label, budget_tokens in _budgets(study, base):
            steps = round(budget_tokens / (base.train.global_batch_size * base.seq_len))
            if steps < LEAST_STEPS:
                problems[f"{label} of {size} are {steps} steps; give {LEAST_STEPS} at least, by a larger budget or a "
                         "smaller train.global_batch_size"] = None  # fmt: skip
                continue
            try:
                config = _resolve(study, size, models, steps)
                check_batches(config.train.batches, config.train.micro_batch_size, study.ranks)
            except ConfigError as error:
                problems |= dict.fromkeys(_lines(error))
                continue
            entries.append(Entry(f"{size}, {label}", study.ranks, nodes, 1, config))
    if problems:
        if len(problems) == 1:
            raise ConfigError(next(iter(problems)))
        raise ConfigError("\n  ".join([f"{len(problems)} problems in the runs of the study", *problems]))
    return entries


def rung(study: LawsConfig, curve: str, config: RunConfig) -> Rung:
    """What a run of the study is: of which size, with how many parameters, tokens and FLOPs."""
    tokens = config.train.steps * config.train.global_batch_size * config.seq_len
    flops = float(flops_per_token(config.model, config.seq_len)) * tokens
    return Rung(curve.rpartition(", ")[0], study.parameters(config.model), tokens, flops)


def _check_keys(settings: dict[str, Any]) -> None:
    if whole := [key for key in settings if "." not in key]:
        raise ValueError(f"{whole[0]} is not section.key, as in {{model.hidden_size: 256}}")


def _misplaced(study: LawsConfig) -> Iterator[tuple[str, str, str]]:
    """(where, key, why) of every key that is not for a study to set."""
    for where, settings in (("overrides", study.overrides), *((f"sizes.{n}", one) for n, one in study.sizes.items())):
        for key in settings:
            if key in _OWNED:
                yield where, key, _OWNED[key]


def _resolve(
    study: LawsConfig, size: str, models: dict[str, RunConfig] | None = None, steps: int | None = None
) -> RunConfig:
    """The configuration of a size; with all sizes' and a number of steps, of a run."""
    settings = {key: value for key, value in (study.overrides | study.sizes[size]).items() if key not in _OWNED}
    keys: dict[str, Any] = _LEAN | dict.fromkeys(_UNSET) | settings
    keys |= {"schedule.warmup_steps": 0, "checkpoint.resume": "auto", "optimizer.lr": study.lr}
    if models and steps:
        first, model = next(iter(models.values())).model, models[size].model
        keys |= {"train.steps": steps, "schedule.warmup_steps": round(study.warmup_share * steps)}
        if study.transfer == "mup":
            keys["model.mup_base_width"] = first.hidden_size
        else:
            keys["optimizer.lr"] *= (study.parameters(model) / study.parameters(first)) ** study.lr_exponent
    return load_section(RunConfig, study.config, list(keys.items()))


def _budgets(study: LawsConfig, base: RunConfig) -> Iterator[tuple[str, float]]:
    """(its label, tokens) of every budget of a size."""
    for tokens in study.tokens:
        yield f"{short(tokens)} tokens", tokens
    for flops in study.flops:
        yield f"{short(flops)} FLOPs", flops / flops_per_token(base.model, base.seq_len)


def _unlike(study: LawsConfig, models: dict[str, RunConfig]) -> Iterator[str]:
    """What keeps sizes from standing on one ladder."""
    names = list(models)
    for smaller, larger in itertools.pairwise(names):
        few, many = (study.parameters(models[name].model) for name in (smaller, larger))
        if many <= few:
            yield f"sizes: {larger} ({many:,} parameters) follows {smaller} ({few:,}); give them ascending"
    first = models[names[0]]
    for name in names[1:]:
        if study.transfer == "mup" and models[name].model.head_dim != first.model.head_dim:
            there, here = first.model.head_dim, models[name].model.head_dim
            yield (f"sizes: {name} has heads of {here} and {names[0]} of {there}; transfer=mup needs the same, so set "
                   "model.num_attention_heads")  # fmt: skip
        if models[name].data != first.data or models[name].seq_len != first.seq_len:
            yield f"sizes: {name} has other data or another length than {names[0]}; losses could not be compared"
    if not first.data.validation:
        yield "data.validation: is empty, but the law is one of validation losses; give a dataset"
    for source in (*first.data.train, *first.data.validation):
        if not Path(f"{source.path}.idx").exists():
            yield f"data: {source.path}.idx does not exist; make the dataset with tools.preprocess"


def short(number: float) -> str:
    """2e6 for 2000000."""
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _lines(error: ConfigError) -> list[str]:
    """The problems of a ConfigError, one line each; with several the first line counts them."""
    lines = [line.strip() for line in str(error).splitlines()]
    return lines if len(lines) == 1 else lines[1:]
