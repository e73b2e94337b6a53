"""What torch.compile, and DeepSpeed's extension of it, need of a machine."""

import shutil
import sysconfig
from pathlib import Path

import torch
import torch._inductor.config
import torch.utils.cpp_extension


def missing_for_compile() -> str | None:
    """What torch.compile lacks on this machine to build kernels, on CPU and GPU alike; None if nothing."""
    compilers = [name for name in torch._inductor.config.cpp.cxx if name]
    if not any(shutil.which(name) for name in compilers):
        return f"a C++ compiler ({' or '.join(compilers)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Python.h; the package python3-dev on Debian and Ubuntu)"
    return None


def missing_for_deepcompile(device: torch.device) -> str | None:
    """What DeepCompile lacks to train on `device`; None if nothing. It builds an extension against CUDA's headers."""
    if device.type != "cuda":
        return "an NVIDIA GPU"
    if torch.utils.cpp_extension.CUDA_HOME is None:
        return "the CUDA toolkit (CUDA_HOME, or nvcc in PATH)"
    return missing_for_compile()
