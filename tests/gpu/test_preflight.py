"""The pre-flight on a GPU: over NCCL, with what the driver says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def test_a_healthy_gpu_passes_and_is_described(tmp_path: Path):
    output = tmp_path / "preflight.json"
    command = [sys.executable, "-m", "launch.preflight", "train.device=cuda", f"train.run_dir={tmp_path}"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rank = json.loads(output.read_text())["ranks"][0]
    assert rank["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert rank["software"]["NCCL"] != "none"
    assert rank["machine"]["gpus"][0]["driver"]
    assert rank["device_check"]["exact"]
    assert rank["device_check"]["matmul_flops"] > 1e12
