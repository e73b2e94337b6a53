"""Decoding on a GPU: CUDA graphs and compiled steps draw what the plain step draws on a CPU."""

import pytest
import torch

from megagpt.inference.batch import Batch, Sample, run
from megagpt.inference.sampling import Sampling, sample_key
from tests.unit.inference.test_batch import prompts_of
from tests.unit.model.configs import FAMILIES, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


@pytest.mark.parametrize("family", ["sinusoidal", "llama"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_draws_what_a_cpu_draws(family, rows, compile):
    """In fp32; each number of columns runs first, is recorded at its second step and replayed from the third."""
    config = FAMILIES[family]
    model = build(config)
    sampling = Sampling(temperature=0.9, top_k=7, repetition_penalty=1.2)
    prompts = prompts_of(config)

    def drawn(device: str, compile: bool) -> list[list[int]]:
        samples = [Sample(prompt, sample_key(0, index), 70) for index, prompt in enumerate(prompts)]
        for _ in run(Batch(model.to(device), sampling, rows, 80, compile=compile), iter(samples)):
            pass
        return [sample.tokens for sample in samples]

    assert drawn("cuda", compile) == drawn("cpu", compile=False)


def test_a_step_waits_for_the_gpu_once():
    """To fetch the tokens, after this; whatever waits before raises an error."""
    model = build(FAMILIES["llama"]).to("cuda")
    batch = Batch(model, Sampling(temperature=0.8, top_p=0.9), 2, 64)
    batch.start({row: Sample([1, 2, 3], row, 50) for row in range(2)})
    batch.step()
    columns = batch._cache.columns(64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch._step(columns)  # not its graph, which waits for nothing anyway
    finally:
        torch.cuda.set_sync_debug_mode("default")
