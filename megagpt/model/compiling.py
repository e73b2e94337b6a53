"""What torch.compile needs of a machine."""

import shutil
import sysconfig
from pathlib import Path

import torch._inductor.config


def missing_for_compile() -> str | None:
    """What torch.compile lacks on this machine to build kernels, on CPU and GPU alike; None if nothing."""
    compilers = [name for name in torch._inductor.config.cpp.cxx if name]
    if not any(shutil.which(name) for name in compilers):
        return f"a C++ compiler ({' or '.join(compilers)})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Python.h; the package python3-dev on Debian and Ubuntu)"
    return None
