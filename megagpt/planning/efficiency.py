"""How much of a data sheet's rates training reaches: the few numbers of the time model that no data sheet gives.

They are fitted to published throughput (megagpt.planning.published) and kept in data/efficiency.json with how they were
obtained; megagpt.planning.measure finds those of the machine that it runs on.
"""

import json
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

_FILE = "data/efficiency.json"


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
    link: float
    """Share of the bandwidth between GPUs of a node that collectives reach."""
    network: float
    """Share of the network's bandwidth that collectives reach."""
    overlap: float
    """Share of the data-parallel traffic that may hide behind computation."""
    block_seconds: float
    """Of each block in forward or backward, beside its work: launching and filling kernels."""


def fitted(architecture: str) -> Efficiency:
    """The parameters that published throughput gives for a generation of devices; of the nearest if it has none."""
    stored = _stored()
    common = {field.name: stored["parameters"][field.name] for field in fields(Efficiency)
              if field.name in stored["parameters"]}  # fmt: skip
    own = stored["by_architecture"]
    return Efficiency(**common, **own[architecture if architecture in own else stored["otherwise"][architecture]])


def _stored() -> dict[str, Any]:
    text = resources.files("megagpt.planning").joinpath(_FILE).read_text(encoding="utf-8")
    stored: dict[str, Any] = json.loads(text)
    return stored
