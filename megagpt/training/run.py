"""One training run from its configuration: check, build, resume, fit.

run_dir/
    config.yaml       the resolved configuration
    tokenizer.json    how tokens become text again (and beside it the vocabulary's file, if it is an own one)
    metrics.jsonl     see megagpt.training.metrics
    checkpoints/      see megagpt.training.checkpoint
    logs/rank_*.log
"""

import platform
import shutil
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from rich.console import Console

import megagpt
from megagpt.config import check_batch, save_config
from megagpt.config.schema import RunConfig
from megagpt.data.atomic import replace_file
from megagpt.data.loader import BatchLoader, TrainingData, ValidationData
from megagpt.data.manifest import common_tokenizer
from megagpt.errors import UsageError, UserError
from megagpt.model.counts import flops_per_token, parameter_count
from megagpt.scaling.devices import peak_flops
from megagpt.training.callbacks import Checkpointing, Evaluation, Metrics
from megagpt.training.checkpoint import (
    CheckpointManifest,
    complete_checkpoints,
    find_checkpoint,
    newest_checkpoint,
    read_manifest,
)
from megagpt.training.collective import on_rank_0, together
from megagpt.training.engine import Engine
from megagpt.training.metrics import JsonLines, Sink, drop_records_after
from megagpt.training.sinks import ConsoleSink, TensorBoardSink, WandbSink
from megagpt.training.trainer import Trainer


def train(config: RunConfig, device: torch.device, console: Console) -> None:
    """Train to config.train.steps, continuing where the run folder's newest checkpoint ended.

    Needs an initialised process group; every rank calls it. `console` is used on rank 0. Raises AgreedError for what
    the user can mend.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train_config, run_dir = config.train, Path(config.train.run_dir)
    micro_batch_size, accumulation_steps = together(
        lambda: check_batch(train_config.global_batch_size, train_config.micro_batch_size, world_size)
    )
    data, validation = together(lambda: _open_data(config, micro_batch_size, rank, world_size))
    template = _describe(config, data, world_size)
    checkpoint = on_rank_0(lambda: _choose_checkpoint(config, template))
    progress = read_manifest(checkpoint) if checkpoint else template
    if progress.step >= train_config.steps:
        if rank == 0:
            console.print(f"{run_dir}: all {train_config.steps} steps are done; raise train.steps to go on")
        return
    on_rank_0(lambda: _prepare_run_folder(config, data, progress.step))
    if rank == 0:
        _print_plan(console, config, data, device, micro_batch_size, accumulation_steps, checkpoint)

    engine = together(lambda: Engine(config, micro_batch_size, accumulation_steps, device))
    if rank == 0 and config.deepspeed:
        console.print(f"DeepSpeed options: {engine.options}")
    if checkpoint:
        engine.load(checkpoint)
    metrics = Metrics(
        together(lambda: _open_sinks(config, run_dir, progress.step, console) if rank == 0 else []),
        peak_flops(torch.cuda.get_device_name(device), train_config.precision) if device.type == "cuda" else None,
    )
    callbacks = [metrics, Evaluation(validation, metrics), Checkpointing(run_dir / "checkpoints", template, metrics)]
    with BatchLoader(
        data,
        global_batch_size=train_config.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        start_sample=progress.consumed_samples,
        stop_sample=train_config.steps * train_config.global_batch_size,
        pin_memory=device.type == "cuda",
    ) as loader:
        Trainer(config, engine, loader, callbacks, rank).fit()
    engine.close()


def _open_data(
    config: RunConfig, micro_batch_size: int, rank: int, world_size: int
) -> tuple[TrainingData, dict[str, ValidationData]]:
    """Training data, and validation data by name. Raises UserError for what is missing, damaged or does not fit."""
    vocab_size = config.model.vocab_size
    data = TrainingData(config.data.train, config.seq_len, config.train.seed, config.data.document_mask, vocab_size)
    validation = {
        _validation_name(source.path): ValidationData(
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
        for source in config.data.validation
    }
    common_tokenizer([*data.datasets, *(split.dataset for split in validation.values())], vocab_size)
    return data, validation


def _validation_name(prefix: str) -> str:
    """data/corpus/validation is called corpus/validation in metrics."""
    path = Path(prefix)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


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
        data_fingerprint=data.fingerprint,
        model=config.model.model_dump(),
        versions={
            "megagpt": megagpt.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
    )


def _choose_checkpoint(config: RunConfig, expected: CheckpointManifest) -> Path | None:
    """The checkpoint to continue from, None for a new run. Raises UserError if it does not fit the configuration."""
    run_dir, resume = Path(config.train.run_dir), config.checkpoint.resume
    if resume == "never":
        if complete_checkpoints(run_dir / "checkpoints"):
            raise UsageError(
                f"checkpoint.resume=never, but {run_dir} already holds checkpoints; "
                "choose another train.run_dir, or resume=auto to continue that run"
            )
        return None
    checkpoint = newest_checkpoint(run_dir / "checkpoints") if resume == "auto" else find_checkpoint(Path(resume))
    if checkpoint is None:
        return None
    _compare(checkpoint, read_manifest(checkpoint), expected)
    return checkpoint


_ADVICE = {
    "data_fingerprint": "the datasets or their weights changed; give data.train as it was, or start a new run",
    "world_size": "start as many ranks as the checkpoint was written by",
}


def _compare(checkpoint: Path, found: CheckpointManifest, expected: CheckpointManifest) -> None:
    """Raise UserError naming what differs between the run that wrote `checkpoint` and this one."""
    for key in ("seq_len", "seed", "global_batch_size", "data_fingerprint", "precision", "zero_stage", "world_size"):
        then, now = getattr(found, key), getattr(expected, key)
        if then != now:
            advice = _ADVICE.get(key, "set it as it was, or start a new run in another train.run_dir")
            raise UsageError(f"cannot resume from {checkpoint}: {key} was {then} and is now {now}; {advice}")
    changed = [
        f"{key} was {then} and is now {expected.model.get(key)}"
        for key, then in found.model.items()
        if then != expected.model.get(key)
    ]
    if changed:
        raise UsageError(f"cannot resume from {checkpoint}: model.{', model.'.join(changed)}")


def _prepare_run_folder(config: RunConfig, data: TrainingData, first_step: int) -> None:
    """Folder, config.yaml, tokenizer; metrics of steps that will be done again are dropped."""
    run_dir, tokenizer = Path(config.train.run_dir), data.tokenizer
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / "config.yaml")
        if tokenizer:
            if tokenizer.file:
                shutil.copyfile(_manifest_folder(data) / tokenizer.file, run_dir / tokenizer.file)
            replace_file(run_dir / "tokenizer.json", (tokenizer.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"train.run_dir {run_dir}: {error.strerror}: {error.filename}") from error
    drop_records_after(run_dir / "metrics.jsonl", first_step)


def _manifest_folder(data: TrainingData) -> Path:
    """Folder of the first training dataset that has a manifest, and with it the vocabulary's file."""
    folders = (Path(dataset.prefix).parent for dataset in data.datasets)
    return next(folder for folder in folders if (folder / "manifest.json").exists())


def _open_sinks(config: RunConfig, run_dir: Path, first_step: int, console: Console) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl")]
    if config.logging.wandb:
        sinks.append(
            WandbSink(run_dir, config.logging.wandb_project, config.logging.wandb_mode, config.model_dump(mode="json"))
        )
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(run_dir))
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
