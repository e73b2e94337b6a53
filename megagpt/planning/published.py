"""Published training throughput as runs of the time model: data/published_throughput.csv, one row a printed figure.

What a source prints as TFLOPs or MFU follows its own formula, so only tokens a second count here, and MFU is recomputed
from them by one formula (megagpt.model.counts, every score counted as if unmasked). What a row does not say, but its
project's code or documentation does, stands in SOURCES, with where. A row that still lacks something is left out, for a
reason that is counted.
"""

import csv
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from megagpt.config.schema import ModelConfig
from megagpt.model.counts import flops_per_token
from megagpt.planning.efficiency import Efficiency
from megagpt.planning.layout import Checkpointing, Layout
from megagpt.planning.time import step_time
from megagpt.scaling.devices import Cluster, Device, find_device

FILE = "data/published_throughput.csv"
GBPS = 1e9 / 8
"""Bytes a second of one Gbit/s."""

_SIZES = ("n_layers", "hidden", "heads", "ffn", "vocab", "seq_len")
_LAYOUT = ("n_gpus", "tp", "pp", "cp", "micro_batch", "global_batch_sequences")
_FP8 = re.compile("fp8|fp4")


@dataclass(frozen=True)
class Source:
    """What a project's rows have in common and do not say themselves."""

    pattern: str
    """Found in `source`."""
    project: str
    """Whose software it is."""
    fused: bool
    """Whether element-wise work is fused, by torch.compile, XLA or own kernels; a row's `compile` counts before it."""
    network_gbps: float
    """Of one GPU, in one direction."""
    zero_stage: int
    """Where `dp_sharding` is empty."""
    checkpointing: Checkpointing | None
    """Where `activation_checkpointing` is empty; None: then the row is left out."""
    flash_attention: bool = True
    reduce_bytes: int = 2
    first_flash: bool = False
    """Whether attention is the first FlashAttention (2022)."""
    gpus_per_node: int = 8
    precision: str = "bf16"
    """Where `dtype` is empty or says 16-bit only."""
    model: Mapping[str, Any] | None = None
    """Further fields of the ModelConfig; None: a Llama."""
    why: str = ""
    """Where this is from."""


_LLAMA = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
_GPT = {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True, "tie_embeddings": True}
_MPT = _GPT | {"bias": False}
_NEMOTRON = _LLAMA | {"activation": "gelu", "norm": "layernorm"}
_FOUNDRY = (
    "attn_impl triton in submit_benchmarks.py (first FlashAttention); not compiled; FSDP's precision from the row"
)
_NEMO = "recipes: activation checkpointing null, distributed fused Adam with overlap, use_flash_attention; DGX H100"

# The first whose pattern is found in a row's source wins.
SOURCES = (
    Source("llm-foundry scripts.*A100", "llm-foundry", False, 200, 3, None, first_flash=True, model=_MPT,
           why=f"network from the table's title; {_FOUNDRY}"),
    Source("llm-foundry scripts", "llm-foundry", False, 400, 3, None, first_flash=True, model=_MPT,
           why=f"network not stated, that of a DGX H100 assumed; {_FOUNDRY}"),
    Source("dgxc-benchmarking.*nemotron", "NeMo", True, 400, 1, "none", model=_NEMOTRON,
           why=f"{_NEMO}; squared ReLU, rope, untied head (arXiv 2402.16819)"),
    Source("dgxc-benchmarking.*nemo_megatron", "NeMo", True, 400, 1, "none", model=_GPT, why=_NEMO),
    Source("dgxc-benchmarking.*llama3", "NeMo", True, 400, 1, "none", why=_NEMO),
    Source("dgxc-benchmarking.*maxtext", "MaxText", True, 400, 3, None, why="the remat policy is not stated"),
    Source("dgxc-benchmarking.*paxml", "Paxml", True, 400, 3, None, model=_GPT, why="the remat policy is not stated"),
    Source("NeMo-Framework-Launcher|NVIDIA/NeMo|NVIDIA-NeMo", "NeMo", True, 400, 1, None, why=_NEMO),
    Source("bigscience", "Megatron-DeepSpeed", False, 50, 1, "full", flash_attention=False, model=_GPT,
           why="Jean Zay: four Omni-Path cards of 100 Gbit/s for 8 GPUs; scores in memory"),
    Source("Megatron-LM README Sep 2020", "Megatron-LM", False, 200, 0, "full", flash_attention=False, precision="fp16",
           model=_GPT, why="printed TFLOPs count recomputation, so all blocks were recomputed; DGX A100"),
    Source("Korthikanti", "Megatron-LM", False, 200, 0, None, flash_attention=False, precision="fp16", model=_GPT,
           why="Selene: DGX A100"),
    Source("torchtitan", "torchtitan", False, 400, 3, None, reduce_bytes=4,
           why="network from the rows, of A100 not stated; gradients reduced in fp32 by default"),
    Source("fms-fsdp", "fms-fsdp", True, 100, 3, None, why="network of a node from the rows; bf16 policy"),
    Source("TinyLlama", "TinyLlama", True, 200, 3, None, why="fused kernels from the row; network not stated"),
    Source("llm.c", "llm.c", True, 400, 1, None, model=_GPT, why="CUDA kernels written for this model; one node"),
)  # fmt: skip

