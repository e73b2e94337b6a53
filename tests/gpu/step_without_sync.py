"""python -m tests.gpu.step_without_sync STAGE PRECISION SCOPE FOLDER: a host sync is an error in an engine's step."""

import sys
from pathlib import Path

import torch

from launch.environment import discover
from launch.process import joined
from megagpt.data.loader import Batch
from tests.distributed.jobs import VOCAB_SIZE, tiny_config


def main(stage: int, precision: str, scope: str, folder: Path) -> None:
    sizes = {"micro_batch_size": 2, "global_batch_size": 4, "precision": precision, "device": "cuda"}
    train = {**sizes, "compile": True, "compile_scope": scope}
    config = tiny_config(folder, folder / "run", parallel={"zero_stage": stage}, train=train)
    with joined(discover(), config.train) as (_, device):
        from megagpt.training.engine import Engine

        engine = Engine(config, 2, 2, device)
        tokens = torch.randint(VOCAB_SIZE, (4, 33), generator=torch.Generator().manual_seed(0))
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).pin_memory()
        for _ in range(5):  # compilation, caches, the first state of the optimizer
            engine.step([batch[:2], batch[2:]], 1e-3).read()
        torch.cuda.set_sync_debug_mode("error")
        result = engine.step([batch[:2], batch[2:]], 1e-3)
        torch.cuda.set_sync_debug_mode("default")
        assert not result.read().skipped
        engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
