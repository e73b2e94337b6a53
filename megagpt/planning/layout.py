"""How a run is laid out over GPUs: all that memory and time depend on, besides the model and the device.

Runs of this project have the defaults from `tensor` on; published figures that the planner is compared with have
others.
"""

from dataclasses import dataclass
from typing import Literal

Checkpointing = Literal["none", "selective", "full"]
"""What backward computes anew: nothing, attention's scores, or blocks (train.activation_checkpointing)."""


@dataclass(frozen=True)
class Layout:
    """One way to run one model on a number of GPUs."""

    gpus: int
    """All of them."""
    gpus_per_node: int
    micro_batch: int
    """Sequences of one forward pass of one replica."""
    global_batch: int
    """Sequences a step, of all replicas."""
    seq_len: int
    """Tokens of a sequence."""
    zero_stage: int
    """0 to 3; fully sharded data parallelism is 3."""
    shard_gpus: int | None = None
    """Ranks that share one copy of what ZeRO shards; None: all data-parallel ranks."""
    checkpointing: Checkpointing = "none"
    checkpointing_every: int = 1
    """With "full", of so many consecutive blocks the first is computed anew."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    precision: Literal["bf16", "fp16", "fp32", "fp8"] = "bf16"
    """Of the matrix products."""
    compile: bool = True
    tensor: int = 1
    """GPUs that split each layer."""
    pipeline: int = 1
    """GPUs that split the layers."""
    context: int = 1
    """GPUs that split each sequence."""
    virtual_pipeline: int = 1
    """Parts of each pipeline stage that take turns (interleaved schedule), which shortens the bubble."""
    flash_attention: bool = True
    """Whether attention's scores stay on the chip (Dao et al. 2022); else they are written to memory and read."""
    reduce_bytes: int = 4
    """Bytes of a gradient's element as it is reduced; this project reduces in fp32."""

    @property
    def data_parallel(self) -> int:
        """Number of replicas."""
        return self.gpus // (self.tensor * self.pipeline * self.context)

    def checkpointed_blocks(self, blocks: int) -> int:
        """How many of the first `blocks` ones backward computes anew."""
        return -(-blocks // self.checkpointing_every) if self.checkpointing == "full" else 0

    @property
    def micro_steps(self) -> int:
        """Forward passes of a replica in a step (gradient accumulation)."""
        return self.global_batch // (self.data_parallel * self.micro_batch)
