"""Seconds of a training step by part, from what a GPU has to do and how fast its kind does it.

A part's time is its operations or bytes over a rate of the data sheet, times the share of that rate which training
reaches (`Efficiency`). A matrix product takes its operations and its memory traffic one after the other, so that thin
ones are slow. Parts add up; data-parallel communication counts as far as computation does not hide it. How well
this predicts published runs is in docs/planning_accuracy.md.
"""

from dataclasses import dataclass, fields

from megagpt.config.schema import ModelConfig
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token
from megagpt.planning import work
from megagpt.planning.communication import exposed, ring_bandwidth, ring_seconds
from megagpt.planning.efficiency import Efficiency, fitted
from megagpt.planning.layout import Layout
from megagpt.planning.work import Product
from megagpt.scaling.devices import Cluster, Device

# Passes over attention's scores where they are in memory: written, scaled with softmax, read by the values' product;
# in backward both products and the softmax again.
_SCORE_PASSES_FORWARD, _SCORE_PASSES_BACKWARD = 5, 7
_BACKWARD_TRAFFIC = 2  # element-wise backward reads the saved input and the gradient, and writes one
# Of a logit, by whether the passes are fused: written and read as bf16, read and written as the softmax's gradient,
# read by two products; else also copied to fp32 and back, with each pass on its own.
_LOGIT_BYTES = {True: 16, False: 32}
_ADAM_BYTES = 34  # fp32 weight and two moments read and written, gradient read and zeroed, bf16 weight written
_HOST_ADAM_BYTES_PER_SECOND = 20e9  # a GPU's share of a host's memory bandwidth (8 GPUs, 2 sockets): an assumption


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part, and what follows from their sum."""

    matmul: float
    """Matrix products of the blocks, forward and backward."""
    attention: float
    """Attention's scores and values."""
    elementwise: float
    """Norms, residual sums, activations; starting kernels."""
    loss: float
    """Output head and cross-entropy over the vocabulary."""
    recompute: float
    """Forward that activation checkpointing repeats."""
    optimizer: float
    """AdamW over the weights that the GPU owns, and accumulating gradients."""
    gradient_reduction: float
    """All-reduce or reduce-scatter that computation does not hide."""
    weight_gather: float
    """ZeRO's all-gathers that computation does not hide."""
    tensor_parallel: float
    """Collectives inside layers split over GPUs."""
    pipeline: float
    """Bubble: GPUs that wait for the first or after the last micro-batch."""
    offload: float
    """Traffic to the host's memory and AdamW there."""
    tokens_per_step: int
    gpus: int
    model_flops: int
    """Of a step, all GPUs: every score counted as if unmasked, no recomputation (megagpt.model.counts)."""
    peak_flops: float | None
    """Of one GPU."""

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by name of the part, in the order of the fields."""
        names = [field.name for field in fields(self)]
        return {name: getattr(self, name) for name in names[: names.index("tokens_per_step")]}

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput of one GPU."""
        return self.tokens_per_step / self.total / self.gpus

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None where the device has no known peak."""
        return self.model_flops / (self.total * self.gpus * self.peak_flops) if self.peak_flops else None


def step_time(model: ModelConfig, layout: Layout, cluster: Cluster, efficiency: Efficiency | None = None) -> StepTime:
    """Predict a step. efficiency: of the device; None: what published runs on devices of its generation give.

    Raises UsageError if the device does not know the layout's precision.
    """
    return _Predictor(model, layout, cluster, efficiency or fitted(cluster.device.architecture)).step()


class _Predictor:
    """The parts of one step on one GPU of the busiest stage."""

    def __init__(self, model: ModelConfig, layout: Layout, cluster: Cluster, efficiency: Efficiency) -> None:
        self._model, self._layout, self._cluster, self._efficiency = model, layout, cluster, efficiency
        self._peak = _peak(cluster.device, layout.precision)
        self._half_peak = _peak(cluster.device, "bf16" if layout.precision == "fp8" else layout.precision)
        self._bytes = work.WEIGHT_BYTES[layout.precision]
        self._memory = efficiency.memory * cluster.device.memory_bandwidth
        self._layers = work.stage_layers(model, layout)
        self._parameters = work.gpu_parameters(model, layout)

    def step(self) -> StepTime:
        """All of them."""
        layout, steps = self._layout, self._layout.micro_steps
        matmul, attention, elementwise = (self._layers * part for part in self._block_forward())
        head = self._loss()
        recompute = self._recompute(matmul, attention, elementwise)
        tensor = self._tensor_parallel()
        backward = (1 + _BACKWARD_TRAFFIC) * elementwise
        compute = 3 * matmul + 3 * attention + backward + recompute + tensor
        bubble = (layout.pipeline - 1) / layout.virtual_pipeline * (compute + head / layout.pipeline)
        reduction, gather = self._data_parallel(compute + head)
        return StepTime(
            matmul=steps * 3 * matmul,
            attention=steps * 3 * attention,
            elementwise=steps * backward,
            loss=steps * head,
            recompute=steps * recompute,
            optimizer=self._optimizer(),
            gradient_reduction=reduction,
            weight_gather=gather,
            tensor_parallel=steps * tensor,
            pipeline=bubble,
            offload=self._offload(),
            tokens_per_step=layout.global_batch * layout.seq_len,
            gpus=layout.gpus,
            model_flops=flops_per_token(self._model, layout.seq_len) * layout.global_batch * layout.seq_len,
            peak_flops=self._cluster.device.peak_flops(layout.precision),
        )

    def _block_forward(self) -> tuple[float, float, float]:
        """Seconds of one block's products, attention and element-wise work."""
        products = sum(self._product(product, self._peak) for product in work.block_products(self._model, self._layout))
        flash = self._layout.flash_attention
        share = self._efficiency.attention if flash else self._efficiency.matmul
        attention = work.attention_flops(self._model, self._layout) / (share * self._half_peak)
        # backward's passes over stored scores are a little more than twice forward's
        passes = (_SCORE_PASSES_FORWARD + _SCORE_PASSES_BACKWARD) / 3
        attention += passes * work.score_elements(self._model, self._layout) * self._bytes / self._memory
        traffic = work.block_elements(self._model, self._layout) * self._bytes
        fused = 1.0 if self._layout.compile else self._efficiency.unfused
        return products, attention, fused * traffic / self._memory + self._efficiency.block_seconds

    def _product(self, product: Product, peak: float) -> float:
        return product.flops / (self._efficiency.matmul * peak) + product.elements * self._bytes / self._memory

    def _loss(self) -> float:
        """The head's three products and the passes over the logits, in one micro-step of the last stage.

        Stages are taken to be balanced: with a pipeline the last one has fewer blocks in turn.
        """
        products = 3 * self._product(work.head_product(self._model, self._layout), self._half_peak)
        passes = work.logit_elements(self._model, self._layout) * _LOGIT_BYTES[self._layout.compile] / self._memory
        return (products + passes) / self._layout.pipeline

    def _recompute(self, matmul: float, attention: float, elementwise: float) -> float:
        if self._layout.checkpointing == "full":
            return self._recomputed_share * (matmul + attention + elementwise)
        if self._layout.checkpointing == "selective" and not self._layout.flash_attention:
            return attention
        return 0.0

    @property
    def _recomputed_share(self) -> float:
        """Of the model's blocks."""
        return self._layout.checkpointed_blocks(self._model.num_layers) / self._model.num_layers

    def _tensor_parallel(self) -> float:
        """Two all-reduces of the hidden states in each block's forward, two in backward, two in what is recomputed."""
        layout = self._layout
        bandwidth = ring_bandwidth(self._cluster, self._efficiency, layout.tensor, layout.gpus_per_node)
        nbytes = work.tokens(layout) * self._model.hidden_size * self._bytes
        passes = 2 + self._recomputed_share
        return self._layers * passes * 2 * 2 * ring_seconds(nbytes, layout.tensor, bandwidth)

    def _data_parallel(self, micro_step: float) -> tuple[float, float]:
        """Exposed seconds a step of reducing gradients and of gathering weights.

        ZeRO 0 and 1 reduce once a step, behind the last micro-step's backward; ZeRO 2 and 3 in every micro-step.
        ZeRO 1 and 2 gather the weights after the optimizer, when nothing hides it; ZeRO 3 in every forward and
        backward. With groups that hold a copy each, a group's shards are reduced among the groups after that.
        """
        layout, overlap, backward = self._layout, self._efficiency.overlap, 2 / 3 * micro_step
        replicas = layout.data_parallel * layout.context
        parameters, shards = self._parameters, self._shards
        if layout.zero_stage == 0:
            reduction = 2 * self._ring(parameters * layout.reduce_bytes, replicas)
            return exposed(reduction, backward, overlap), 0.0
        weights = self._ring(parameters * self._bytes, shards)
        reduction = self._ring(parameters * layout.reduce_bytes, shards)
        reduction += 2 * self._ring(parameters / shards * layout.reduce_bytes, replicas // shards, spread=True)
        if layout.zero_stage == 1:
            return exposed(reduction, backward, overlap), weights
        if layout.zero_stage == 2:
            return layout.micro_steps * exposed(reduction, backward, overlap), weights
        seconds = layout.micro_steps * exposed(2 * weights + reduction, micro_step, overlap)
        share = reduction / (2 * weights + reduction) if seconds else 0.0
        return share * seconds, (1 - share) * seconds

    @property
    def _shards(self) -> int:
        """Ranks that share one copy of what ZeRO shards."""
        replicas = self._layout.data_parallel * self._layout.context
        return min(self._layout.shard_gpus or replicas, replicas)

    def _ring(self, nbytes: float, gpus: int, spread: bool = False) -> float:
        """Seconds of a reduce-scatter or all-gather among data-parallel ranks; spread: one of each node or shard."""
        layout = self._layout
        of_a_node = 1 if spread else max(1, layout.gpus_per_node // layout.tensor)
        return ring_seconds(nbytes, gpus, ring_bandwidth(self._cluster, self._efficiency, gpus, of_a_node))

    def _optimizer(self) -> float:
        layout = self._layout
        accumulated = self._parameters * layout.micro_steps * (self._bytes + 2 * layout.reduce_bytes) / self._memory
        if layout.offload_optimizer:
            return accumulated
        return accumulated + self._owned * _ADAM_BYTES / self._memory

    @property
    def _owned(self) -> float:
        """Parameters that this GPU updates."""
        return self._parameters / self._shards if self._layout.zero_stage else self._parameters

    def _offload(self) -> float:
        """Gradients to the host, AdamW there, weights back; with offloaded weights those too, in each micro-step."""
        layout = self._layout
        owned = self._owned
        host = self._cluster.device.host_bandwidth
        seconds = 0.0
        if layout.offload_optimizer:
            seconds += owned * (layout.reduce_bytes + self._bytes) / host
            seconds += owned * _ADAM_BYTES / _HOST_ADAM_BYTES_PER_SECOND
        if layout.offload_parameters:
            seconds += 2 * layout.micro_steps * owned * self._bytes / host
        return seconds


def _peak(device: Device, precision: str) -> float:
    peak = device.peak_flops(precision)
    if peak is None:
        known = ", ".join(name for name in ("fp8", "bf16", "fp16", "fp32") if device.peak_flops(name))
        raise UsageError(f"{device.name} computes no {precision} products; choose {known}")
    return peak
