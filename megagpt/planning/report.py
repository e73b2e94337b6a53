"""A plan as text for a terminal, as JSON, and as one page that needs nothing else."""

import base64
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from megagpt.data.atomic import replace_file
from megagpt.errors import UserError
from megagpt.planning.layout import Layout
from megagpt.planning.memory import FRAGMENTATION, OUTSIDE_ALLOCATOR_BYTES
from megagpt.planning.pictures import draw_curves, draw_memory, draw_time
from megagpt.planning.plan import Plan, usable_micro_batch
from megagpt.planning.search import CurvePoint, Option
from megagpt.planning.units import duration_text, size_text
from megagpt.training.plots import compact

SHOWN_OPTIONS = 12
PIXELS_A_REM = 28
UNKNOWN = "–"

MEMORY_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (fp32 weights, moments)",
    "attention": "activations: attention",
    "feedforward": "activations: feed-forward",
    "norms": "activations: norms",
    "embedding": "activations: embedding",
    "checkpoints": "activations: checkpoints",
    "loss": "logits and loss",
    "gathered": "gathered weights (ZeRO-3)",
    "buckets": "buckets of gradients",
    "backward": "gradients inside a block",
}
TIME_NAMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "norms, activations, sums",
    "loss": "output head and loss",
    "recompute": "activation checkpointing",
    "optimizer": "optimizer",
    "gradient_reduction": "gradient reduction, not hidden",
    "weight_gather": "weight all-gathers, not hidden",
    "offload": "offload",
}


@dataclass(frozen=True)
class Study:
    """What one command has planned."""

    source: str
    """The configuration's file."""
    plan: Plan
    options: list[Option] | None = None
    """Of a search, the fastest first."""
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)
    """By kind, strong and weak."""


Section = tuple[str, list[tuple[str, str]]]
"""A title, and names with values."""


def sections(plan: Plan) -> list[Section]:
    """The plan as tables of two columns."""
    return [
        ("Model", _model(plan)),
        ("Memory of a GPU", _memory(plan)),
        ("Time of a step", _time(plan)),
        ("The run", _run(plan)),
    ]


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    device, total = plan.machine.cluster.device, size_text(plan.memory.total)
    has = f"{total} of {size_text(device.memory_bytes)} ({100 * plan.memory.total / device.memory_bytes:.0f} %)"
    usable = usable_micro_batch(plan)
    if plan.largest_micro_batch == 0:
        return f"does not fit: {has}, and no micro-batch would; --search finds layouts that do"
    largest = f"largest micro-batch that fits: {plan.largest_micro_batch}"
    if usable is not None and usable != plan.largest_micro_batch:
        largest += f" (and divides the batch: {usable})"
    return f"{'fits' if plan.fits else 'does not fit'}: {has}; {largest}"


def layout_text(plan: Plan) -> str:
    """How the run is laid out, in a line."""
    layout = plan.layout
    words = [
        f"{layout.gpus:,} x {plan.machine.cluster.device.name} in {-(-layout.gpus // layout.gpus_per_node):,} nodes",
        f"ZeRO {layout.zero_stage}",
        layout.precision,
        f"{layout.global_batch:,} sequences of {layout.seq_len:,} tokens a step",
        f"micro-batch {layout.micro_batch} x {layout.micro_steps} accumulated",
    ]
    if layout.checkpointing == "full":
        every = layout.checkpointing_every
        words.append(f"activation checkpointing{f' of one block in {every}' if every > 1 else ''}")
    offloaded = [name for name in ("optimizer", "parameters") if getattr(layout, f"offload_{name}")]
    if offloaded:
        words.append(f"{' and '.join(offloaded)} offloaded")
    if layout.shard_gpus:
        words.append(f"weights copied in groups of {layout.shard_gpus}")
    return ", ".join(words)


OPTION_COLUMNS = ("ZeRO", "micro-batch", "checkpointing", "offload", "group", "memory", "step", "tokens/s", "MFU")


