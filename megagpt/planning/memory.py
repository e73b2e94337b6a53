"""Memory of a GPU by part, and at its peak: which micro-batch fits.

Weights, gradients and optimizer state are exact (megagpt.planning.states), what forward keeps for backward is what
autograd saves (megagpt.planning.activations). Buckets, gathered weights and momentary tensors follow DeepSpeed's source
and are upper bounds. Not all parts exist at once: the peak is the largest of five moments of a step.
"""

from dataclasses import dataclass

from megagpt.config.schema import ModelConfig
from megagpt.planning.activations import Activations, activations, weight_copies
from megagpt.planning.layout import Layout
from megagpt.planning.settings import Settings
from megagpt.planning.states import (
    States,
    element_bytes,
    element_count,
    large_parameters,
    optimizer_groups,
    states,
)

OUTSIDE_ALLOCATOR_BYTES = int(1.5 * 2**30)
"""CUDA's context, kernels, NCCL's buffers, cuBLAS' workspaces: an assumption, on the safe side."""
FRAGMENTATION = 0.05
"""Of the peak, lost between torch's blocks: an assumption."""
_ALLREDUCE_ELEMENTS = 500_000_000  # of ZeRO 0's reduction (DeepSpeed: MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class Buckets:
    """Bytes of what DeepSpeed reduces gradients with."""

    kept: int
    """During backward."""
    moment: int
    """While one bucket is reduced."""
    share: float
    """Of all gradients that are in the first one."""
    always: bool
    """Whether they stay outside backward, too."""


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of one GPU, each part at its own largest; host memory a GPU apart."""

    weights: int
    """In the format of forward and backward, with their 16-bit copies at ZeRO stage 0."""
    gradients: int
    optimizer: int
    """fp32 master weights and moments."""
    attention: int
    feedforward: int
    norms: int
    embedding: int
    checkpoints: int
    """Inputs of the blocks that are computed anew; the layers' parts are then those of the others, and of the last."""
    loss: int
    """Gradients that the loss computes in forward, logits of a chunk of tokens, and what comes between."""
    gathered: int
    """Weights that ZeRO-3 has gathered."""
    buckets: int
    """Gradients on their way between ranks."""
    backward: int
    """Gradients within a block."""
    peak: int
    """The largest sum of parts that exist at once."""
    moment: str
    """Of a step, where that is."""
    margin: int
    """For what torch does not count, and for what it loses between blocks."""
    host: int
    """Memory of the host for each GPU."""

    @property
    def total(self) -> int:
        """What the GPU has to have."""
        return self.peak + self.margin

    @property
    def activations(self) -> int:
        """Of all layers, without the loss."""
        return self.attention + self.feedforward + self.norms + self.embedding + self.checkpoints

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by name, in the order of the fields."""
        return {name: getattr(self, name) for name in PARTS}


PARTS = (
    "weights", "gradients", "optimizer", "attention", "feedforward", "norms", "embedding", "checkpoints", "loss",
    "gathered", "buckets", "backward",
)  # fmt: skip


def memory(model: ModelConfig, layout: Layout, settings: Settings | None = None) -> MemoryParts:
    """What a GPU needs to train `model` under `layout`; settings: those of a run that sets none by default.

    Raises ValueError for tensor, pipeline or context parallelism, which runs of this project do not have.
    """
    if (layout.tensor, layout.pipeline, layout.context) != (1, 1, 1):
        raise ValueError("memory is known for data parallelism and ZeRO only")
    settings = settings or Settings()
    state, kept = states(model, layout, settings), activations(model, layout)
    buckets, gathered = _buckets(model, layout, settings), _gathered(model, layout, settings)
    copies = weight_copies(model, layout)
    moment, peak = max(_moments(state, kept, buckets, gathered, copies).items(), key=lambda item: item[1])
    return MemoryParts(
        weights=state.weights + copies,
        gradients=state.gradients + state.backward,
        optimizer=state.optimizer,
        attention=kept.attention,
        feedforward=kept.feedforward,
        norms=kept.norms,
        embedding=kept.embedding,
        checkpoints=kept.checkpoints,
        loss=kept.loss + max(kept.forward_moment, kept.loss_backward_moment),
        gathered=gathered,
        buckets=buckets.kept + buckets.moment,
        backward=kept.block_backward_moment,
        peak=peak,
        moment=moment,
        margin=OUTSIDE_ALLOCATOR_BYTES + int(FRAGMENTATION * peak),
        host=state.host,
    )


def _moments(state: States, kept: Activations, buckets: Buckets, gathered: int, copies: int) -> dict[str, int]:
    """Bytes at the moments of the last micro-batch of a step where the peak can be."""
    always = state.weights + state.optimizer + (buckets.kept if buckets.always else 0)
    in_backward = 0 if buckets.always else buckets.kept
    before = always + state.gradients_before + copies + gathered
    first_block = before + in_backward + kept.saved - kept.loss + kept.recomputed_last + kept.block_backward_moment
    all_gradients = always + in_backward + copies + gathered + state.gradients + state.backward
    last_block = all_gradients + kept.embedding + kept.recomputed + kept.block_backward_moment
    return {
        "end of forward": before + kept.saved + kept.forward_moment,
        "loss in backward": before + kept.saved + kept.loss_backward_moment,
        "last block in backward": first_block,
        "first bucket": round((1 - buckets.share) * first_block + buckets.share * last_block) + buckets.moment,
        "first block in backward": last_block + buckets.moment,
        "optimizer": always + state.gradients + state.step,
    }


def _buckets(model: ModelConfig, layout: Layout, settings: Settings) -> Buckets:
    elements, size = element_count(model, settings.optimizer), element_bytes(layout)
    if layout.zero_stage == 1 and layout.precision == "bf16" and not layout.offload_optimizer:
        return Buckets(0, 0, share=1.0, always=False)  # they are end to end already, see training.flat_gradients
    if layout.zero_stage == 0:
        # Gradients are put end to end for an all-reduce after backward.
        return Buckets(0, 4 * min(elements, _ALLREDUCE_ELEMENTS), share=1.0, always=False)
    filled = min(elements, settings.reduce_bucket_size)
    share = filled / elements
    if layout.zero_stage == 3:
        return Buckets(4 * settings.reduce_bucket_size, 4 * filled, share, always=True)
    # ZeRO-1 puts its fp32 sums in, ZeRO-2 the gradients as they come; they are reduced in fp32.
    in_bucket = 4 if layout.zero_stage == 1 else size
    converted = 4 if in_bucket < 4 else 0
    kept = (2 if settings.overlap_comm else 1) * in_bucket * settings.reduce_bucket_size
    return Buckets(kept, (in_bucket + converted) * filled, share, always=False)


def _gathered(model: ModelConfig, layout: Layout, settings: Settings) -> int:
    """ZeRO-3's weights as far as they may live, and those that an all-gather is about to bring."""
    if layout.zero_stage < 3 or layout.data_parallel == 1:
        return 0
    sharded = sum(large_parameters(optimizer_groups(model, settings.optimizer), settings))
    live = min(sharded, max(settings.max_live_parameters, settings.max_reuse_distance))
    return element_bytes(layout) * (live + min(sharded, settings.prefetch_bucket_size))
