"""A run of a configuration on a number of GPUs before it is started: memory, time, cost, checkpoints, failures."""

from dataclasses import dataclass, replace

from megagpt.config.batch import check_batches, nearest_divisors
from megagpt.config.schema import ModelConfig, RunConfig
from megagpt.model.counts import flops_per_token, parameter_count
from megagpt.planning.checkpoints import CheckpointCost, checkpoint_bytes, checkpoint_cost
from megagpt.planning.efficiency import Efficiency
from megagpt.planning.failures import Reliability, reliability
from megagpt.planning.layout import Layout
from megagpt.planning.memory import MemoryParts, memory
from megagpt.planning.settings import Settings
from megagpt.planning.time import StepTime, step_time
from megagpt.scaling.devices import Cluster


@dataclass(frozen=True)
class Limits:
    """Bytes that a GPU can have."""

    device: float
    """Its own."""
    host: float
    """Its share of its node's memory."""

    def allow(self, parts: MemoryParts) -> bool:
        """Whether it fits."""
        return parts.total <= self.device and parts.host <= self.host


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    cluster: Cluster
    limits: Limits
    efficiency: Efficiency | None = None
    """Of its GPUs, if it was measured; None: what published runs give."""

    def step_time(self, model: ModelConfig, layout: Layout) -> StepTime:
        """As megagpt.planning.time."""
        return step_time(model, layout, self.cluster, self.efficiency)


@dataclass(frozen=True)
class Circumstances:
    """What a run is planned with, besides its configuration and its GPUs."""

    tokens: int
    """To train on."""
    price: float | None
    """Of one GPU for an hour, in any currency."""
    node_mtbf_seconds: float
    """Mean time between failures of one node."""
    restart_seconds: float
    """From a failure until training goes on."""
    storage_bytes_per_second: float
    """That all nodes together can write."""


@dataclass(frozen=True)
class Plan:
    """The run, and what to expect of it."""

    config: RunConfig
    machine: Machine
    layout: Layout
    circumstances: Circumstances
    memory: MemoryParts
    largest_micro_batch: int
    """That fits, in sequences; 0: none."""
    time: StepTime
    checkpoint: CheckpointCost
    reliability: Reliability

    @property
    def fits(self) -> bool:
        """Whether the GPU's and the host's memory are large enough."""
        return self.machine.limits.allow(self.memory)

    @property
    def parameters(self) -> int:
        """Trainable ones."""
        return parameter_count(self.config.model)

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, every score counted."""
        return flops_per_token(self.config.model, self.layout.seq_len)

    @property
    def flops_per_token_without_attention(self) -> int:
        """Forward and backward, without scores and values of attention: 6 a weight of a matrix."""
        model, seq_len = self.config.model, self.layout.seq_len
        return self.flops_per_token - model.num_layers * 12 * seq_len * model.hidden_size

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return -(-self.circumstances.tokens // self.time.tokens_per_step)

    @property
    def training_seconds(self) -> float:
        """Of all steps."""
        return self.steps * self.time.total

    @property
    def seconds(self) -> float:
        """Of the whole run, with checkpoints and failures."""
        goodput = self.reliability.goodput
        return self.training_seconds / goodput if goodput else float("inf")

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        price = self.circumstances.price
        return None if price is None else self.seconds / 3600 * self.layout.gpus * price


def run_layout(config: RunConfig, gpus: int, gpus_per_node: int) -> Layout:
    """How `config` is laid out on `gpus`. Raises ConfigError for a batch that they cannot divide."""
    micro_batch, _ = check_batches(config.train.batches, config.train.micro_batch_size, gpus)
    zero = config.deepspeed.get("zero_optimization")
    group = zero.get("zero_hpz_partition_size", 1) if isinstance(zero, dict) else 1
    return Layout(
        gpus=gpus,
        gpus_per_node=min(gpus, gpus_per_node),
        micro_batch=micro_batch,
        global_batch=config.train.global_batch_size,
        seq_len=config.seq_len,
        zero_stage=config.parallel.zero_stage,
        shard_gpus=group if isinstance(group, int) and group > 1 and config.parallel.zero_stage == 3 else None,
        checkpointing="full" if config.train.activation_checkpointing else "none",
        checkpointing_every=config.train.activation_checkpointing_every,
        offload_optimizer=config.parallel.offload_optimizer,
        offload_parameters=config.parallel.offload_parameters,
        precision=config.train.precision,
        compile=config.train.compile,
    )


def make_plan(config: RunConfig, layout: Layout, machine: Machine, circumstances: Circumstances) -> Plan:
    """Everything about one layout, whether it fits or not. Raises UsageError for a precision the device lacks."""
    settings = Settings.of_run(config)
    cost = checkpoint_cost(
        checkpoint_bytes(config.model, layout, settings),
        layout,
        machine.cluster.device.host_bandwidth,
        circumstances.storage_bytes_per_second,
        config.checkpoint.asynchronous,
    )
    nodes = -(-layout.gpus // layout.gpus_per_node)
    return Plan(
        config=config,
        machine=machine,
        layout=layout,
        circumstances=circumstances,
        memory=memory(config.model, layout, settings),
        largest_micro_batch=largest_micro_batch(config, layout, machine.limits),
        time=machine.step_time(config.model, layout),
        checkpoint=cost,
        reliability=reliability(
            nodes,
            circumstances.node_mtbf_seconds,
            cost.stall_seconds,
            cost.write_seconds,
            circumstances.restart_seconds,
        ),
    )


def largest_micro_batch(config: RunConfig, layout: Layout, limits: Limits) -> int:
    """The most sequences at once with which `layout` fits, whether they divide the batch or not; 0: not even one."""
    settings = Settings.of_run(config)

    def fits(micro_batch: int) -> bool:
        # With more than one micro-batch a step, so that the sums of gradients are there.
        changed = replace(layout, micro_batch=micro_batch, global_batch=2 * micro_batch * layout.data_parallel)
        return limits.allow(memory(config.model, changed, settings))

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def usable_micro_batch(plan: Plan) -> int | None:
    """The largest that fits and divides a rank's share of the batch; None if there is none."""
    share = plan.layout.global_batch // plan.layout.data_parallel
    fitting = [
        n for n in nearest_divisors(share, plan.largest_micro_batch, count=share) if n <= plan.largest_micro_batch
    ]
    return max(fitting, default=None)