def option_rows(options: Sequence[Option]) -> list[list[str]]:
    """The first ones as a table of OPTION_COLUMNS."""
    return [
        [
            str(option.layout.zero_stage),
            str(option.layout.micro_batch),
            _checkpointing_text(option.layout),
            " + ".join(name for name in ("optimizer", "parameters") if getattr(option.layout, f"offload_{name}"))
            or "no",
            str(option.layout.shard_gpus or "all"),
            size_text(option.memory.total),
            duration_text(option.time.total),
            compact(option.time.tokens_per_second_per_gpu * option.layout.gpus),
            _percent(option.time.mfu),
        ]
        for option in options[:SHOWN_OPTIONS]
    ]


CURVE_COLUMNS = ("GPUs", "batch", "micro-batch", "step", "tokens/s", "efficiency", "MFU", "")


def curve_rows(points: Sequence[CurvePoint]) -> list[list[str]]:
    """A curve as a table of CURVE_COLUMNS; a point without a time says why."""
    rows, base = [], next((point for point in points if point.time), None)
    for point in points:
        if point.time is None or point.layout is None or base is None or base.time is None:
            rows.append([f"{point.gpus:,}", *[UNKNOWN] * 6, point.problem or ""])
            continue
        efficiency = point.time.tokens_per_second_per_gpu / base.time.tokens_per_second_per_gpu
        rows.append([
            f"{point.gpus:,}", f"{point.layout.global_batch:,}", str(point.layout.micro_batch),
            duration_text(point.time.total), compact(point.time.tokens_per_second_per_gpu * point.gpus),
            _percent(efficiency), _percent(point.time.mfu), "",
        ])  # fmt: skip
    return rows


def as_json(study: Study) -> dict[str, Any]:
    """Everything, in bytes, seconds and shares of 1."""
    plan = study.plan
    return {
        "source": study.source,
        "device": plan.machine.cluster.device.name,
        "layout": asdict(plan.layout),
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "flops_per_token_without_attention": plan.flops_per_token_without_attention,
        "memory_bytes": {**plan.memory.parts, "peak": plan.memory.peak, "moment": plan.memory.moment,
                         "margin": plan.memory.margin, "total": plan.memory.total, "host": plan.memory.host,
                         "device": plan.machine.cluster.device.memory_bytes},
        "fits": plan.fits,
        "largest_micro_batch": plan.largest_micro_batch,
        "step_seconds": {**plan.time.parts, "total": plan.time.total},
        "tokens_per_step": plan.time.tokens_per_step,
        "tokens_per_second": plan.time.tokens_per_second_per_gpu * plan.layout.gpus,
        "tokens_per_second_per_gpu": plan.time.tokens_per_second_per_gpu,
        "mfu": plan.time.mfu,
        "tokens": plan.circumstances.tokens,
        "steps": plan.steps,
        "training_seconds": plan.training_seconds,
        "seconds": plan.seconds if plan.reliability.goodput else None,
        "cost": plan.cost if plan.reliability.goodput else None,
        "checkpoint": asdict(plan.checkpoint),
        "reliability": {**asdict(plan.reliability), "failures": _failures(plan) if plan.reliability.goodput else None},
        "options": None if study.options is None else [_option_json(option) for option in study.options],
        "curves": {kind: [_point_json(point) for point in points] for kind, points in study.curves.items()},
    }  # fmt: skip


def write_json(study: Study, path: Path) -> None:
    """Raises UserError if it cannot be written."""
    _write(path, json.dumps(as_json(study), indent=1) + "\n")


