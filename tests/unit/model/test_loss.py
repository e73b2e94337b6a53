"""The fused head and loss against full logits and torch's cross_entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.model import loss as loss_module
from megagpt.model.loss import EAGER_KERNELS, IGNORE_INDEX, linear_cross_entropy

VOCAB, HIDDEN, TOKENS = 53, 12, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 8 tokens: four whole ones and a tail of 5."""
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", {"cpu": 8 * VOCAB})


def inputs(dtype=torch.float32, tokens=TOKENS, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(tokens, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def reference(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T), targets, reduction="sum")


@pytest.mark.parametrize("tokens", [1, 8, 37, 64], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["even", "peaked"])
def test_loss_and_gradients_equal_cross_entropy_of_full_logits(tokens, scale):
    hidden, weight, targets = inputs(torch.float64, tokens, scale)
    expected = reference(hidden, weight, targets)
    expected_gradients = torch.autograd.grad(3.5 * expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(3.5 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("kernels", [EAGER_KERNELS, EAGER_KERNELS.compiled()], ids=["eager", "compiled"])
def test_rows_that_pad_the_vocabulary_take_no_probability_and_get_no_gradient(kernels):
    """However large their logits would be."""
    hidden, weight, targets = inputs(torch.float64)
    expected = reference(hidden, weight, targets)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    padded = torch.cat((weight.detach(), torch.full((11, HIDDEN), 1e3, dtype=torch.float64))).requires_grad_()
    loss = linear_cross_entropy(hidden, padded, targets, kernels, VOCAB)
    hidden_gradient, padded_gradient = torch.autograd.grad(loss, (hidden, padded))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close((hidden_gradient, padded_gradient[:VOCAB]), expected_gradients)
    assert not padded_gradient[VOCAB:].any()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, padded, targets, kernels, VOCAB), expected)


def test_gradcheck_in_double_precision():
    hidden, weight, targets = inputs(torch.float64, tokens=11)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets) * 2.0, (hidden, weight))


def test_no_tokens_give_zero_gradients():
    hidden, weight, targets = inputs(tokens=0)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert not weight.grad.any()


def test_only_ignored_targets_give_zero_loss_and_zero_gradients():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_hidden_states_of_ignored_targets_get_no_gradient():
    hidden, weight, targets = inputs()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert ((hidden.grad == 0).all(dim=1) == (targets == IGNORE_INDEX)).all()


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_gradient_of_one_input_alone(wanted):
    hidden, weight, targets = inputs(torch.float64)
    tensor = {"hidden": hidden, "weight": weight}[wanted]
    (hidden if wanted == "weight" else weight).requires_grad_(False)
    (expected,) = torch.autograd.grad(reference(hidden, weight, targets), tensor)
    (found,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), tensor)
    torch.testing.assert_close(found, expected)


def test_bf16_loss_is_fp32_and_as_near_the_exact_one_as_cross_entropy_over_bf16_logits():
    hidden, weight, targets = inputs(torch.bfloat16)
    exact_inputs = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    exact = reference(*exact_inputs, targets)
    exact.backward()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    for found, wanted in zip((hidden, weight), exact_inputs, strict=True):
        assert found.grad.dtype == torch.bfloat16
        error = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < 1e-2


@pytest.mark.parametrize("kernels", [EAGER_KERNELS, EAGER_KERNELS.compiled()], ids=["eager", "compiled"])
def test_the_gradient_of_a_nearly_certain_target_is_not_that_of_a_probability_rounded_to_1(kernels):
    hidden, weight = torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)
    hidden[0, 0], weight[7, 0] = 12.0, 1.0
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.tensor([7]), kernels).backward()
    others = (VOCAB - 1) / (math.exp(12) + VOCAB - 1)
    assert hidden.grad[0, 0].item() == pytest.approx(-others, rel=1e-2)


def test_weight_gradients_of_many_chunks_are_summed_in_fp32():
    """In bf16, which has 8 bits, 4,096 equal addends of one chunk each would stop growing at 256 of them."""
    tokens = 8 * 4096
    hidden = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16)
    weight = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64)).backward()
    assert weight.grad[0, 0].item() == pytest.approx(-tokens * (1 - 1 / VOCAB), rel=1e-2)


def test_fp16_weight_gradient_of_many_equal_targets_does_not_overflow(monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", {"cpu": 2**24})
    tokens = 131_072  # in one chunk: a plain fp16 sum would reach 131,072 x 127/128, above 65,504
    hidden = torch.ones(tokens, 4, dtype=torch.float16)
    weight = torch.zeros(128, 4, dtype=torch.float16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64)) / tokens
    loss.backward()
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -127 / 128, dtype=torch.float16), rtol=1e-2, atol=0)


def test_autocast_computes_products_in_bf16_and_returns_fp32_gradients():
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss == rounded
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return result


def test_the_logits_of_a_batch_never_exist_at_once():
    hidden, weight, targets = inputs(tokens=640)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.elements == max(8 * VOCAB, VOCAB * HIDDEN, 640 * HIDDEN)
    with LargestTensor() as full:
        reference(hidden, weight, targets).backward()
    assert full.elements == 640 * VOCAB, "the recorder sees full logits where they exist"


def test_three_products_a_chunk_with_gradients_and_one_without():
    hidden, weight, targets = inputs(tokens=16)
    with LargestTensor() as training:
        linear_cross_entropy(hidden, weight, targets).backward()
    with torch.no_grad(), LargestTensor() as evaluation:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert training.products == 2 * 3
    assert evaluation.products == 2
    assert not loss.requires_grad


def test_the_default_chunk_bounds_logits_and_divides_powers_of_two(monkeypatch):
    monkeypatch.undo()
    chunk = loss_module.chunk_tokens_of(50257, "cpu")
    assert chunk == 1024
    assert chunk * 50257 * 2 <= 128 * 2**20, "bytes in bf16"
    assert loss_module.chunk_tokens_of(2**40, "cpu") == 1


def test_compiled_kernels_give_the_eager_loss_and_gradients():
    compiled = EAGER_KERNELS.compiled()
    results = []
    for kernels in (EAGER_KERNELS, compiled):
        hidden, weight, targets = inputs()
        loss = linear_cross_entropy(hidden, weight, targets, kernels)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*results)
