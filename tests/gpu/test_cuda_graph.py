"""A step's forward and backward make no decision on the host: a CUDA graph of them can be replayed on other batches."""

import copy

import pytest
import torch

from megagpt.model import GPT, compile_blocks, compile_loss, compile_model, initialize_weights
from tests.unit.model.configs import GPT2, LLAMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.float().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_captured_step_gives_the_gradients_of_the_batch_it_is_replayed_on(config, scope):
    model = GPT(config).train()
    initialize_weights(model, 0)
    model.to("cuda", torch.bfloat16)
    reference = copy.deepcopy(model)
    if scope == "model":
        compile_model(model)
    else:
        compile_loss(model)
        compile_blocks(model)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(config.vocab_size, (2, 2, 32), generator=generator).cuda() for _ in range(2)]
    ids, targets = batches[0][0].clone(), batches[0][1].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # where torch wants what is compiled and allocated before the capture
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(ids, targets).backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(ids, targets)
        loss.backward()
    ids.copy_(batches[1][0])
    targets.copy_(batches[1][1])
    graph.replay()
    expected = reference(*batches[1])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    found, wanted = gradients(model), gradients(reference)
    for name in wanted:
        assert (found[name] - wanted[name]).norm() < 0.05 * wanted[name].norm(), name