def write_html(study: Study, path: Path) -> None:
    """One page with its pictures inside. Raises UserError if it cannot be written."""
    source = importlib.resources.files(__package__).joinpath("plan.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    environment.filters["width"] = lambda png: int.from_bytes(png[16:20]) / PIXELS_A_REM
    plan = study.plan
    pictures = [draw_memory(plan, MEMORY_NAMES), draw_time(plan, TIME_NAMES)]
    if study.curves:
        pictures.append(draw_curves(study.curves))
    page = environment.from_string(source).render(
        source=study.source,
        layout=layout_text(plan),
        verdict=verdict(plan),
        sections=sections(plan),
        pictures=pictures,
        options=None if study.options is None else option_rows(study.options),
        option_columns=OPTION_COLUMNS,
        commands=[" ".join(option.overrides) for option in (study.options or [])[:SHOWN_OPTIONS]],
        curves={kind: curve_rows(points) for kind, points in study.curves.items()},
        curve_columns=CURVE_COLUMNS,
        margin=f"{size_text(OUTSIDE_ALLOCATOR_BYTES)} and {100 * FRAGMENTATION:.0f} % of the peak",
        device_source=plan.machine.cluster.device.source,
    )
    _write(path, page)


def _model(plan: Plan) -> list[tuple[str, str]]:
    return [
        ("parameters", f"{plan.parameters:,}"),
        ("FLOPs a token, with attention", compact(plan.flops_per_token, ("", "k", "M", "G", "T"))),
        ("FLOPs a token, without", compact(plan.flops_per_token_without_attention, ("", "k", "M", "G", "T"))),
    ]


def _memory(plan: Plan) -> list[tuple[str, str]]:
    rows = [(MEMORY_NAMES[name], size_text(size)) for name, size in plan.memory.parts.items() if size]
    rows.append((f"peak ({plan.memory.moment}; not all parts at once)", size_text(plan.memory.peak)))
    rows.append(("margin: fragmentation, CUDA, NCCL", size_text(plan.memory.margin)))
    rows.append(("total", size_text(plan.memory.total)))
    if plan.memory.host:
        rows.append(("host memory, a GPU", size_text(plan.memory.host)))
    return rows


def _time(plan: Plan) -> list[tuple[str, str]]:
    rows = [(TIME_NAMES.get(name, name), duration_text(part)) for name, part in plan.time.parts.items() if part]
    rate = plan.time.tokens_per_second_per_gpu
    rows.append(("step", duration_text(plan.time.total)))
    rows.append(("tokens/s", f"{compact(rate * plan.layout.gpus)} ({compact(rate)} a GPU)"))
    rows.append(("MFU", _percent(plan.time.mfu)))
    return rows


def _run(plan: Plan) -> list[tuple[str, str]]:
    kept, checkpoint = plan.reliability, plan.checkpoint
    rows = [
        ("tokens", compact(plan.circumstances.tokens)),
        ("steps", f"{plan.steps:,}"),
        ("training", duration_text(plan.training_seconds)),
        ("checkpoint", f"{size_text(checkpoint.size)}, written in {duration_text(checkpoint.write_seconds)}, "
                       f"stalls {duration_text(checkpoint.stall_seconds)}"),
        ("between failures of the job", duration_text(kept.mtbf_seconds)),
        ("best time between checkpoints", f"{duration_text(kept.interval_seconds)}, "
                                          f"{max(1, round(kept.interval_seconds / plan.time.total)):,} steps"),
        ("failures to expect", f"{_failures(plan):.3g}" if kept.goodput else "it never ends"),
        ("goodput", f"{100 * kept.goodput:.4g} %"),
        ("in all", duration_text(plan.seconds)),
    ]  # fmt: skip
    if plan.cost is not None:
        hours = plan.seconds / 3600 * plan.layout.gpus
        rows.append(("cost", f"{plan.cost:,.0f} for {hours:,.0f} GPU hours" if kept.goodput else "without end"))
    return rows


def _failures(plan: Plan) -> float:
    return plan.reliability.failures(plan.training_seconds)


def _checkpointing_text(layout: Layout) -> str:
    if layout.checkpointing != "full":
        return "no"
    return "yes" if layout.checkpointing_every == 1 else f"1 in {layout.checkpointing_every}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.3g} %"


def _option_json(option: Option) -> dict[str, Any]:
    return {
        "overrides": option.overrides,
        "memory_bytes": option.memory.total,
        "step_seconds": option.time.total,
        "tokens_per_second_per_gpu": option.time.tokens_per_second_per_gpu,
        "mfu": option.time.mfu,
    }


def _point_json(point: CurvePoint) -> dict[str, Any]:
    if point.time is None or point.layout is None:
        return {"gpus": point.gpus, "problem": point.problem}
    return {
        "gpus": point.gpus,
        "global_batch": point.layout.global_batch,
        "micro_batch": point.layout.micro_batch,
        "step_seconds": point.time.total,
        "tokens_per_second": point.time.tokens_per_second_per_gpu * point.gpus,
        "mfu": point.time.mfu,
    }


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
