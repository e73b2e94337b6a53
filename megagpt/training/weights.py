"""fp32 master weights out of DeepSpeed's shards, for every ZeRO stage and precision, on one CPU.

DeepSpeed's own zero_to_fp32 does the same but for bf16 at stage 1, whose files it does not recognise. The files are
memory-mapped, so the optimizer's moments are never read.
"""

from pathlib import Path

import torch

from megagpt.training.shards import Shards, load_file


def read_weights(shards: Path, zero_stage: int, world_size: int) -> dict[str, torch.Tensor]:
    """fp32 tensors by parameter name from the folder `shards`, which `world_size` ranks wrote at `zero_stage`.

    Unpickles: only for checkpoints that are trusted. Raises UserError if a file is missing.
    """
    if zero_stage == 0:
        whole = load_file(shards, "mp_rank_00_model_states.pt")["module"]
        return {name: tensor.float() for name, tensor in whole.items()}
    reader = Shards(shards, zero_stage, world_size)
    return {name: reader.read_weight(name) for name in reader.shapes}