_DEVICES = (
    ("GB300", "gb300"), ("GB200", "gb200"), ("B200", "b200"), ("H200", "h200"), ("H100", "h100-sxm"),
    ("A100-40GB", "a100-40gb"), (r"A100 \(DGX", "a100-40gb"), ("A100", "a100-80gb"), ("V100", "v100"),
)  # fmt: skip
"""Found in `gpu` -> row of the devices' table. Megatron-LM's DGX A100 of 2020 had 40 GB."""


@dataclass(frozen=True)
class PublishedRun:
    """One published figure, ready to be predicted."""

    source: str
    project: str
    name: str
    """Of the model, as printed."""
    gpu: str
    """As printed."""
    model: ModelConfig
    layout: Layout
    cluster: Cluster
    first_flash: bool
    """Whether attention is the first FlashAttention."""
    recomputed: float
    """Share of the blocks' forward that backward repeats; layout.checkpointing holds what is whole."""
    tokens_per_second_per_gpu: float
    printed_parameters: float | None
    printed_mfu: float | None
    """A share of the peak that the source uses."""

    @property
    def group(self) -> str:
        """Project and model: runs of a group differ little, so they are fitted or held out together."""
        return f"{self.project}: {re.sub(r' *[(,].*', '', self.name)}"

    @property
    def data_parallel_only(self) -> bool:
        """Whether neither layers nor sequences are split over GPUs."""
        return self.layout.tensor * self.layout.pipeline * self.layout.context == 1

    @property
    def may_be_fitted(self) -> bool:
        """Whether the run is of the kind that the parameters are for: whole layers, a device of the table as sold."""
        return self.layout.tensor * self.layout.pipeline == 1 and "HBM2e" not in self.gpu

    @property
    def step_seconds(self) -> float:
        """As measured: the batch's tokens over the throughput."""
        layout = self.layout
        return layout.global_batch * layout.seq_len / (self.tokens_per_second_per_gpu * layout.gpus)

    @property
    def mfu(self) -> float:
        """Measured, by this project's formula."""
        peak = self.cluster.device.peak_flops(self.layout.precision)
        assert peak, "a run's precision is one that its device knows"
        return self.tokens_per_second_per_gpu * flops_per_token(self.model, self.layout.seq_len) / peak

    def predicted_seconds(self, efficiency: Efficiency) -> float:
        """By the time model; with a part of the blocks recomputed, in between none and all."""
        if self.recomputed in (0.0, 1.0):
            return step_time(self.model, self.layout, self.cluster, efficiency).total
        ends = [step_time(self.model, replace(self.layout, checkpointing=kind), self.cluster, efficiency).total
                for kind in ("none", "full")]  # fmt: skip
        return (1 - self.recomputed) * ends[0] + self.recomputed * ends[1]


