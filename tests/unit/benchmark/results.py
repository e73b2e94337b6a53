"""Results as the benchmarks leave them, with numbers that can be found again."""

import json
from pathlib import Path
from typing import Any

from megagpt.benchmark.suite import CPU, GPU, Entry

MACHINE: dict[str, Any] = {
    "processor": "Abacus 9000",
    "matrix_flags": ["amx_bf16"],
    "cpus": 4,
    "threads": 4,
    "memory_gib": 33,
    "gpus": [],
    "driver": None,
    "cuda": None,
    "versions": {"python": "3.12.1", "torch": "2.9.9"},
    "rates": {"cpu": {"bf16_gflops": 321.0, "read_gb_per_second": 43.0}},
}


def judged(name: str, value: float, target: float, at_least: bool = False, unit: str = "s") -> dict[str, Any]:
    met = value >= target if at_least else value <= target
    spread = {"min": value * 0.5, "max": value * 2, "unit": unit, "scale": 1.0}
    return {"name": name, "value": value, **spread, "target": target, "at_least": at_least, "met": met}


def ratio(median: float) -> dict[str, float]:
    return {"median": median, "min": median - 0.25, "max": median + 0.25}


_STEP_SECONDS = {"megagpt": 2.0, "plain": 3.0, "nanogpt": 10.0, "nanogpt, compiled": 2.5}


def _train() -> dict[str, Any]:
    seconds = _STEP_SECONDS
    return {
        "ranks": 1,
        "steps": 7,
        "num_layers": 6,
        "tokens_per_step": 8192,
        "tokens_per_micro_batch": 4096,
        "precision": "bf16",
        "first_step_seconds": seconds,
        "step_seconds": seconds,
        "tokens_per_second": {name: 8192 / one for name, one in seconds.items()},
        "model_flops_per_second": 1e12,
        "mfu": None,
        "step_bytes": None,
        "parts_seconds": {"matrix products": 1.25, "AdamW": 0.75},
        "speedup_over": {name: ratio(one / 2) for name, one in seconds.items() if name != "megagpt"},
    }


def _generate() -> dict[str, Any]:
    return {
        "read_bytes_per_second": 25e9,
        "prompt_tokens": 16,
        "new_tokens": 128,
        "temperature": 0.0,
        "top_k": None,
        "dtype": "bfloat16",
        "results": [
            {
                "model": "small",
                "rows": rows,
                "tokens_per_second": {"megagpt": 361.0, "transformers": 111.0},
                "speedup_over": {"transformers": ratio(speedup)},
                "share_of_bandwidth": 0.61,
                "first_call_seconds": 17.0,
            }
            for rows, speedup in ((1, 3.5), (8, 1.5))
        ],
    }


def _loss() -> dict[str, Any]:
    return {
        "tokens": 1024,
        "seconds": {"megagpt": 0.7, "full logits, compiled": 0.9},
        "peak_bytes": {"megagpt": None, "full logits, compiled": 9e6},
        "speedup_over": {"full logits, compiled": ratio(1.3)},
    }


def _corpus() -> dict[str, Any]:
    rates = {"dedup, 1 workers": 10.0, "dedup, 2 workers": 19.0}
    return {
        "signatures": {"documents": 9, "documents_per_second": {"megagpt": 6543.0, "datasketch": 1.0}, "ratio": 4.4},
        "bands": {"documents": 100, "seconds": [1.0, 2.0], "documents_per_second": 66.0},
        "dedup": {
            "megabytes": 100.0,
            "documents": 1000,
            "megabytes_per_second": {"megagpt, 2 workers": 5.5},
            "all_seconds": {"megagpt, 2 workers": [18.0, 19.0]},
            "peak_bytes": {"megagpt, 2 workers": 141e6},
            "removed": {"megagpt, 2 workers": 77},
            "speedup_over": {"datatrove": {"version": "0.1", "contender": "megagpt, 2 workers", **ratio(23.0)}},
        },
        "pipeline": {
            "megabytes_per_second": rates,
            "megabytes": 100.0,
            "all_seconds": {name: [100 / (rate - 1), 100 / (rate + 1)] for name, rate in rates.items()},
            "stage_scaling": {"dedup": {"extract": 1.7, "clusters": 1.1}},
            "scaling": {"dedup": 1.9},
        },
        "linear": {
            "workers": 2,
            "megabytes": [1.0, 10.0],
            "seconds": [1.23, 4.5],
            "ideal_seconds": [0.45, 4.5],
            "stage_seconds": {"extract": [1.0, 4.0], "other": [0.23, 0.5]},
            "peak_bytes": [141e6, 151e6],
        },
    }


def _growth() -> dict[str, Any]:
    points = [
        {
            "size": size,
            "flops": size * 10,
            "step_seconds": seconds,
            "ideal_seconds": float(size),
            "parts_seconds": {"matrix products": size * 0.5e-14, "AdamW": 1e-14},
        }
        for size, seconds in ((1, 1.5), (2, 2.0), (4, 4.0), (8, 8.0))
    ]
    return {"axes": dict.fromkeys(("sequence length", "depth", "width", "batch"), points)}


def _data() -> dict[str, Any]:
    return {
        "seq_len": 1024,
        "tokens": 10**10,
        "documents": 10**7,
        "loader": {"ratio": ratio(1.32), "rate": judged("loader, one core", 91.0, 20.0, True, "million tokens/s")},
        "blend": {"seconds": judged("start of a blend", 2.5, 2.0)},
    }


def _start() -> dict[str, Any]:
    return {
        name: {"seconds": judged(f"{name} start", seconds, 40.0), "parts": {"data": 1.5, "first step": seconds - 1.5}}
        for name, seconds in (("cold", 31.0), ("warm", 7.5))
    }


def _checkpoint() -> dict[str, Any]:
    return {
        "parameters": 87_900_000,
        "ranks": 2,
        "zero_stage": 1,
        "bytes": 1_230_000_000,
        "stall": {
            "ratio": judged("stall of an asynchronous save", 0.13, 0.2),
            "seconds": 0.16,
            "synchronous_seconds": 1.26,
            "first_seconds": 0.57,
        },
    }


RESULTS = {
    "train": _train,
    "generate": _generate,
    "loss": _loss,
    "corpus": _corpus,
    "growth": _growth,
    "data": _data,
    "start": _start,
    "checkpoint": _checkpoint,
}


def measurement(entry: Entry, **changes: Any) -> dict[str, Any]:
    """Of an entry of the suite; what no function above knows has one judged figure. changes: of its head."""
    benchmark = entry.words.split()[0]
    make = RESULTS.get(benchmark, lambda: {"figure": judged("something else", 5.0, 6.0)})
    head = {
        "benchmark": benchmark,
        "command": f"python -m tools.benchmark {benchmark} --of {entry.name}",
        "date": "2026-03-04T05:06:07+00:00",
        "revision": {"commit": "abc1234", "changed": False},
        "machine": MACHINE,
    }
    on_gpu = {"mfu": 0.53, "parts_seconds": None, "step_bytes": dict.fromkeys(_STEP_SECONDS, 123.25 * 4096000.0)}
    return {**head, **make(), **(on_gpu if entry in GPU and benchmark == "train" else {}), **changes}


def write_all(folder: Path) -> None:
    """A result of each measurement of the suite."""
    folder.mkdir(parents=True)
    for entry in (*CPU, *GPU):
        (folder / f"{entry.name}.json").write_text(json.dumps(measurement(entry)))
