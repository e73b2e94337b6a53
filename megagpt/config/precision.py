"""Which number formats a device can train in; what only the machine can tell is given by the caller."""

from megagpt.errors import ConfigError


def check_precision(precision: str, device: str, *, bf16_supported: bool = True) -> None:
    """Raise ConfigError if `device` ("cuda" or "cpu", already resolved) cannot train in `precision`.

    `bf16_supported` matters on GPUs only: `torch.cuda.is_bf16_supported(including_emulation=False)`.
    """
    if precision == "fp16" and device == "cpu":
        raise ConfigError("train.precision: fp16 needs a GPU, and this run is on a CPU; choose bf16 or fp32")
    if precision == "bf16" and device == "cuda" and not bf16_supported:
        raise ConfigError(
            "train.precision: bf16 needs a GPU that computes in it (Ampere or newer); choose fp16 or fp32"
        )
