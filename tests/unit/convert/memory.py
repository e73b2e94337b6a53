"""Measure what a conversion takes at its peak: `python -m tests.unit.convert.memory FOLDER --max-shard-size 1GB`.

Makes a run folder of a Llama with random weights in FOLDER (4.4 GB with 22 --layers, which takes as much memory), then
converts it in a process of its own that reports its largest resident set (VmHWM) and how much of it the imports took,
and removes both. Other options go to tools.convert.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from megagpt.config import ModelConfig
from tests.unit.inference.runs import write_run

MEASURED = """
import re, runpy, pathlib
def say(what):
    status = pathlib.Path("/proc/self/status").read_text()
    print(what, round(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024 / 1e9, 3), "GB", flush=True)
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import megagpt.convert
say("peak of the imports:")
try:
    runpy.run_module("tools.convert", run_name="__main__", alter_sys=True)
finally:
    say("peak of the process:")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    given, options = parser.parse_known_args()  # others are for tools.convert
    model = ModelConfig(
        vocab_size=32000,
        num_layers=given.layers,
        hidden_size=2048,
        num_attention_heads=32,
        num_kv_heads=4,
        ffn_hidden_size=5632,
        max_seq_len=2048,
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )
    run, target = given.folder / "run", given.folder / "converted"
    try:
        if not run.exists():
            gpt = write_run(run, 1, model=model)
            sizes = [parameter.nbytes for parameter in gpt.parameters()]
            layer = sum(parameter.nbytes for parameter in gpt.blocks[0].parameters())
            print(f"weights {sum(sizes) / 1e9:.2f} GB, largest tensor {max(sizes) / 1e9:.3f}, layer {layer / 1e9:.3f}")
            del gpt
        command = [sys.executable, "-c", MEASURED, str(run), str(target), "--to", "hf", *options]
        subprocess.run(command, check=True)
        files = sorted(path.stat().st_size for path in target.glob("*.safetensors"))
        print(f"{len(files)} files, the largest {files[-1] / 1e9:.3f} GB")
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