class _LeftOut(Exception):  # noqa: N818 - a reason, not an error
    """Why a row cannot be used."""


def load_published() -> tuple[list[PublishedRun], Counter[str]]:
    """The usable rows, and how many were left out for which reason."""
    text = resources.files("megagpt.planning").joinpath(FILE).read_text(encoding="utf-8")
    runs, left_out = [], Counter[str]()
    for row in csv.DictReader(text.splitlines()):
        try:
            runs.append(_normalized(row))
        except _LeftOut as reason:
            left_out[str(reason)] += 1
    return runs, left_out


def _normalized(row: Mapping[str, str]) -> PublishedRun:
    """Raises _LeftOut with the first reason against the row."""
    _refuse_unusable(row)
    source = next((source for source in SOURCES if re.search(source.pattern, row["source"])), None)
    if source is None:
        raise _LeftOut("what the row leaves open is not known of its source")
    numbers = {key: int(float(row[key])) for key in (*_SIZES, *_LAYOUT)}
    model = ModelConfig(
        vocab_size=numbers["vocab"], num_layers=numbers["n_layers"], hidden_size=numbers["hidden"],
        num_attention_heads=numbers["heads"], num_kv_heads=int(float(row["kv_heads"] or numbers["heads"])),
        ffn_hidden_size=numbers["ffn"], max_seq_len=numbers["seq_len"], **(source.model or _LLAMA),
    )  # fmt: skip
    device = _device(row["gpu"])
    layout, recomputed = _layout(row, source, numbers)
    if device.peak_flops(layout.precision) is None:
        layout = replace(layout, precision="fp16")
    replicas = layout.data_parallel
    if replicas * layout.tensor * layout.pipeline * layout.context != layout.gpus or (
        layout.micro_steps * replicas * layout.micro_batch != layout.global_batch
    ):
        raise _LeftOut("layout and batch do not multiply to the GPUs and the global batch")
    return PublishedRun(
        source=row["source"], project=source.project, name=row["model"], gpu=row["gpu"], model=model, layout=layout,
        cluster=Cluster(device, layout.gpus_per_node, _network(row, source)),
        first_flash=source.first_flash, recomputed=recomputed,
        tokens_per_second_per_gpu=float(row["tokens_per_s_per_gpu"]),
        printed_parameters=float(row["params_b"]) * 1e9 if row["params_b"] else None,
        printed_mfu=float(row["mfu_percent"]) / 100 if row["mfu_percent"] else None,
    )  # fmt: skip


def _refuse_unusable(row: Mapping[str, str]) -> None:
    if _FP8.search(row["dtype"]):
        raise _LeftOut("fp8 or fp4 products")
    if "CAUTION" in row["notes"]:
        raise _LeftOut("the printed layout does not multiply to the printed GPU count (CAUTION)")
    if not row["tokens_per_s_per_gpu"]:
        raise _LeftOut("no tokens a second and no step time, only TFLOPs or MFU by the source's formula")
    if not row["gpu"] or "not stated" in row["gpu"]:
        raise _LeftOut("the GPU is not stated")
    if "not a plain GPT" in row["notes"] or "changes the model" in row["notes"]:
        raise _LeftOut("not a plain GPT")
    if missing := {key for key in _SIZES if not row[key]}:
        raise _LeftOut("no vocabulary size" if missing == {"vocab"} else "no model sizes")
    if any(not row[key] for key in _LAYOUT):
        raise _LeftOut("no GPU count, layout, micro-batch or global batch")


