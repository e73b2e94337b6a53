"""Fitting the time model's parameters to published runs, and which runs are held out.

Least squares on the logarithm of the step time with a soft L1 loss, so that a few runs of another kind do not bend it.
Only data-parallel runs are fitted, the kind that this project does. Runs of one project and model differ little, so
they are fitted or held out together: of all such groups, by project and size, every second is held out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from megagpt.model.counts import parameter_count
from megagpt.planning.efficiency import Calibration
from megagpt.planning.published import PublishedRun

FOLDS = 5
Floats = npt.NDArray[np.float64]

# name: first value, bounds. No kernel is faster than those of FlashAttention 2 on an A100 (Dao 2023: 72 % of the peak)
# and FlashAttention 3 on an H100 (Shah et al. 2024: 75 %).
_PARAMETERS: dict[str, tuple[float, float, float]] = {
    "matmul.ampere": (0.8, 0.3, 1.0),
    "matmul.hopper": (0.7, 0.3, 1.0),
    "attention.ampere": (0.5, 0.05, 0.72),
    "attention.hopper": (0.4, 0.05, 0.75),
    "first_flash": (0.7, 0.2, 1.0),
    "memory": (0.8, 0.3, 0.95),
    "unfused": (2.0, 1.0, 6.0),
    "links": (0.75, 0.1, 1.0),
    "overlap": (0.8, 0.0, 1.0),
}
_BLOCK_SECONDS = 3e-5  # ten kernels of 3 microseconds: an assumption, as these runs are too large to show it
_SOFT = 0.05  # log error from which on the loss grows linearly


def folds(runs: Sequence[PublishedRun]) -> list[list[PublishedRun]]:
    """The runs that may be fitted, in FOLDS parts, the runs of a group in one."""
    sizes = {run.group: parameter_count(run.model) for run in runs if run.may_be_fitted}
    groups = sorted(sizes, key=lambda group: (group.split(":")[0], sizes[group], group))
    fold_of = {group: number % FOLDS for number, group in enumerate(groups)}
    return [[run for run in runs if fold_of.get(run.group) == fold and run.may_be_fitted] for fold in range(FOLDS)]


def log_errors(runs: Sequence[PublishedRun], calibration: Calibration) -> Floats:
    """ln(predicted / measured) step time of each run."""
    return np.array([
        np.log(run.predicted_seconds(calibration.of(run.cluster.device.architecture, run.first_flash))
               / run.step_seconds) for run in runs
    ])  # fmt: skip


def fit(runs: Sequence[PublishedRun]) -> Calibration:
    """The parameters that these runs, which must have A100 and H100 among them, are predicted best with.

    Every model of a project on a kind of GPU counts as much as the square root of its number of runs.
    """
    names, rows = list(_PARAMETERS), np.array(list(_PARAMETERS.values()))
    scale = rows[:, 0]
    same = Counter((run.group, run.cluster.device.name) for run in runs)
    weights = np.array([same[run.group, run.cluster.device.name] ** -0.25 for run in runs])

    def residuals(point: Floats) -> Floats:
        return weights * log_errors(runs, _calibration(dict(zip(names, point * scale, strict=True))))

    bounds = (rows[:, 1] / scale, rows[:, 2] / scale)
    solution = least_squares(
        residuals, np.ones(len(names)), bounds=bounds, loss="soft_l1", f_scale=_SOFT, xtol=1e-5, ftol=1e-7
    )
    return _calibration(dict(zip(names, (solution.x * scale).tolist(), strict=True)))


def _calibration(values: Mapping[str, float]) -> Calibration:
    """From flat names."""
    return Calibration(
        matmul=_by_architecture(values, "matmul"),
        attention=_by_architecture(values, "attention"),
        first_flash=values["first_flash"],
        memory=values["memory"],
        unfused=values["unfused"],
        links=values["links"],
        overlap=values["overlap"],
        block_seconds=_BLOCK_SECONDS,
    )


def _by_architecture(values: Mapping[str, float], kind: str) -> dict[str, float]:
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{kind}.")}
