"""The one door to DeepSpeed: a RunConfig becomes DeepSpeed's options, and a step becomes forward, backward, update.

What this module guarantees on top of DeepSpeed, at every ZeRO stage:

- the loss is a sum over the global batch divided by its number of target tokens, however ranks and micro-batches
  cut it;
- gradients are accumulated and reduced in fp32, master weights are fp32 (stages 1-3: DeepSpeed's; stage 0 keeps fp32
  weights and computes under autocast, since DeepSpeed has no fp32 accumulation for 16-bit weights without ZeRO);
- random initial weights depend on the seed and a parameter's name alone, so all stages and world sizes start the same
  (with 16-bit weights DeepSpeed rounds them before it makes the master weights; given ones arrive unrounded);
- a step with a non-finite loss or gradient changes nothing and says so; in bf16 and fp32 the host never waits for the
  device to learn it.
"""

import gc
import importlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch._inductor.config
import torch.distributed as dist
from deepspeed.runtime import compiler, torch_autocast
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from megagpt.config.schema import RunConfig
from megagpt.data.loader import Batch
from megagpt.data.samples import IGNORE_INDEX
from megagpt.errors import UsageError, UserError
from megagpt.model.attention import missing_for_flex_attention, missing_for_sdpa_kernel
from megagpt.model.compiling import missing_for_compile
from megagpt.model.gpt import GPT, compile_attention, compile_blocks, compile_loss, compile_model, use_sdpa_kernel
from megagpt.model.init import initialize_weights, learning_rate_scale, parameter_kind, stacked_heights
from megagpt.training.checkpoint import SHARDS
from megagpt.training.control import PATIENCE
from megagpt.training.flat_gradients import keep_gradients_flat
from megagpt.training.host_memory import keep_freed_memory
from megagpt.training.host_syncs import decided_on_device
from megagpt.training.initial_weights import InitialWeights, copy_master_weights, copy_weights
from megagpt.training.optimizer import apply_settings, build_optimizer, parameter_groups
from megagpt.training.shards import PARAMETER_NAMES
from megagpt.training.snapshot import CollectingEngine
from megagpt.training.step import EvaluationResult, StepClock, StepResult
from megagpt.training.universal_loading import load_universal

logger = logging.getLogger(__name__)

_AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Raw DeepSpeed options that would contradict what the rest of the configuration says, and who says it.
_OWNED_OPTIONS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "zero_optimization.stage": "parallel.zero_stage",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision: gradients are always accumulated in fp32",
    # DeepCompile (0.19) reduces gradients in their own 16 bits, waits for the device in every micro-batch, steps on
    # zeros where the optimizer is offloaded, and fails after a resume.
    "compile": "train.compile and train.compile_scope",
}


