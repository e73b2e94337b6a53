"""Elastic resume: when a checkpoint must be converted, by whom, and how its universal form gets into a live engine.

DeepSpeed's optimizers are loaded as at an ordinary resume, by `load_state_dict`; only the flat tensors that they are
given are cut out of the universal form here, each rank reading its own elements. DeepSpeed's own ds_to_universal and
load_universal (0.19) know stages 1 and 2 and stage 3, but no way between them, nor stage 0, nor at stage 3 other state
than Adam's; and at stage 3 they give every optimizer group the weight decay of the first.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megagpt.config.schema import RunConfig
from megagpt.errors import UserError
from megagpt.training.checkpoint import CheckpointManifest
from megagpt.training.collective import first_answer, on_rank_0, together
from megagpt.training.shards import MASTER_WEIGHT, Layout, State, is_cut, layout_of_cuts, layout_of_flat_groups
from megagpt.training.universal import (
    Parameter,
    damage_of_form,
    is_form_of,
    read_universal,
    remove_universal_forms,
    universal_form,
    verify_universal,
)

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(days=7)  # a conversion takes as long as the disk needs; a rank that dies is noticed at once
_SECONDS_BETWEEN_LINES = 10.0


def needs_conversion(manifest: CheckpointManifest, config: RunConfig, world_size: int) -> bool:
    """Whether DeepSpeed cannot load the shards as they are: they are cut or typed otherwise than this run's."""
    then = (manifest.world_size, manifest.zero_stage, manifest.precision, manifest.sharding)
    return then != (world_size, config.parallel.zero_stage, config.train.precision, sharding_options(config))


def sharding_options(config: RunConfig) -> dict[str, Any]:
    """The raw DeepSpeed options that may decide how weights and optimizer state are cut into shards."""
    options = config.deepspeed.get("zero_optimization", {})
    return options if isinstance(options, dict) else {}


def convert_together(checkpoint: Path, folder: Path, console: Console) -> Path:
    """The universal form of `checkpoint` inside `folder` (run_dir/checkpoints), verified; every rank calls it.

    checkpoint: verified already. Rank 0 converts it, showing progress on `console`, the others wait, however long; then
    all share the reading of the form. What an earlier start has converted is used again if it is whole. Raises
    AgreedError.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    final = folder / f".universal_{checkpoint.name}"
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        is_there = on_rank_0(lambda: is_form_of(final, checkpoint), patient)
        if is_there and (problem := first_answer(damage_of_form(final, rank, world_size), patient)):
            is_there = False
            if rank == 0:
                logger.warning("making %s anew: %s", final, problem)
                remove_universal_forms(folder)
        if not is_there:
            if rank > 0:
                logger.info("waiting for rank 0, which converts %s to universal form", checkpoint)
            on_rank_0(lambda: _convert(checkpoint, folder, console), patient)
            together(lambda: verify_universal(final, rank, world_size), patient)
    finally:
        dist.destroy_process_group(patient)
    return final


def load_universal(engine: Any, form: Path) -> None:
    """Give a fresh DeepSpeed engine the weights and optimizer state of a universal form; every rank calls it.

    Optimizer settings (lr, betas, ...) stay the engine's. Raises UserError if the form is not of this model.
    """
    manifest = read_universal(form)
    stage = engine.zero_optimization_stage()
    with torch.no_grad():
        if stage == 0:
            _load_whole(engine, form)
        elif stage == 3:
            _load_cut_parameters(engine, form)
        else:
            _load_flat_groups(engine, form)
    if manifest.loss_scale is not None and engine.fp16_enabled():
        engine.optimizer.loss_scaler.cur_scale = manifest.loss_scale
    if manifest.loss_scale is not None and (scaler := engine.torch_autocast_z0_gradscaler):
        scaler.load_state_dict(scaler.state_dict() | {"scale": manifest.loss_scale})
    engine.global_steps, engine.global_samples = manifest.step, manifest.consumed_samples
    engine.skipped_steps = manifest.skipped_steps


def _load_whole(engine: Any, form: Path) -> None:
    """Stage 0: every rank has all."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    states = {}
    for number, parameter in enumerate(parameters):
        state = _checked_state(form, names[parameter], parameter.shape)
        parameter.copy_(state.pop(MASTER_WEIGHT))
        if state:
            states[number] = {key: value.clone() if is_cut(value) else value for key, value in state.items()}
    engine.optimizer.load_state_dict(engine.optimizer.state_dict() | {"state": states})


