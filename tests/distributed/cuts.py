"""Runs that are cut in different ways: ranks, ZeRO stage, precision, micro-batches; and what their checkpoints hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagpt.config.schema import RunConfig
from megagpt.training.universal import Parameter, read_universal
from tests.distributed.jobs import tiny_config

CUT, STEPS = 2, 4  # the checkpoint that is resumed, and the whole run
States = dict[str, dict[str, torch.Tensor]]  # "fp32" and the optimizer's tensors by parameter


@dataclass(frozen=True)
class Setup:
    """How a run is cut."""

    ranks: int
    zero_stage: int
    precision: str = "fp32"
    micro_batch_size: int | None = None
    offload: bool = False
    option: tuple[str, Any] | None = None
    """One of DeepSpeed's own that changes where parameters lie."""

    def __str__(self) -> str:
        return f"{self.ranks}x-zero{self.zero_stage}-{self.precision}{'-offload' * self.offload}"


def config_of(setup: Setup, corpus: Path, run_dir: Path, tied: bool = True, **checkpoint: Any) -> RunConfig:
    """No size divides well: 97 x 44 and the biases of 44 need padding on two, three and four ranks."""
    config = tiny_config(
        corpus,
        run_dir,
        model={"num_layers": 1, "hidden_size": 44, "max_seq_len": 16, "tie_embeddings": tied},
        schedule={"name": "constant", "warmup_steps": 2},
        train={
            "steps": STEPS,
            "global_batch_size": 12,
            "micro_batch_size": setup.micro_batch_size,
            "precision": setup.precision,
        },
        parallel={"zero_stage": setup.zero_stage, "offload_optimizer": setup.offload},
        checkpoint={"every": CUT, "keep": 9, "allow_changes": ["precision"]} | checkpoint,
        evaluation={"every": CUT, "batches": 1},
    )
    return config.model_copy(update={"deepspeed": {"zero_optimization": dict([setup.option] if setup.option else [])}})


def contents(form: Path) -> States:
    """Everything in a universal form, by parameter, read into memory."""
    names = [Path(name).name.removesuffix(".safetensors") for name in read_universal(form).files]
    return {
        name: {key: torch.as_tensor(value).clone() for key, value in Parameter(form, name).state().items()}
        for name in names
    }


def identical(one: States, other: States) -> bool:
    """Whether both have the same parameters and states, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(torch.equal(one[name][key], other[name][key]) for key in one[name])
        for name in one
    )