def deepspeed_options(
    config: RunConfig, micro_batch_size: int, gradient_accumulation_steps: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration for `config`, with the raw `deepspeed` section merged last."""
    parallel, precision = config.parallel, config.train.precision
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if parallel.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    for key, owner in _OWNED_OPTIONS.items():
        if _has(config.deepspeed, key.split(".")):
            raise UsageError(f"section deepspeed: {key} is set by {owner}; change that instead")
    for key in ("round_robin_gradients", "offload_optimizer"):
        if config.optimizer.name == "muon" and _has(config.deepspeed, ["zero_optimization", key]):
            raise UsageError(f"section deepspeed: zero_optimization.{key} does not work with optimizer.name muon")
    options: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        # At stage 0 the engine below clips, since DeepSpeed would not tell the norm.
        "gradient_clipping": config.optimizer.grad_clip if parallel.zero_stage else 0.0,
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload, torch's fused CPU AdamW steps: nothing to compile, and the same arithmetic as without offload.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        if parallel.zero_stage == 0:
            options["torch_autocast"] = {"enabled": True, "dtype": _AUTOCAST_DTYPES[precision]}
        else:
            options[precision] = {"enabled": True}
            options["data_types"] = {"grad_accum_dtype": "fp32"}
            if precision == "bf16":
                options["bf16"]["check_grad_overflow"] = False  # the engine below checks, on the device
    return _merge(options, config.deepspeed)


class Engine:
    """A GPT under DeepSpeed: `step`, `evaluate`, `save`, `load`."""

    def __init__(
        self,
        config: RunConfig,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        device: torch.device,
        initial_weights: InitialWeights | None = None,
    ) -> None:
        """initial_weights: what a new run starts from; None: random weights."""
        if device.type == "cpu":
            keep_freed_memory()
        self.config = config
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.options = deepspeed_options(config, micro_batch_size, gradient_accumulation_steps, device)
        self.zero_stage = int(self.options["zero_optimization"]["stage"])
        # DeepSpeed keeps this for the whole process: after an engine with autocast, one with fp16 weights never steps.
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
        import_muon_uncompiled()
        try:
            with deepspeed_output_to_log(), _few_objects_to_collect():
                model = self._build_model(initial_weights)
                heights = partial(stacked_heights, config=config.model)
                scales = partial(learning_rate_scale, config=config.model)
                groups = parameter_groups(model, config.optimizer, parameter_kind, heights, scales)
                self._parameter_names = _names_by_group(model, groups)
                optimizer = build_optimizer(groups, config.optimizer, config.train.precision)
                self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=self.options)
                self._files = CollectingEngine(self._engine.checkpoint_engine)
                self._engine.checkpoint_engine = self._files
                if isinstance(self._engine.optimizer, BF16_Optimizer):
                    keep_gradients_flat(self._engine)
                self._engine._copy_recovery_script = lambda save_path: None  # see megagpt.training.saving
                if initial_weights and self.zero_stage > 0 and config.train.precision != "fp32":
                    copy_master_weights(self._engine.module, initial_weights)
        except (AssertionError, TypeError, ValueError) as error:
            if not config.deepspeed:
                raise  # our own options are wrong: a bug
            reason = " ".join(str(error).split())
            raise UsageError(f"section deepspeed: DeepSpeed refuses its options: {reason}") from error
        wait_as_long_as_needed()
        if config.train.attention_kernel != "auto":
            self._choose_attention(config.train.attention_kernel)
        self._on_device = config.train.precision != "fp16"  # fp16's loss scale is decided on the host
        if not self._on_device and self.zero_stage:  # how many steps may be skipped is faults.max_skipped_steps' to say
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self._loss = self._grad_norm = self._skipped = torch.zeros((), device=device)
        if self._on_device:
            optimizer.register_step_pre_hook(self._skip_if_not_finite)
        if config.train.compile:
            self._compile()

    @property
    def module(self) -> GPT:
        """The GPT itself; its weights are partitioned at stage 3."""
        return self._engine.module

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one global batch."""
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = "torch_autocast" in self.options  # another engine may have set it
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        clock = StepClock(self.device)
        batches = [self._to_device(batch) for batch in micro_batches]
        targets = torch.stack([(batch.targets != IGNORE_INDEX).sum() for batch in batches]).sum()
        dist.all_reduce(targets)
        targets.clamp_(min=1)  # a batch whose targets are all masked has loss 0
        loss = torch.zeros((), device=self.device)
        with decided_on_device() if self._on_device else nullcontext():
            for index, batch in enumerate(batches):
                last = index == len(batches) - 1
                self._engine.set_gradient_accumulation_boundary(last)
                loss_sum = clock.forward(partial(self._engine, batch.input_ids, batch.targets, batch.document_ids))
                loss += loss_sum.detach() / targets
                # DeepSpeed averages gradients over ranks; times world size makes that the sum, over targets the mean.
                self._engine.backward(loss_sum * (dist.get_world_size() / targets), scale_wrt_gas=False)
                if last:
                    clock.end_backward()
                    dist.all_reduce(loss)
                    self._loss = loss
                    if self.zero_stage == 0:
                        self._clip_unsharded_gradients()
                self._engine.step()
        clock.end()
        self._forget_overflow()
        return StepResult(torch.stack([loss, *self._outcome()]), clock)

    def _forget_overflow(self) -> None:
        """After an overflow DeepSpeed keeps the gradients of an offloaded optimizer and adds to them: drop them."""
        optimizer = self._engine.optimizer
        if not self._on_device and self.zero_stage in (1, 2) and optimizer.overflow:
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = None

    def _outcome(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient norm and whether the step was skipped, fp32 scalars on the device."""
        if self._on_device:
            return torch.where(self._skipped > 0, torch.inf, self._grad_norm), self._skipped
        if self.zero_stage == 0:
            return self._grad_norm, (~torch.isfinite(self._grad_norm)).float()
        norm = torch.tensor(float(self._engine.get_global_grad_norm()), device=self.device)
        return norm, torch.tensor(float(not self._engine.was_step_applied()), device=self.device)

    def _skip_if_not_finite(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the optimizer steps: tell its kernels, by a tensor, whether to leave everything as it is."""
        if self.zero_stage:
            norm = self._engine.optimizer._global_grad_norm
            self._grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        # DeepSpeed puts -1 for a norm that is not finite.
        finite = torch.isfinite(self._grad_norm) & (self._grad_norm >= 0) & torch.isfinite(self._loss)
        self._skipped = (~finite).float()
        on_host = "offload_optimizer" in self.options["zero_optimization"]
        optimizer.found_inf = self._skipped.cpu() if on_host else self._skipped  # type: ignore[attr-defined]

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[Batch], interrupted: Callable[[], bool] = lambda: False
    ) -> EvaluationResult | None:
        """Mean loss over all targets of all ranks' batches. Every rank must bring as many batches as the others.

        None if `interrupted`, which is asked on every rank before each batch and must answer the same on all, said so.
        """
        self._engine.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in batches:
            if interrupted():
                return None
            moved = self._to_device(batch)
            totals[0] += self._engine(moved.input_ids, moved.targets, moved.document_ids)
            totals[1] += (moved.targets != IGNORE_INDEX).sum()
            if moved.target_bytes is not None:
                totals[2] += moved.target_bytes.sum()
        dist.all_reduce(totals)
        loss_sum, count, size = totals.tolist()
        return EvaluationResult(loss_sum / max(count, 1), int(count), int(size) or None)

    def save(self, folder: Path, snapshot: bool) -> dict[Path, Any]:
        """Contents of this rank's files of weights and optimizer state, to be written below `folder`.

        All ranks call it; nothing is written. snapshot: copies in host memory, instead of what the next step changes.
        """
        self._files.begin(snapshot)
        state: dict[str, Any] = {PARAMETER_NAMES: self._parameter_names}
        # DeepSpeed saves its loss scalers, but not the one it uses at stage 0.
        if scaler := self._engine.torch_autocast_z0_gradscaler:
            state["loss_scaler"] = scaler.state_dict()
        self._engine.save_checkpoint(str(folder), tag=SHARDS, client_state=state, save_latest=False)
        contents, self._files.contents = self._files.contents, {}
        return contents

    def load(self, folder: Path) -> None:
        """Read what `save` wrote at the same world size and ZeRO stage; all ranks call it."""
        with deepspeed_output_to_log():
            path, state = self._engine.load_checkpoint(str(folder), tag=SHARDS)
        if path is None:
            raise UserError(f"{folder}: DeepSpeed found no checkpoint in it")
        if self._engine.torch_autocast_z0_gradscaler:
            self._engine.torch_autocast_z0_gradscaler.load_state_dict(state["loss_scaler"])
        # The checkpoint brings the optimizer's settings with it; what the configuration says now counts.
        apply_settings(self._engine.optimizer.param_groups, self.config.optimizer)
        if self.zero_stage in (1, 2):
            self._engine.optimizer.clip_grad = self.config.optimizer.grad_clip

    def load_universal(self, form: Path) -> None:
        """Read the universal form of a checkpoint that any world size, ZeRO stage and precision wrote; all ranks."""
        with deepspeed_output_to_log():
            load_universal(self._engine, form)

    def close(self) -> None:
        """Free DeepSpeed's hooks and buffers, so that another engine can live in this process."""
        self._engine.destroy()

    def _build_model(self, weights: InitialWeights | None) -> GPT:
        train = self.config.train
        every = train.activation_checkpointing_every if train.activation_checkpointing else 0
        build = partial(GPT, self.config.model, every)
        if self.zero_stage < 3:
            model = build()
            copy_weights(model, weights) if weights else initialize_weights(model, train.seed)
            return model.to(self.device)
        # Each layer is sharded as it is made: no rank ever holds the whole model. The dtype comes from the options; a
        # dtype argument would be ignored on a CPU, where DeepSpeed 0.19 takes bf16 instead.
        with deepspeed.zero.Init(config_dict_or_path=self.options):
            model = build()
        copy_weights(model, weights, _gathered) if weights else initialize_weights(model, train.seed, _gathered)
        return model

    def _compile(self) -> None:
        config = self.config
        if missing := missing_for_compile():
            logger.warning("training uncompiled, which is slower: torch.compile needs %s", missing)
            return
        if config.data.document_mask and self.device.type == "cuda":
            if missing := missing_for_flex_attention(config.model, self.device):
                logger.warning("masking documents by seq_len^2 masks: FlexAttention needs %s", missing)
            else:
                compile_attention(self.module)
        if config.train.compile_scope == "model":
            compile_model(self.module)
        else:
            compile_loss(self.module)
            # At stage 3 DeepSpeed's hooks gather weights before every submodule: each would break the block's graph
            # and, with guards of their own, compile it anew until torch gives up.
            if self.zero_stage < 3:
                compile_blocks(self.module)

    def _choose_attention(self, kernel: str) -> None:
        config, dtype = self.config, _DTYPES[self.config.train.precision]
        if missing := missing_for_sdpa_kernel(config.model, kernel, config.data.document_mask, self.device, dtype):
            raise UsageError(f"train.attention_kernel {kernel}: not for this model here ({missing}); choose auto")
        use_sdpa_kernel(self.module, kernel)

    def _clip_unsharded_gradients(self) -> None:
        """Stage 0, where DeepSpeed would clip but not tell the norm. A gradient that is not finite stays so."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        scaler = self._engine.torch_autocast_z0_gradscaler
        scale = scaler.get_scale() if scaler else 1.0
        scaled_norm = nn.utils.get_total_norm(gradients)
        self._grad_norm = scaled_norm / scale
        if limit := self.config.optimizer.grad_clip:
            factor = torch.clamp(limit * scale / (scaled_norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, factor)

    def _to_device(self, batch: Batch) -> Batch:
        return batch.to(self.device, non_blocking=True)


def init_process_group(device_type: str, store: dist.Store, rank: int, world_size: int) -> None:
    """Join the process group of all ranks that share `store`: NCCL or gloo.

    DeepSpeed would compile a shared-memory kernel for inference on CPUs, which nothing here calls: it costs half a
    minute, a compiler, and a lock file that makes the next start wait for ever if the compilation was killed. Whether
    it can is all that it asks its list of operators for, and filling that runs compilers on every rank: it stays empty.
    """
    deepspeed.ops.__compatible_ops__ = {}
    with deepspeed_output_to_log():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=PATIENCE)


def import_muon_uncompiled() -> None:
    """DeepSpeed asks of every optimizer whether it is its own Muon, which is imported for that: nothing here uses it.

    A function of that module is compiled at import, and the import of all of torch's compiler costs each rank more
    than a second of CPU time. With this, whoever compiles nothing imports no compiler.
    """
    compile_function = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_function


def wait_as_long_as_needed() -> None:
    """Take the timeouts from all process groups, DeepSpeed's own ones too: hangs are the supervisor's to notice.

    A rank may have to wait for hours, for others that read or convert a checkpoint; and a timeout of NCCL's ends the
    process before anybody has written down where it hangs.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)


@contextmanager
def deepspeed_output_to_log() -> Iterator[None]:
    """What DeepSpeed prints while it sets up goes to the log, not between the lines of the console."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.info("%s", line)


@contextmanager
def _few_objects_to_collect() -> Iterator[None]:
    """DeepSpeed collects garbage before each of its notes on memory, six times and more: of what is made here only.

    Else each looks through the hundreds of thousands of objects that imports have left, which takes 0.2 s. What an
    earlier engine left is collected before; where somebody else has frozen what there was, it stays so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Whole parameters inside the block; what rank 0 wrote there becomes every rank's shard."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _names_by_group(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The names of the parameters in each optimizer group: at ZeRO stage 0 DeepSpeed saves them nowhere."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [[names[parameter] for parameter in group["params"]] for group in groups]


def _has(tree: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged
