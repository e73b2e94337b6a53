"""One training run from its configuration: check, build, resume, fit."""

import logging
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import deepspeed
import torch
import torch.distributed as dist
from rich.console import Console

import megagpt
from megagpt.config import check_batches
from megagpt.config.schema import RunConfig
from megagpt.data.loader import BatchLoader, TrainingData, ValidationData, step_windows
from megagpt.model.counts import flops_per_token, parameter_count
from megagpt.scaling.devices import peak_flops
from megagpt.training import run_folder
from megagpt.training.callbacks import Checkpointing, Evaluation, Profiling
from megagpt.training.checkpoint import CheckpointManifest, newest_checkpoint
from megagpt.training.collective import on_rank_0, together
from megagpt.training.control import HostGroup
from megagpt.training.engine import Engine
from megagpt.training.faults import LossSpikes, NonFiniteSteps
from megagpt.training.horizon import Horizon, horizon
from megagpt.training.initial_weights import open_initial_weights
from megagpt.training.metrics import JsonLines, Record, Sink
from megagpt.training.opening import open_data, sample_writer
from megagpt.training.recording import Metrics
from megagpt.training.resume import Resumption, find_resumption
from megagpt.training.saving import restore_random_states
from megagpt.training.schedule import Schedule
from megagpt.training.sinks import ConsoleSink, TensorBoardSink, WandbSink
from megagpt.training.supervision import Supervisor
from megagpt.training.trainer import Callback, Progress, RollBackError, Trainer
from megagpt.training.universal_loading import convert_together, needs_conversion, sharding_options

logger = logging.getLogger(__name__)

Outcome = Literal["finished", "stopped"]


def train(config: RunConfig, device: torch.device, console: Console, supervisor: Supervisor | None = None) -> Outcome:
    """Train to the run's last step, continuing where the run folder's newest checkpoint ended.

    Needs an initialised process group; every rank calls it. `console` is used on rank 0. Returns "stopped" if the
    supervisor asked to stop before the end: a checkpoint is saved then. Raises AgreedError for what the user can mend.
    """
    supervisor = supervisor or Supervisor()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    supervisor.beat("opening the data")
    micro_batch_size, accumulation_steps = together(
        lambda: check_batches(config.train.batches, config.train.micro_batch_size, world_size)
    )
    data, validation = together(lambda: open_data(config, micro_batch_size, rank, world_size))
    with ExitStack() as stack:
        lock = run_folder.locked(Path(config.train.run_dir)) if rank == 0 else nullcontext()
        together(lambda: stack.enter_context(lock))
        supervisor.beat("verifying the newest checkpoint", patient=True)
        template = _describe(config, data, world_size)
        resumption = find_resumption(config, template)
        progress = _progress(config, resumption)
        if resumption:
            template = _follow(resumption, data, template)
        length = horizon(config, progress)
        if progress.step >= length.steps and not progress.evaluation_due:
            if rank == 0:
                done = f"{config.train.run_dir}: all {length.steps} steps are done"
                console.print(f"{done}; raise train.steps to go on")
            return "finished"
        weights = None
        if not resumption and (source := config.train.init_from):
            weights = together(
                lambda: open_initial_weights(Path(source), config.model, data.tokenizer, rank, world_size)
            )
        write_samples = together(lambda: sample_writer(config))
        on_rank_0(lambda: run_folder.prepare(config, data, progress.step, progress.evaluation_due))
        if rank == 0:
            _print_plan(console, config, data, device, micro_batch_size, accumulation_steps, length, resumption)
        supervisor.beat("building the model", patient=True)
        engine = together(lambda: Engine(config, micro_batch_size, accumulation_steps, device, weights))
        weights = None  # frees those of a checkpoint, which are whole in memory
        if rank == 0 and config.deepspeed:
            console.print(f"DeepSpeed options: {engine.options}")
        hosts = HostGroup()
        stack.callback(hosts.close)
        run = _Run(config, engine, data, validation, write_samples, template, hosts, supervisor, console)
        if resumption:
            run.load(resumption)
        first = run.first_records(progress.step, resumption)
        while True:
            try:
                outcome = run.fit(progress, first)
                break
            except RollBackError as error:
                progress, first = run.roll_back(progress, error)
        # Launchers end all ranks soon after the first one has gone, and rank 0 may still be sending metrics.
        supervisor.beat("ending", patient=True)
        hosts.agree([0])
        engine.close()
        return outcome


class _Run:
    """What stays the same while a run goes on, rollbacks included."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        data: TrainingData,
        validation: dict[str, ValidationData],
        write_samples: Callable[[Trainer, Metrics], None],
        template: CheckpointManifest,
        hosts: HostGroup,
        supervisor: Supervisor,
        console: Console,
    ) -> None:
        self.config, self.engine, self.data, self.validation = config, engine, data, validation
        self.write_samples, self.template, self.hosts = write_samples, template, hosts
        self.supervisor, self.console = supervisor, console
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.run_dir = Path(config.train.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"

    def first_records(self, step: int, resumption: Resumption | None) -> list[Record]:
        """What the metrics say of this start."""
        start = {
            "kind": "start",
            "step": step,
            "world_size": self.world_size,
            "device": _device_name(self.engine.device),
            "zero_stage": self.engine.zero_stage,
            "precision": self.config.train.precision,
            "micro_batch_size": self.engine.micro_batch_size,
            "continues_from": resumption.checkpoint.name if resumption else None,
        }
        changes = resumption.changes if resumption else []
        return [start, *({"kind": "event", "step": step, "event": "changed", "message": text} for text in changes)]

    def load(self, resumption: Resumption) -> None:
        """Give the engine the weights and optimizer state of a checkpoint, of whatever ranks and ZeRO stage it is."""
        checkpoint, manifest = resumption.checkpoint, resumption.manifest
        if needs_conversion(manifest, self.config, self.world_size):
            self.supervisor.beat("converting the checkpoint", patient=True)
            self.engine.load_universal(convert_together(checkpoint, self.checkpoints, self.console))
            return
        self.supervisor.beat("loading the checkpoint", patient=True)
        self.engine.load(checkpoint)
        restore_random_states(checkpoint, self.rank)

    def fit(self, progress: Progress, first: list[Record]) -> Outcome:
        """Hang the callbacks on the loop and run the steps after `progress`."""
        config, device = self.config, self.engine.device
        sinks = together(lambda: self._open_sinks(progress) if self.rank == 0 else [])
        on_gpu = device.type == "cuda"
        peak = peak_flops(torch.cuda.get_device_name(device), config.train.precision) if on_gpu else None
        metrics = Metrics(sinks, peak, self.data.epochs, first)
        evaluation = Evaluation(self.validation, metrics, lambda trainer: self.write_samples(trainer, metrics))
        checkpointing = Checkpointing(self.checkpoints, self.template, metrics, resaves=progress.evaluation_due)

        def has_checkpoint(trainer: Trainer) -> bool:
            checkpointing.finish(trainer)
            return on_rank_0(lambda: newest_checkpoint(self.checkpoints) is not None)

        callbacks: list[Callback] = [
            metrics,
            NonFiniteSteps(metrics, checkpointing.save),
            LossSpikes(metrics, has_checkpoint),
            evaluation,
            checkpointing,
        ]
        if config.train.profile:
            callbacks.append(Profiling(config.train.profile, self.run_dir / "profile"))
        length = horizon(config, progress)
        batches, remaining = config.train.batches, length.steps - progress.step
        windows = step_windows(batches, progress.consumed_samples, remaining, progress.skipped_samples)
        with BatchLoader(
            self.data,
            windows,
            micro_batch_size=self.engine.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            pin_memory=on_gpu,
        ) as loader:
            trainer = Trainer(config, self.engine, loader, callbacks, progress, self.hosts, self.supervisor, self.rank)
            trainer.fit()
        return "stopped" if trainer.stopping and (not trainer.finished or progress.evaluation_due) else "finished"

    def roll_back(self, progress: Progress, error: RollBackError) -> tuple[Progress, list[Record]]:
        """Load the newest checkpoint; the progress from there, without the window that made the loss jump."""
        self.supervisor.beat("going back to a checkpoint", patient=True)
        resumption = find_resumption(self.config, self.template, resume="auto")
        assert resumption is not None, "has_checkpoint said that there is one"
        self.template = _follow(resumption, self.data, self.template)
        self.load(resumption)
        window = error.window
        back = replace(
            _progress(self.config, resumption),
            rollbacks=progress.rollbacks + 1,
            skipped_samples=[*progress.skipped_samples, (window.start, window.stop)],
        )
        on_rank_0(lambda: run_folder.prepare(self.config, self.data, back.step))
        message = f"back from step {progress.step} to {back.step}, without samples {window.start} to {window.stop - 1}"
        event = {"kind": "event", "step": back.step, "event": "rollback", "message": f"{message}: {error}"}
        return back, [event | {"samples": [window.start, window.stop], "loss": error.loss, "score": error.score}]

    def _open_sinks(self, progress: Progress) -> list[Sink]:
        logging, run_dir = self.config.logging, self.run_dir
        sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl")]
        if logging.wandb:
            resolved = self.config.model_dump(mode="json")
            sinks.append(WandbSink(run_dir, logging.wandb_project, logging.wandb_mode, resolved))
        if logging.tensorboard:
            sinks.append(TensorBoardSink(run_dir, progress.step))
        return [*sinks, ConsoleSink(horizon(self.config, progress).steps, progress.step, self.console)]


def _progress(config: RunConfig, resumption: Resumption | None) -> Progress:
    """Where the run continues; one that is new, or branches off another, is started now, by rank 0's clock."""
    now = on_rank_0(time.time)
    if resumption is None:
        return Progress(started=now)
    manifest = resumption.manifest
    progress = Progress(**{field.name: getattr(manifest, field.name) for field in fields(Progress)})
    if resumption.checkpoint.parent == Path(config.train.run_dir) / "checkpoints":
        return progress
    return replace(progress, started=now, productive_seconds=0.0)


def _follow(resumption: Resumption, data: TrainingData, template: CheckpointManifest) -> CheckpointManifest:
    """Let the data go on as the resumption says; what this run's checkpoints then say of themselves."""
    data.follow(resumption.history)
    return template.model_copy(update={"data": data.history, "schedule": resumption.schedule})


def _describe(config: RunConfig, data: TrainingData, world_size: int) -> CheckpointManifest:
    """What this run's checkpoints say of themselves, at step 0."""
    batches = config.train.batches
    return CheckpointManifest(
        step=0,
        consumed_samples=0,
        consumed_tokens=0,
        world_size=world_size,
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
        global_batch_size=config.train.global_batch_size,
        rampup=(batches.start, batches.increment, batches.samples),
        seed=config.train.seed,
        seq_len=config.seq_len,
        document_mask=config.data.document_mask,
        optimizer=config.optimizer.name,
        no_decay=sorted(config.optimizer.no_decay),
        schedule=Schedule.of(config, horizon(config)),
        sharding=sharding_options(config),
        data=data.history,
        model=config.model.model_dump(),
        versions={
            "megagpt": megagpt.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
    )


def _print_plan(
    console: Console,
    config: RunConfig,
    data: TrainingData,
    device: torch.device,
    micro_batch_size: int,
    accumulation_steps: int,
    length: Horizon,
    resumption: Resumption | None,
) -> None:
    """What is about to happen, before the first slow thing does."""
    cut, model, batches = config.train, config.model, config.train.batches
    anew = f"starts from the weights of {cut.init_from}" if cut.init_from else "starts anew"
    start = f"continues from {resumption.checkpoint.name}" if resumption else anew
    available = sum(dataset.num_tokens for dataset in data.datasets)
    epochs = ", ".join(f"{epochs:.2f}" for epochs in data.epochs(_last_sample(config, length, resumption)).values())
    mflops = flops_per_token(model, config.seq_len) / 1e6
    ramp = f", from {batches.start} sequences on" if batches.samples else ""
    lines = [
        f"run      {cut.run_dir}: {start}, to step {length.steps:,}",
        f"model    {parameter_count(model):,} parameters, {mflops:,.1f} MFLOPs a token forward and backward",
        f"data     {available:,} tokens; the whole run reads {length.tokens:,}, {epochs} epochs",
        f"batch    {cut.global_batch_size} sequences of {config.seq_len} tokens = {micro_batch_size} a micro-batch "
        f"x {accumulation_steps} accumulated x {dist.get_world_size()} ranks{ramp}",
        f"machine  {_device_name(device)} a rank, {cut.precision}, ZeRO stage {config.parallel.zero_stage}",
        *(f"changed  {change}" for change in (resumption.changes if resumption else [])),
    ]
    for line in lines:
        console.print(line)


def _device_name(device: torch.device) -> str:
    """What one rank computes on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} thread(s)"


def _last_sample(config: RunConfig, length: Horizon, resumption: Resumption | None) -> int:
    """Position in the global order at the end of the run."""
    step, consumed = (resumption.manifest.step, resumption.manifest.consumed_samples) if resumption else (0, 0)
    return config.train.batches.after_steps(length.steps - step, consumed)