def _load_flat_groups(engine: Any, form: Path) -> None:
    """Stages 1 and 2, bf16 at stage 1 included, which is another class of DeepSpeed's: groups cut among the ranks."""
    optimizer = engine.optimizer
    saved = optimizer.state_dict()
    lengths = [parameter.numel() for group in optimizer.param_groups for parameter in group["params"]]
    layout = layout_of_flat_groups(_shapes(engine), lengths, saved.get("param_alignment_paddings"))
    flats = together(lambda: _flat_tensors(layout, lengths, _shapes(engine), form))
    saved["single_partition_of_fp32_groups"] = [flat.pop(MASTER_WEIGHT) for flat in flats]
    saved["base_optimizer_state"] = optimizer.optimizer.state_dict() | {"state": _numbered(flats)}
    optimizer.load_state_dict([saved] * dist.get_world_size(), load_optimizer_states=True, load_from_fp32_weights=True)
    optimizer.update_lp_params()


def _load_cut_parameters(engine: Any, form: Path) -> None:
    """Stage 3: every parameter cut among the ranks."""
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()  # as DeepSpeed does around its own loading: no weight may be gathered
    saved = optimizer.state_dict()
    lengths = [flat.numel() for flat in saved["fp32_flat_groups"]]
    layout = layout_of_cuts(_shapes(engine), dist.get_world_size())
    flats = together(lambda: _flat_tensors(layout, lengths, _shapes(engine), form))
    saved["fp32_flat_groups"] = [flat.pop(MASTER_WEIGHT) for flat in flats]
    saved["optimizer_state_dict"]["state"] = _numbered(flats)
    optimizer.load_state_dict([saved] * dist.get_world_size())
    optimizer.checkpoint_event_epilogue()


def _shapes(engine: Any) -> list[dict[str, torch.Size]]:
    """The parameters of each flat tensor in their order: what DeepSpeed writes into its files as param_shapes."""
    return engine._get_zero_param_shapes()


def _flat_tensors(
    layout: Layout, lengths: Sequence[int], groups: Sequence[Mapping[str, torch.Size]], form: Path
) -> list[State]:
    """This rank's flat tensors of the given lengths, "fp32" and the optimizer's, on the CPU; padding is zero."""
    flats: list[State] = [{MASTER_WEIGHT: torch.zeros(length)} for length in lengths]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    begun: set[int] = set()
    for name, pieces in layout.items():
        for piece in pieces:
            if piece.rank != dist.get_rank():
                continue
            flat, state = flats[piece.flat], _checked_state(form, name, shapes[name])
            if piece.flat not in begun:
                begun.add(piece.flat)
                flat.update(
                    (key, torch.zeros(lengths[piece.flat], dtype=value.dtype) if is_cut(value) else value)
                    for key, value in state.items()
                )
            if flat.keys() != state.keys():
                raise _not_alike(form, name)
            for key, value in state.items():
                target = flat[key]
                if is_cut(value) and is_cut(target):
                    part = value.flatten()[piece.offset : piece.offset + piece.length]
                    target[piece.start : piece.start + piece.length] = part
                elif is_cut(value) or is_cut(target) or target != value:
                    raise _not_alike(form, name)
    return flats


def _checked_state(form: Path, name: str, shape: torch.Size) -> State:
    """What the form has of a parameter; raises UserError if its tensors do not have this shape."""
    state = Parameter(form, name).state()
    for key, value in state.items():
        if is_cut(value) and value.shape != shape:
            raise UserError(f"{form}: {key} of {name} has shape {tuple(value.shape)}, the model's is {tuple(shape)}")
    # Scalars are counters that the optimizer raises in place: they must not live in the file's memory.
    return {
        key: value if is_cut(value) or not torch.is_tensor(value) else value.clone() for key, value in state.items()
    }


def _not_alike(form: Path, name: str) -> UserError:
    return UserError(
        f"{form}: the optimizer's state of {name} is not at the same step as that of other parameters, which a ZeRO "
        "stage above 0 needs; continue with parallel.zero_stage=0"
    )


def _numbered(flats: Sequence[State]) -> dict[int, State]:
    """The optimizer's state by the number of the flat tensor; before its first step it has none."""
    return {number: flat for number, flat in enumerate(flats) if flat}


def _convert(checkpoint: Path, folder: Path, console: Console) -> None:
    started = time.monotonic()
    with _progress(console, f"converting {checkpoint.name} to universal form") as report:
        form = universal_form(checkpoint, folder, report)
    size = sum(record.size for record in read_universal(form).files.values()) / 1e9
    seconds = time.monotonic() - started
    console.print(f"converted {checkpoint} to universal form: {size:.2f} GB in {seconds:.1f} s")


@contextmanager
def _progress(console: Console, what: str) -> Iterator[Callable[[float], None]]:
    """What takes the finished fraction and shows it: a bar on a terminal, else a line every ten seconds."""
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=1.0)
            yield lambda fraction: progress.update(task, completed=fraction)
        return
    started = last = time.monotonic()
    console.print(what)

    def report(fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) * (1 / fraction - 1)
            console.print(f"{what}: {fraction:.0%}, {left:.0f} s left")

    yield report
