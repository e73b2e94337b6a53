"""What the runs of a ladder reached, from their metrics.jsonl: validation loss at the end, by N, D and FLOPs."""

import math
from dataclasses import dataclass

from megagpt.errors import UserError
from megagpt.scaling.experiments import EntryFolder, StudyFolder
from megagpt.scaling.laws.fit import Sample
from megagpt.scaling.laws.study import LawsConfig, rung
from megagpt.scaling.measurements import why_not
from megagpt.training.history import read_history

SAME_BUDGET = 0.03
"""Relative distance of FLOPs up to which runs are on one IsoFLOP curve: budgets are rounded to whole steps."""


@dataclass(frozen=True)
class LadderRun:
    """One finished run."""

    name: str
    """Of its folder."""
    size: str
    parameters: int
    """N, of what the study counts."""
    tokens: int
    """D."""
    flops: float
    """Of forward and backward over all tokens."""
    flops_per_token: float
    lr: float
    steps: int
    loss: float
    """Of the whole validation dataset after the last step, nats a token."""
    seconds: float | None
    """From the run's first record to its last."""

    @classmethod
    def of(cls, entry: EntryFolder, study: LawsConfig) -> "LadderRun":
        """From the run's last attempt, which has finished. Raises UserError if it cannot be used."""
        assert entry.last is not None
        config = entry.stored.run_config()
        history = read_history(entry.run_dir(entry.last), entry.name)
        if not history.validation:
            raise UserError("it has no validation loss")
        columns = next(iter(history.validation.values()))
        if columns.counted("step")[-1] != config.train.steps:
            raise UserError(f"its last validation is not of its last step, {config.train.steps}")
        loss = float(columns.counted("loss")[-1])
        if not math.isfinite(loss) or loss <= 0:
            raise UserError(f"its validation loss is {loss}: it diverged")
        size, parameters, tokens, flops = rung(study, entry.stored.curve, config)
        return cls(entry.name, size, parameters, tokens, flops, flops / tokens, config.optimizer.lr, config.train.steps,
                   loss, history.wall_seconds)  # fmt: skip


@dataclass
class Ladder:
    """A study's finished runs, by size and tokens ascending."""

    runs: list[LadderRun]
    problems: dict[str, str]
    """Why a run is not among them, by its name."""

    @property
    def largest(self) -> list[LadderRun]:
        """The runs of the most FLOPs: one, or the last IsoFLOP curve."""
        most = max((run.flops for run in self.runs), default=0.0)
        return [run for run in self.runs if run.flops > most * (1 - SAME_BUDGET)]

    def isoflops(self, budgets: list[float]) -> dict[float, list[LadderRun]]:
        """The runs of each of these budgets of FLOPs."""
        return {budget: [run for run in self.runs if abs(run.flops / budget - 1) < SAME_BUDGET] for budget in budgets}


def read_ladder(folder: StudyFolder) -> Ladder:
    """Every finished run of a study; the others, and what cannot be used, are `problems`."""
    runs, problems = [], {}
    for entry in folder.entries:
        if entry.state != "finished":
            problems[entry.name] = why_not(entry)
            continue
        try:
            runs.append(LadderRun.of(entry, folder.stored.ladder))
        except UserError as error:
            problems[entry.name] = f"finished, but cannot be used: {error}"
    return Ladder(sorted(runs, key=lambda run: (run.parameters, run.tokens)), problems)


def sample_of(runs: list[LadderRun]) -> Sample:
    """Runs as the fit takes them."""
    return Sample.of([run.parameters for run in runs], [run.tokens for run in runs], [run.loss for run in runs])
