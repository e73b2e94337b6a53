"""The typed configuration of a run: one class a section, a one-line docstring with its unit under every field.

A rule between fields is a validator of the later field and reads the earlier ones from `info.data`, where pydantic puts
the valid ones only: so every rule whose fields are valid is checked, and all problems are reported at once.
The files are YAML; `megagpt.config.load_config` reads them and applies `section.key=value`.
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megagpt.config.batch import BatchSizes, join_choices, nearest_divisors


class Section(BaseModel):
    """Common behaviour: no unknown keys, no type coercion ("yes" is no boolean), docstrings are field descriptions."""

    model_config = ConfigDict(
        allow_inf_nan=False,
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


class ModelConfig(Section):
    """The network: a decoder-only transformer covering the GPT-2 and Llama families."""

    vocab_size: int = Field(50257, gt=0)
    """Number of token ids the embedding and the output head know."""
    vocab_multiple_of: int = Field(1, gt=0)
    """Embedding and head get vocab_size rows rounded up to this (128, say); padding is never read, learned or drawn."""
    num_layers: int = Field(6, gt=0)
    """Number of transformer blocks."""
    hidden_size: int = Field(288, gt=0)
    """Width of the residual stream."""
    num_attention_heads: int = Field(6, gt=0)
    """Number of query heads; must divide hidden_size."""
    num_kv_heads: int | None = Field(None, gt=0)
    """Number of key and value heads (grouped-query attention); must divide num_attention_heads; null: as many."""
    ffn_hidden_size: int | None = Field(None, gt=0)
    """Inner width of the feed-forward block; null: 4 x hidden_size, with swiglu 8/3 x hidden_size rounded up to 64."""
    max_seq_len: int = Field(256, gt=0)
    """Longest sequence in tokens; learned positions have exactly this many rows."""
    position: Literal["learned", "sinusoidal", "rope"] = "learned"
    """Position encoding: a learned table, fixed sines (Vaswani et al. 2017) or rotary embedding (Su et al. 2021)."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies; used with position=rope only."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation before attention, feed-forward and head."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in the normalisation."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    """Feed-forward activation: exact GELU, its tanh form (GPT-2's), or SwiGLU (Shazeer 2020)."""
    bias: bool = True
    """Whether linear layers and LayerNorm have biases."""
    tie_embeddings: bool = True
    """Whether the output head shares the token embedding's weights."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of embeddings, attention weights and residual branches; a share, 0 to 1."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; residual projections get it divided by sqrt(2 x num_layers)."""
    mup_base_width: int | None = Field(None, gt=0)
    """muP (Yang et al. 2022): lr and initializer_range are meant for this hidden_size, and carry over; null: no muP."""

    @field_validator("num_attention_heads")
    @classmethod
    def _check_heads(cls, heads: int, info: ValidationInfo) -> int:
        hidden_size = info.data.get("hidden_size")
        if hidden_size and hidden_size % heads:
            choices = join_choices(nearest_divisors(hidden_size, heads))
            raise ValueError(f"{heads} does not divide hidden_size {hidden_size}; choose {choices}")
        return heads

    @field_validator("num_kv_heads")
    @classmethod
    def _check_kv_heads(cls, kv_heads: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("num_attention_heads")
        if kv_heads and heads and heads % kv_heads:
            choices = join_choices(nearest_divisors(heads, kv_heads))
            raise ValueError(f"{kv_heads} does not divide num_attention_heads {heads}; choose {choices}")
        return kv_heads

    @field_validator("position")
    @classmethod
    def _check_position(cls, position: str, info: ValidationInfo) -> str:
        hidden_size, heads = info.data.get("hidden_size"), info.data.get("num_attention_heads")
        if position == "sinusoidal" and hidden_size and hidden_size % 2:
            raise ValueError(f"sinusoidal needs an even hidden_size, but it is {hidden_size}")
        if position == "rope" and hidden_size and heads and hidden_size // heads % 2:
            raise ValueError(f"rope needs an even head size, but hidden_size / heads is {hidden_size // heads}")
        return position

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the output head: vocab_size, and padding."""
        return -(-self.vocab_size // self.vocab_multiple_of) * self.vocab_multiple_of

    def without_padding(self) -> "ModelConfig":
        """The same model with as many rows as token ids."""
        return self.model_copy(update={"vocab_multiple_of": 1})

    @property
    def mup_width_ratio(self) -> float:
        """How many times wider than muP's base the model is; 1 without muP."""
        return self.hidden_size / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default resolved."""
        return self.num_kv_heads or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Inner width of the feed-forward block, with the default resolved."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // 3 // 64) * 64
        return 4 * self.hidden_size


class DataSource(Section):
    """One token dataset of a blend."""

    path: str
    """Prefix of the dataset's files: data/corpus/train for data/corpus/train.bin and train.idx."""
    weight: float = Field(1.0, gt=0)
    """Share of this dataset in the blend, relative to the sum of all weights."""
    name: str | None = Field(None, min_length=1)
    """What the metrics call it; null: the last parts of its path, as many as tell the datasets apart."""


class DataConfig(Section):
    """The token datasets."""

    train: list[DataSource] = Field(min_length=1)
    """Datasets to train on: a list of {path, weight, name}."""
    validation: list[DataSource] = []
    """Datasets to evaluate on, each on its own; empty: no evaluation."""
    seq_len: int | None = Field(None, gt=0)
    """Tokens a sample; null: model.max_seq_len."""
    document_mask: bool = False
    """Whether attention and positions stop at document boundaries; fastest on GPUs with train.compile."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019) or Muon (Jordan 2024), and gradient clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices and AdamW for the rest (parallel.zero_stage 0 to 2, no offload)."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)  # YAML has lists, no tuples
    """Decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay rate of Muon's momentum; its updates have the size of AdamW's (Liu et al. 2025) and share its lr."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay, multiplied by the learning rate."""
    no_decay: list[Literal["norm", "bias", "embedding"]] = ["norm", "bias"]
    """Kinds of parameters without weight decay."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global L2 norm of the gradient; 0: no clipping."""


class ScheduleConfig(Section):
    """Learning rate by step or token: linear warm-up to optimizer.lr, then the named shape to lr x min_lr_ratio.

    With warmup_tokens or decay_tokens the whole schedule counts tokens, which matters where the batch size changes.
    """

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warm-up; wsd (warm-up, stable, decay) holds the peak and falls linearly at the end of the run."""
    warmup_steps: int = Field(100, ge=0)
    """Steps from 0 to the peak."""
    decay_steps: int | None = Field(None, gt=0)
    """Steps of the fall; null: all steps after warm-up (cosine, linear), the last tenth of train.steps (wsd)."""
    warmup_tokens: int | None = Field(None, ge=0)
    """Tokens from 0 to the peak, instead of warmup_steps."""
    decay_tokens: int | None = Field(None, gt=0)
    """Tokens of the fall, instead of decay_steps; null: as decay_steps, in tokens if warmup_tokens is given."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate divided by the peak."""

    @property
    def in_tokens(self) -> bool:
        """Whether the schedule counts tokens, not steps."""
        return self.warmup_tokens is not None

    @field_validator("decay_tokens")
    @classmethod
    def _check_units(cls, decay_tokens: int | None, info: ValidationInfo) -> int | None:
        if decay_tokens and info.data.get("warmup_tokens") is None:
            raise ValueError("counts tokens, so the warm-up must too: give schedule.warmup_tokens (0 for none)")
        if info.data.get("warmup_tokens") is not None and info.data.get("decay_steps"):
            raise ValueError("schedule.decay_steps and schedule.warmup_tokens do not mix; give decay_tokens")
        return decay_tokens


class TrainConfig(Section):
    """The run: where, how long, how large a step, in which precision."""

    run_dir: str = "runs/default"
    """Folder of the run: configuration, metrics, checkpoints, logs."""
    steps: int = Field(1000, gt=0)
    """Optimizer steps of the whole run, resumes included."""
    tokens: int | None = Field(None, gt=0)
    """Tokens of the whole run, rounded up to whole steps; given, they count instead of train.steps."""
    global_batch_size: int = Field(32, gt=0)
    """Sequences an optimizer step, over all ranks; the same at every world size."""
    rampup_start: int | None = Field(None, gt=0)
    """Sequences of the first step, from which the batch grows to global_batch_size; null: no ramp-up."""
    rampup_increment: int | None = Field(None, gt=0)
    """Sequences that each stage of the ramp-up adds; null: rampup_start."""
    rampup_samples: int | None = Field(None, gt=0)
    """Sequences after which the ramp-up reaches global_batch_size, in stages of equal length; with rampup_start."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences a rank processes at once; null: its whole share of the global batch, without accumulation."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto: cuda if torch sees a GPU, else cpu."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of weights and activations in forward and backward; master weights are always fp32."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of initial weights, sample order and dropout."""
    compile: bool = True
    """Whether to compile the model with torch.compile, see compile_scope."""
    compile_scope: Literal["block", "model"] = "block"
    """What is compiled as one: a block, for all of them, and the loss (at parallel.zero_stage 3 the loss only); or the
    whole model, which takes a minute or more (stages 0 to 2)."""
    attention_kernel: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Which of SDPA's kernels computes attention; auto: torch's choice, on CPUs in bf16 products of strips."""
    activation_checkpointing: bool = False
    """Whether blocks recompute their activations in backward: about a third more compute for much less memory."""
    activation_checkpointing_every: int = Field(1, gt=0)
    """With activation_checkpointing, of so many consecutive blocks the first recomputes; 1: all do."""
    init_from: str | None = Field(None, min_length=1)
    """Run folder, checkpoint or export whose weights a new run starts from; null: random weights."""
    deterministic: bool = False
    """Whether two runs give the same bits; takes torch's deterministic kernels, which are slower on GPUs."""
    profile: str | None = None
    """Steps of which torch's profiler writes a trace for Perfetto to run_dir/profile: "steps 10-12"; null: none."""

    @property
    def batches(self) -> BatchSizes:
        """Sequences of every step."""
        if not self.rampup_start:
            return BatchSizes(self.global_batch_size)
        increment = self.rampup_increment or self.rampup_start
        return BatchSizes(self.global_batch_size, self.rampup_start, increment, self.rampup_samples or 0)

    def total_steps(self, seq_len: int) -> int:
        """Steps of the whole run, from `tokens` if they are given."""
        return self.steps if self.tokens is None else self.batches.steps_for(-(-self.tokens // seq_len))

    @field_validator("profile")
    @classmethod
    def _check_profile(cls, profile: str | None) -> str | None:
        found = re.fullmatch(r"(?:steps )?([0-9]+)(?:-([0-9]+))?", profile or "steps 1")
        if not found or int(found[1]) < 1 or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"{profile!r} names no steps; write 'steps 10-12', or '10' for one")
        return profile

    @field_validator("micro_batch_size")
    @classmethod
    def _check_micro_batch(cls, micro_batch_size: int | None, info: ValidationInfo) -> int | None:
        global_batch_size = info.data.get("global_batch_size")
        if micro_batch_size and global_batch_size and global_batch_size % micro_batch_size:
            choices = join_choices(nearest_divisors(global_batch_size, micro_batch_size))
            raise ValueError(
                f"{micro_batch_size} does not divide train.global_batch_size {global_batch_size}; choose {choices}"
            )
        return micro_batch_size

    @field_validator("compile_scope")
    @classmethod
    def _check_compile_scope(cls, scope: str, info: ValidationInfo) -> str:
        if scope != "block" and info.data.get("compile") is False:
            raise ValueError("is a part of train.compile; set that to true, or this to block")
        return scope

    @field_validator("activation_checkpointing_every")
    @classmethod
    def _check_checkpointing_every(cls, every: int, info: ValidationInfo) -> int:
        if every > 1 and info.data.get("activation_checkpointing") is False:
            raise ValueError("is a part of train.activation_checkpointing; set that to true, or this to 1")
        return every

    @field_validator("rampup_increment")
    @classmethod
    def _check_rampup_increment(cls, increment: int | None, info: ValidationInfo) -> int | None:
        start, final = info.data.get("rampup_start"), info.data.get("global_batch_size")
        if increment and not start:
            raise ValueError("is a part of the ramp-up that train.rampup_start begins; give that too")
        if start and final and (start >= final or (final - start) % (increment or start)):
            raise ValueError(
                f"from rampup_start {start} in increments of {increment or start} a batch does not grow to "
                f"global_batch_size {final}; choose numbers that do"
            )
        return increment

    @field_validator("rampup_samples")
    @classmethod
    def _check_rampup_samples(cls, samples: int | None, info: ValidationInfo) -> int | None:
        if (samples is None) != (info.data.get("rampup_start") is None):
            raise ValueError("and rampup_start belong together; give both or none")
        return samples

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, precision: str, info: ValidationInfo) -> str:
        if precision == "fp16" and info.data.get("device") == "cpu":
            raise ValueError("fp16 needs a GPU; with train.device cpu choose bf16 or fp32")
        return precision


class ParallelConfig(Section):
    """How the ranks share the work."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage (Rajbhandari et al. 2020): 1 shards optimizer state, 2 also gradients, 3 also weights."""
    offload_optimizer: bool = False
    """Whether optimizer state and step live in host memory (zero_stage 1 to 3)."""
    offload_parameters: bool = False
    """Whether sharded weights live in host memory (zero_stage 3)."""

    @field_validator("offload_optimizer")
    @classmethod
    def _check_offload_optimizer(cls, offload: bool, info: ValidationInfo) -> bool:
        if offload and info.data.get("zero_stage") == 0:
            raise ValueError("needs parallel.zero_stage 1, 2 or 3, but it is 0")
        return offload

    @field_validator("offload_parameters")
    @classmethod
    def _check_offload_parameters(cls, offload: bool, info: ValidationInfo) -> bool:
        zero_stage = info.data.get("zero_stage", 3)
        if offload and zero_stage != 3:
            raise ValueError(f"needs parallel.zero_stage 3, but it is {zero_stage}")
        return offload


Change = Literal["data", "tokenizer", "seq_len", "document_mask", "batch_size", "schedule", "precision"]


class CheckpointConfig(Section):
    """When to save, how many to keep, where to continue from."""

    every: int = Field(1000, ge=0)
    """Steps between checkpoints; the last step is always saved; 0: only the last step."""
    keep: int = Field(2, gt=0)
    """Number of newest checkpoints to keep."""
    resume: str = "auto"
    """auto: continue from run_dir's newest complete checkpoint, if any; never: start anew; or a checkpoint's path."""
    asynchronous: bool = True
    """Whether a checkpoint is copied to host memory and written while training goes on; costs that memory."""
    on_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written (full disk) does to the run; older checkpoints stay in any case."""
    allow_changes: list[Change] = []
    """What may differ from the checkpoint at a resume; the difference is logged. See docs/checkpoints.md."""


class EvaluationConfig(Section):
    """Loss on the validation datasets."""

    every: int = Field(500, ge=0)
    """Steps between evaluations; the last step is always evaluated; 0: only the last step."""
    batches: int | None = Field(None, gt=0)
    """Global batches an evaluation; null: the whole validation dataset."""
    prompts: list[str] = []
    """Texts that the model continues at each evaluation, for people to read; logged with what it wrote."""
    sample_tokens: int = Field(64, gt=0)
    """Tokens that each of evaluation.prompts is continued by, drawn at temperature 1."""


class FaultsConfig(Section):
    """What goes wrong in long runs, and what to do about it."""

    step_timeout: float = Field(1800.0, ge=0)
    """Seconds without progress after which every rank writes its stacks to logs/ and exits with 86; 0: never."""
    max_skipped_steps: int = Field(20, gt=0)
    """Steps in a row with a non-finite loss or gradient that stop the run, with a checkpoint of before them."""
    spike_window: int = Field(128, ge=8)
    """Steps whose losses a new one is compared with."""
    spike_threshold: float = Field(8.0, ge=0)
    """Robust z-score (distance from the median over 1.4826 x the median distance) of a loss spike; 0: none."""
    spike_action: Literal["log", "rollback"] = "log"
    """What a loss spike does: log it with its sample ids, or also go back to the checkpoint and skip that batch."""
    max_rollbacks: int = Field(10, ge=0)
    """Rollbacks of the whole run; the next spike after them stops it."""


class LoggingConfig(Section):
    """What is reported, and where to."""

    every: int = Field(10, gt=0)
    """Steps between metrics lines."""
    wandb: bool = False
    """Whether to log to Weights & Biases."""
    wandb_project: str = "megagpt"
    """Weights & Biases project."""
    wandb_mode: Literal["auto", "online", "offline"] = "auto"
    """auto: online if the service answers and an account is set up, else offline (upload later with `wandb sync`)."""
    tensorboard: bool = False
    """Whether to write TensorBoard event files to run_dir/tensorboard."""


class RunConfig(Section):
    """The whole configuration of a training run."""

    model: ModelConfig = ModelConfig()
    """The network."""
    data: DataConfig
    """The token datasets."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and clipping."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate by step."""
    train: TrainConfig = TrainConfig()
    """The run."""
    parallel: ParallelConfig = ParallelConfig()
    """How the ranks share the work."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation."""
    logging: LoggingConfig = LoggingConfig()
    """Reports."""
    faults: FaultsConfig = FaultsConfig()
    """Hangs, non-finite numbers, loss spikes."""
    deepspeed: dict[str, JsonValue] = {}
    """Raw DeepSpeed options, merged last over what the other sections give; shown in the log."""

    @property
    def seq_len(self) -> int:
        """Tokens a sample, with the default resolved."""
        return self.data.seq_len or self.model.max_seq_len

    @field_validator("checkpoint")
    @classmethod
    def _check_beginning(cls, checkpoint: CheckpointConfig, info: ValidationInfo) -> CheckpointConfig:
        train = info.data.get("train")
        if train and train.init_from and checkpoint.resume not in ("auto", "never"):
            raise _problem(
                "checkpoint.resume",
                "names a checkpoint to continue, and train.init_from weights to start anew from; give one of them",
            )
        return checkpoint

    @field_validator("data")
    @classmethod
    def _check_seq_len(cls, data: DataConfig, info: ValidationInfo) -> DataConfig:
        model = info.data.get("model")
        if model and data.seq_len and data.seq_len > model.max_seq_len:
            raise _problem(
                "data.seq_len",
                f"{data.seq_len} exceeds model.max_seq_len {model.max_seq_len}; raise that or lower this",
            )
        return data

    @field_validator("parallel")
    @classmethod
    def _check_muon(cls, parallel: ParallelConfig, info: ValidationInfo) -> ParallelConfig:
        optimizer = info.data.get("optimizer")
        if optimizer and optimizer.name == "muon" and parallel.zero_stage == 3:
            raise _problem(
                "optimizer.name",
                "muon needs whole matrices, but parallel.zero_stage 3 gives every rank a part of each; "
                "choose stage 0, 1 or 2, or adamw",
            )
        if optimizer and optimizer.name == "muon" and parallel.offload_optimizer:
            raise _problem(
                "optimizer.name",
                "muon multiplies matrices, too slow on the host of parallel.offload_optimizer; "
                "turn that off, or choose adamw",
            )
        return parallel

    @field_validator("parallel")
    @classmethod
    def _check_compile_scope(cls, parallel: ParallelConfig, info: ValidationInfo) -> ParallelConfig:
        train = info.data.get("train")
        if train and train.compile_scope == "model" and parallel.zero_stage == 3:
            raise _problem(
                "train.compile_scope",
                "model needs whole weights, but parallel.zero_stage 3 gives every rank a part of each; choose block, "
                "or stage 0, 1 or 2",
            )
        return parallel

    @field_validator("optimizer")
    @classmethod
    def _check_mup(cls, optimizer: OptimizerConfig, info: ValidationInfo) -> OptimizerConfig:
        model = info.data.get("model")
        if model and model.mup_base_width and optimizer.name == "muon":
            raise _problem("model.mup_base_width", "muP's rates are AdamW's; leave it out, or choose adamw")
        return optimizer

    @field_validator("train")
    @classmethod
    def _check_schedule(cls, train: TrainConfig, info: ValidationInfo) -> TrainConfig:
        schedule, data, model = (info.data.get(section) for section in ("schedule", "data", "model"))
        seq_len = (data and data.seq_len) or (model and model.max_seq_len)
        if not schedule or not seq_len:
            return train
        kind, total, of_total = "steps", train.total_steps(seq_len), "train.steps"
        warmup, decay = schedule.warmup_steps, schedule.decay_steps
        if schedule.in_tokens:
            kind, total, of_total = "tokens", train.batches.after_steps(total) * seq_len, "the run's"
            warmup, decay = schedule.warmup_tokens, schedule.decay_tokens
        if warmup > total:
            raise _problem(f"schedule.warmup_{kind}", f"{warmup} exceeds {of_total} {total}; lower it")
        if schedule.name == "wsd" and decay and warmup + decay > total:
            message = f"{decay} and warmup_{kind} {warmup} together exceed {of_total} {total}"
            raise _problem(f"schedule.decay_{kind}", message)
        return train


def _problem(key: str, message: str) -> PydanticCustomError:
    """A problem between sections, which belongs to `key` and not to the section that found it."""
    return PydanticCustomError("between_sections", "{key}: {message}", {"key": key, "message": message})
