"""One training run from its configuration: check, build, resume, fit."""

import platform
from contextlib import ExitStack, nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from rich.console import Console

import megagpt
from megagpt.config import check_batch
from megagpt.config.schema import RunConfig
from megagpt.data.loader import BatchLoader, TrainingData, ValidationData
from megagpt.data.manifest import common_tokenizer
from megagpt.errors import UsageError
from megagpt.model.counts import flops_per_token, parameter_count
from megagpt.scaling.devices import peak_flops
from megagpt.training import run_folder
from megagpt.training.callbacks import Checkpointing, Evaluation, Metrics
from megagpt.training.checkpoint import CheckpointManifest, read_manifest, verify_checksums
from megagpt.training.collective import on_rank_0, together
from megagpt.training.engine import Engine
from megagpt.training.metrics import JsonLines, Sink
from megagpt.training.resume import choose_checkpoint
from megagpt.training.sinks import ConsoleSink, TensorBoardSink, WandbSink
from megagpt.training.trainer import Trainer
from megagpt.training.universal_loading import convert_together, needs_conversion


def train(config: RunConfig, device: torch.device, console: Console) -> None:
    """Train to config.train.steps, continuing where the run folder's newest checkpoint ended.

    Needs an initialised process group; every rank calls it. `console` is used on rank 0. Raises AgreedError for what
    the user can mend.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    micro_batch_size, accumulation_steps = together(
        lambda: check_batch(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    )
    data, validation = together(lambda: _open_data(config, micro_batch_size, rank, world_size))
    with ExitStack() as stack:
        lock = run_folder.locked(Path(config.train.run_dir)) if rank == 0 else nullcontext()
        together(lambda: stack.enter_context(lock))
        template = _describe(config, data, world_size)
        checkpoint = on_rank_0(lambda: choose_checkpoint(config, template))
        progress = together(lambda: read_manifest(checkpoint)) if checkpoint else template
        if progress.step >= config.train.steps:
            if rank == 0:
                done = f"{config.train.run_dir}: all {config.train.steps} steps are done"
                console.print(f"{done}; raise train.steps to go on")
            return
        on_rank_0(lambda: run_folder.prepare(config, data, progress.step))
        if rank == 0:
            _print_plan(console, config, data, device, micro_batch_size, accumulation_steps, checkpoint)
        form = None
        if checkpoint and needs_conversion(progress, config, world_size):
            form = convert_together(checkpoint, Path(config.train.run_dir) / "checkpoints", console)
        engine = together(lambda: Engine(config, micro_batch_size, accumulation_steps, device))
        if rank == 0 and config.deepspeed:
            console.print(f"DeepSpeed options: {engine.options}")
        if form:
            engine.load_universal(form)
        elif checkpoint:
            together(lambda: verify_checksums(checkpoint, rank, world_size))
            engine.load(checkpoint)
        _fit(config, engine, data, validation, template, progress, console)
        engine.close()


def _fit(
    config: RunConfig,
    engine: Engine,
    data: TrainingData,
    validation: dict[str, ValidationData],
    template: CheckpointManifest,
    progress: CheckpointManifest,
    console: Console,
) -> None:
    """Hang the callbacks on the loop and run the steps after `progress`."""
    rank, device, run_dir = dist.get_rank(), engine.device, Path(config.train.run_dir)
    metrics = Metrics(
        together(lambda: _open_sinks(config, run_dir, progress.step, console) if rank == 0 else []),
        peak_flops(torch.cuda.get_device_name(device), config.train.precision) if device.type == "cuda" else None,
        progress.skipped_steps,
    )
    callbacks = [metrics, Evaluation(validation, metrics), Checkpointing(run_dir / "checkpoints", template, metrics)]
    with BatchLoader(
        data,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=engine.micro_batch_size,
        rank=rank,
        world_size=dist.get_world_size(),
        start_sample=progress.consumed_samples,
        stop_sample=config.train.steps * config.train.global_batch_size,
        pin_memory=device.type == "cuda",
    ) as loader:
        Trainer(config, engine, loader, callbacks, rank).fit()


def _open_data(
    config: RunConfig, micro_batch_size: int, rank: int, world_size: int
) -> tuple[TrainingData, dict[str, ValidationData]]:
    """Training data, and validation data by name. Raises UserError for what is missing, damaged or does not fit."""
    vocab_size = config.model.vocab_size
    data = TrainingData(config.data.train, config.seq_len, config.train.seed, config.data.document_mask, vocab_size)
    names = _distinct_names([source.path for source in config.data.validation])
    validation = {
        name: ValidationData(
            source,
            config.seq_len,
            config.data.document_mask,
            vocab_size,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            max_batches=config.evaluation.batches,
        )
        for name, source in zip(names, config.data.validation, strict=True)
    }
    common_tokenizer([*data.datasets, *(split.dataset for split in validation.values())], vocab_size)
    return data, validation


def _distinct_names(prefixes: list[str]) -> list[str]:
    """Names in metrics: the last two parts of each path (corpus/validation), more where that is not enough."""
    parts = [Path(prefix).parts for prefix in prefixes]
    for length in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    if len(set(prefixes)) < len(prefixes):
        raise UsageError("data.validation: names a dataset twice; give each once")
    return prefixes


def _describe(config: RunConfig, data: TrainingData, world_size: int) -> CheckpointManifest:
    """What this run's checkpoints say of themselves, at step 0."""
    return CheckpointManifest(
        step=0,
        consumed_samples=0,
        world_size=world_size,
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        seq_len=config.seq_len,
        document_mask=config.data.document_mask,
        no_decay=sorted(config.optimizer.no_decay),
        data_fingerprint=data.fingerprint,
        model=config.model.model_dump(),
        versions={
            "megagpt": megagpt.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
    )


def _open_sinks(config: RunConfig, run_dir: Path, first_step: int, console: Console) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl")]
    if config.logging.wandb:
        sinks.append(
            WandbSink(run_dir, config.logging.wandb_project, config.logging.wandb_mode, config.model_dump(mode="json"))
        )
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(run_dir, first_step))
    return [*sinks, ConsoleSink(config.train.steps, first_step, console)]


def _print_plan(
    console: Console,
    config: RunConfig,
    data: TrainingData,
    device: torch.device,
    micro_batch_size: int,
    accumulation_steps: int,
    checkpoint: Path | None,
) -> None:
    """What is about to happen, before the first slow thing does."""
    cut, model = config.train, config.model
    device_name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with {torch.get_num_threads()} thread(s)"
    )
    tokens = cut.steps * cut.global_batch_size * config.seq_len
    start = f"continues from {checkpoint.name}" if checkpoint else "starts anew"
    available = sum(dataset.num_tokens for dataset in data.datasets)
    epochs = ", ".join(f"{epochs:.2f}" for epochs in data.epochs(cut.steps * cut.global_batch_size))
    mflops = flops_per_token(model, config.seq_len) / 1e6
    lines = (
        f"run      {cut.run_dir}: {start}, to step {cut.steps:,}",
        f"model    {parameter_count(model):,} parameters, {mflops:,.1f} MFLOPs a token forward and backward",
        f"data     {available:,} tokens; the whole run reads {tokens:,}, {epochs} epochs",
        f"batch    {cut.global_batch_size} sequences of {config.seq_len} tokens = {micro_batch_size} a micro-batch "
        f"x {accumulation_steps} accumulated x {dist.get_world_size()} ranks",
        f"machine  {device_name} a rank, {cut.precision}, ZeRO stage {config.parallel.zero_stage}",
    )
    for line in lines:
        console.print(line)
