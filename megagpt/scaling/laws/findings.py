"""All that a ladder says: its law, what that predicts of the largest runs held out, IsoFLOP curves, best sizes."""

from dataclasses import dataclass

import numpy as np

from megagpt.scaling.experiments import StudyFolder
from megagpt.scaling.laws.fit import LawFit, fit_law, too_few
from megagpt.scaling.laws.isoflop import IsoFlop, SizeLaw, fit_isoflop, fit_size_law
from megagpt.scaling.laws.ladder import Ladder, LadderRun, read_ladder, sample_of
from megagpt.scaling.laws.law import Cost
from megagpt.scaling.measurements import Interval


@dataclass(frozen=True)
class HeldOut:
    """A run of the largest budget, and what the law of all smaller ones says of it."""

    run: LadderRun
    predicted: Interval

    @property
    def error(self) -> float:
        """Predicted over measured loss, less 1."""
        return self.predicted.value / self.run.loss - 1


@dataclass(frozen=True)
class BestSpent:
    """The compute-optimal size for a budget."""

    flops: float
    parameters: Interval
    tokens: Interval
    loss: Interval
    by_isoflop: float | None
    """N by the IsoFLOP curves."""


@dataclass(frozen=True)
class Findings:
    """Of one study."""

    ladder: Ladder
    fit: LawFit | None
    """Of all runs; None: `unfitted` says why."""
    unfitted: str | None
    held_out: list[HeldOut]
    unpredicted: str | None
    """Why nothing is held out; None: something is."""
    cost: Cost
    isoflops: list[IsoFlop]
    size_law: SizeLaw | None
    best: list[BestSpent]


def find(folder: StudyFolder) -> Findings:
    """Read and fit a study, which may be going on."""
    study, ladder = folder.stored.ladder, read_ladder(folder)
    runs = ladder.runs
    unfitted, fit, cost = too_few([run.parameters for run in runs]), None, Cost()
    held_out, unpredicted = _hold_out(ladder)
    isoflops: list[IsoFlop] = []
    if unfitted is None:
        fit = fit_law(sample_of(runs))
        sizes = {run.parameters: run.flops_per_token for run in runs}
        cost = Cost.fitted(list(sizes), list(sizes.values()))
        isoflops = [
            fit_isoflop(budget, some, fit.noise, seed)
            for seed, (budget, some) in enumerate(ladder.isoflops(study.flops).items())
        ]
    size_law = fit_size_law(isoflops)
    best = []
    if fit:
        most = max(run.flops for run in runs)
        for flops in study.predict_flops or [most, 10 * most, 100 * most]:
            by_isoflop = float(size_law.parameters(np.array(flops))) if size_law else None
            best.append(BestSpent(flops, *fit.optimum(flops, cost), by_isoflop))
    return Findings(ladder, fit, unfitted, held_out, unpredicted, cost, isoflops, size_law, best)


def _hold_out(ladder: Ladder) -> tuple[list[HeldOut], str | None]:
    """The largest runs, predicted from the others; or why they cannot be."""
    largest = ladder.largest
    rest = [run for run in ladder.runs if run not in largest]
    if why := too_few([run.parameters for run in rest]):
        return [], f"without the largest budget there are {why}"
    fit = fit_law(sample_of(rest))
    return [HeldOut(run, fit.loss(run.parameters, run.tokens)) for run in largest], None
