"""How much of a data sheet's rates training reaches: the few numbers of the time model that no data sheet gives.

They are fitted to published throughput (megagpt.planning.calibration) and kept in data/efficiency.json with how they
were obtained; megagpt.planning.measure finds those of the machine that it runs on.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

FILE = "data/efficiency.json"
NEAREST = {"volta": "ampere", "ada": "ampere", "blackwell": "hopper"}
"""Generations without published runs to fit -> the one whose shares they take."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of peak rates, and what else a step costs."""

    matmul: float
    """Share of the peak that a large matrix product reaches."""
    attention: float
    """Share of the peak that flash attention reaches, in the operations that it needs (causal)."""
    memory: float
    """Share of the memory's bandwidth that fused element-wise passes reach."""
    unfused: float
    """How many times the traffic of a fused block a block has that is not compiled."""
    links: float
    """Share of the bandwidth of links and network that collectives reach."""
    overlap: float
    """Share of the data-parallel traffic that may hide behind computation."""
    block_seconds: float
    """Of each block's forward, and twice that of its backward, beside its work: starting kernels."""


@dataclass(frozen=True)
class Calibration:
    """What a fit to many runs gives."""

    matmul: Mapping[str, float]
    """By generation of devices."""
    attention: Mapping[str, float]
    """By generation of devices."""
    first_flash: float
    """Speed of the first FlashAttention (2022) relative to later ones."""
    memory: float
    unfused: float
    links: float
    overlap: float
    block_seconds: float

    def of(self, architecture: str, first_flash: bool = False) -> Efficiency:
        """The parameters of a generation of devices, or of the nearest one that was fitted."""
        known = architecture if architecture in self.matmul else NEAREST[architecture]
        return Efficiency(
            matmul=self.matmul[known],
            attention=self.attention[known] * (self.first_flash if first_flash else 1.0),
            memory=self.memory,
            unfused=self.unfused,
            links=self.links,
            overlap=self.overlap,
            block_seconds=self.block_seconds,
        )


def stored_calibration() -> Calibration:
    """The fit that comes with the project."""
    text = resources.files("megagpt.planning").joinpath(FILE).read_text(encoding="utf-8")
    stored: dict[str, Any] = json.loads(text)
    return Calibration(**stored["parameters"])


def stored_form(calibration: Calibration, runs: int) -> str:
    """The text of FILE for a fit to so many runs, with four digits of each number."""
    digits = json.loads(json.dumps(asdict(calibration)), parse_float=lambda text: float(f"{float(text):.4g}"))
    how = (
        "fitted by megagpt.planning.calibration to the data-parallel runs of data/published_throughput.csv; "
        "`python -m tools.plan --validate FOLDER` writes this file anew into FOLDER; block_seconds is an assumption"
    )
    return json.dumps({"how": how, "runs": runs, "parameters": digits}, indent=1) + "\n"


def fitted(architecture: str) -> Efficiency:
    """The parameters that published throughput gives for a generation of devices."""
    return stored_calibration().of(architecture)
