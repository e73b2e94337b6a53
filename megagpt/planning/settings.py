"""What memory depends on besides model and layout: the optimizer, and the sizes of DeepSpeed's buffers.

The defaults are those of deepspeed 0.19 (deepspeed/runtime/zero/config.py) and of megagpt.training.engine on GPUs;
`of_run` reads what a configuration's raw section `deepspeed` puts in their place.
"""

from dataclasses import dataclass, field, fields

from megagpt.config.schema import OptimizerConfig, RunConfig


@dataclass(frozen=True)
class Settings:
    """Sizes in elements, as DeepSpeed counts them."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    reduce_bucket_size: int = 500_000_000
    """Of a bucket that gradients are reduced in."""
    overlap_comm: bool = True
    """Whether ZeRO 1 and 2 reduce one bucket while the next one fills, which takes two."""
    sub_group_size: int = 1_000_000_000
    """Of the part of a rank's shard that ZeRO-3 steps at once."""
    prefetch_bucket_size: int = 50_000_000
    """Of the weights that ZeRO-3 gathers ahead of their use."""
    param_persistence_threshold: int = 100_000
    """Up to which size ZeRO-3 leaves a parameter whole on every rank."""
    max_live_parameters: int = 1_000_000_000
    """Of the weights that ZeRO-3 gathers before they are needed."""
    max_reuse_distance: int = 1_000_000_000
    """Of the weights between two uses of one that ZeRO-3 does not let go in between."""
    immediate_grad_update: bool = False
    """Whether bf16 ZeRO-1 adds each gradient to the fp32 sum as it comes, so that no 16-bit one stays."""

    @classmethod
    def of_run(cls, config: RunConfig) -> "Settings":
        """Those of a run on GPUs."""
        zero, bf16 = (_section(config, name) for name in ("zero_optimization", "bf16"))
        raw = {**zero, **{key.removeprefix("stage3_"): value for key, value in zero.items()}, **bf16}
        names = {known.name for known in fields(cls)} - {"optimizer"}
        return cls(config.optimizer, **{name: value for name, value in raw.items() if name in names})  # type: ignore[arg-type]


def _section(config: RunConfig, name: str) -> dict[str, object]:
    found = config.deepspeed.get(name)
    return dict(found) if isinstance(found, dict) else {}