def _layout(row: Mapping[str, str], source: Source, numbers: Mapping[str, int]) -> tuple[Layout, float]:
    """The layout, and the share of the blocks that is recomputed."""
    checkpointing, recomputed = _checkpointing(row, source)
    virtual = re.search(r"virtual_pp=([0-9]+)|interleaved schedule, ([0-9]+) chunks", row["notes"])
    fused = row["compile"] in ("yes", "xla") or source.fused
    return Layout(
        gpus=numbers["n_gpus"],
        gpus_per_node=_gpus_per_node(row["gpu"], source),
        micro_batch=numbers["micro_batch"],
        global_batch=numbers["global_batch_sequences"],
        seq_len=numbers["seq_len"],
        zero_stage=_zero_stage(row["dp_sharding"], source),
        shard_gpus=_shard_gpus(row, source),
        checkpointing=checkpointing,
        precision="fp16" if "fp16" in row["dtype"] or source.precision == "fp16" else "bf16",
        compile=fused,
        tensor=numbers["tp"],
        pipeline=numbers["pp"],
        context=numbers["cp"],
        virtual_pipeline=int(virtual[1] or virtual[2]) if virtual and numbers["pp"] > 1 else 1,
        flash_attention=source.flash_attention,
        reduce_bytes=4 if "fsdp_mixed_precision=DEFAULT" in row["notes"] else source.reduce_bytes,
    ), recomputed


def _checkpointing(row: Mapping[str, str], source: Source) -> tuple[Checkpointing, float]:
    """What is recomputed, and which share of the blocks.

    `selective` is attention's scores with Korthikanti et al.; of torchtitan's `op` mode it is every second matrix
    product, with fms-fsdp whole blocks, as many as HFU over MFU says.
    """
    kind: str | None = row["activation_checkpointing"] or source.checkpointing
    if kind is None:
        raise _LeftOut("activation checkpointing is not stated")
    if kind == "full":
        return "full", 1.0
    if kind == "none":
        return "none", 0.0
    if not source.flash_attention:
        return "selective", 0.0
    if source.project == "torchtitan":
        return "none", 0.5
    hfu = re.search(r"hfu_percent=([0-9.]+)", row["notes"])
    if not hfu or not row["mfu_percent"]:
        raise _LeftOut("what selective activation checkpointing recomputes is not stated")
    share = min(1.0, 3 * (float(hfu[1]) / float(row["mfu_percent"]) - 1))
    return ("full" if share == 1.0 else "none"), share


def _zero_stage(sharding: str, source: Source) -> int:
    if not sharding:
        return source.zero_stage
    if sharding.startswith("none"):
        return 0
    for pattern, stage in (("zero2|shard_grad_op", 2), ("zero1|dist-opt", 1), ("ddp|zero0", 0), ("fsdp|zero3|hsdp", 3)):
        if re.search(pattern, sharding):
            return stage
    raise _LeftOut("how data-parallel ranks share the weights is not known")


def _shard_gpus(row: Mapping[str, str], source: Source) -> int | None:
    """FSDP's sharding group: of HSDP a node, else as the row says, else all."""
    if row["dp_sharding"] == "hsdp":
        return source.gpus_per_node
    way = re.search(r"\(([0-9]+)-way\)|fsdp ([0-9]+)-way|full shard \(([0-9]+)\)", row["dp_sharding"])
    return int(next(filter(None, way.groups()))) if way else None


def _device(gpu: str) -> Device:
    for pattern, name in _DEVICES:
        if re.search(pattern, gpu):
            device = find_device(name)
            if "HBM2e" in gpu:
                return replace(device, name="H100 HBM2e, 500 W", memory_bandwidth=2.4e12)
            return device
    raise _LeftOut("the GPU is not stated")


def _gpus_per_node(gpu: str, source: Source) -> int:
    """GPUs within reach of NVLink."""
    if "GB200" in gpu or "GB300" in gpu:
        return 72
    return 16 if "DGX-2" in gpu else source.gpus_per_node


def _network(row: Mapping[str, str], source: Source) -> float:
    """Bytes a second of a GPU; fms-fsdp prints that of a node."""
    printed = re.search(r"network ([0-9]+) Gbps as printed", row["notes"])
    if printed:
        return float(printed[1]) * GBPS / source.gpus_per_node
    if source.project == "torchtitan" and "A100" in row["gpu"]:
        return 200 * GBPS
    return 50 * GBPS if "DGX-2" in row["gpu"] else source.network_gbps * GBPS
