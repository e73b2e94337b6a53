"""Behaviour of the whole model beyond parity: documents, precision, recomputation, compilation, dropout, learning."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from megagpt.config import ModelConfig
from megagpt.inference.generate import generate
from megagpt.inference.sampling import Sampling
from megagpt.model import GPT, compile_blocks, compile_model, initialize_weights
from megagpt.model.embedding import Embedding
from tests.unit.model.configs import FAMILIES, GPT2, LLAMA, build, tokens

families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def gradients(model: GPT, ids: torch.Tensor, **options: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids[:, :-1], ids[:, 1:], **options).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@families
def test_loss_is_the_sum_of_cross_entropies_over_targets_that_count(config):
    model, ids = build(config), tokens(config)
    targets = ids.roll(-1, dims=1)
    targets[:, 10:20] = -100
    logits = model(ids)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    loss = model(ids, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, targets), expected)


@families
@torch.no_grad()
def test_documents_in_one_row_give_the_logits_of_separate_passes(config):
    model, ids = build(config), tokens(config)
    lengths = [[13, 1, 26], [40]]
    document_ids = torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in lengths])
    logits = model(ids, document_ids=document_ids.int())
    separate = [
        torch.cat([model(part[None]) for part in row.split(row_lengths)], dim=1)
        for row, row_lengths in zip(ids, lengths, strict=True)
    ]
    torch.testing.assert_close(logits, torch.cat(separate), atol=1e-5, rtol=0)


@families
@torch.no_grad()
def test_no_position_sees_a_later_token(config):
    model, ids = build(config), tokens(config)
    changed = ids.clone()
    changed[:, 25] = (changed[:, 25] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-3)


@families
def test_activation_checkpointing_changes_no_gradient_dropout_included(config):
    config = config.model_copy(update={"dropout": 0.2})
    ids, results = tokens(config), []
    for every in (0, 1, 2):
        model = build(config, checkpointing_every=every).train()
        torch.manual_seed(3)
        results.append(gradients(model, ids))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results[2], results[0], atol=1e-6, rtol=1e-5)


def test_activation_checkpointing_keeps_fewer_activations():
    kept = []
    for every in (0, 1, 2):
        model = build(GPT2, checkpointing_every=every).train()
        sizes = []
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(tokens(GPT2), tokens(GPT2))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2
    assert kept[1] < kept[2] < kept[0]


@families
def test_compiled_layers_give_the_eager_gradients_and_share_the_code_of_the_first(config, monkeypatch):
    """What torch's own code generator makes of it: tests/distributed/test_equivalence.py."""
    torch.compiler.reset()
    counter, compile_module = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=counter))
    model, ids = build(config), tokens(config)
    expected = gradients(model, ids)
    compile_blocks(model)
    torch.testing.assert_close(gradients(model, ids), expected, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1


@families
@pytest.mark.parametrize(
    ("dropout", "documents", "every"), [(0.0, False, 0), (0.2, False, 0), (0.0, True, 2), (0.2, False, 1)]
)
def test_the_whole_model_is_one_graph_with_the_eager_gradients(config, dropout, documents, every, monkeypatch):
    torch.compiler.reset()
    counter, torch_compile = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: torch_compile(function, backend=counter, **options)
    )
    model = build(config.model_copy(update={"dropout": dropout}), checkpointing_every=every).train()
    ids = tokens(config)
    more = {"document_ids": (torch.arange(ids.shape[1] - 1) // 13).expand(len(ids), -1).int()} if documents else {}
    torch.manual_seed(3)
    expected = gradients(model, ids, **more)
    compile_model(model)
    torch.manual_seed(3)
    torch.testing.assert_close(gradients(model, ids, **more), expected, atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1


def test_dropout_acts_in_training_only():
    config = GPT2.model_copy(update={"dropout": 0.5})
    model, ids = build(config), tokens(config)
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), build(GPT2)(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@families
def test_casting_to_bf16_costs_rounding_only(config):
    """Norms, softmax, rotations, loss and gradient sums are fp32 inside: no gradient is far off."""
    exact, ids = build(config), tokens(config, batch=8)
    expected = gradients(exact, ids)
    model = build(config).bfloat16()
    found = gradients(model, ids)
    expected_loss, loss = exact(ids[:, :-1], ids[:, 1:]), model(ids[:, :-1], ids[:, 1:])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected_loss, rtol=5e-3, atol=0)
    for name, gradient in expected.items():
        error = (found[name].float() - gradient).norm() / gradient.norm()
        assert error < 0.06, f"{name}: {error}"


def test_rotations_stay_exact_in_a_bf16_model():
    config = LLAMA.model_copy(update={"max_seq_len": 4096, "num_layers": 1})
    model, seen = build(config).bfloat16(), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        model(tokens(config, batch=1, seq=4096))
    cos, sin = seen[0]
    frequencies = 10000.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    angles = torch.arange(4096, dtype=torch.float64)[:, None] * frequencies
    torch.testing.assert_close(cos[0, 0, :, :5].double(), angles.cos(), atol=5e-4, rtol=0)
    torch.testing.assert_close(sin[0, 0, :, 5:].double(), angles.sin(), atol=5e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_embedding_gradients_of_equal_tokens_are_summed_exactly(dtype):
    """8,192 gradients of 1/128 for one token are 64; added one by one in bf16 they would stop at 4."""
    table = Embedding(10, 3).to(dtype)
    out = table(torch.full((8, 1024), 7))
    out.backward(torch.full_like(out, 1 / 128))
    assert torch.equal(table.weight.grad[7], torch.full((3,), 64.0, dtype=dtype))
    assert table.weight.grad.sum() == 3 * 64


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope"])
def test_the_model_overfits_20_sentences_and_recites_them(position):
    subjects = ("a cat", "the dog", "my fish", "one bird", "an owl")
    sentences = [f"{subject} {verb}." for subject in subjects for verb in ("sleeps", "eats a pie", "swims", "can sing")]
    # Bytes, and an id of its own first in each, so that the beginning says which sentence it is.
    rows = [[256 + number, *text.encode()] for number, text in enumerate(sentences)]
    width = max(map(len, rows))
    padded = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    inputs, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]
    config = ModelConfig(
        vocab_size=276,
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        max_seq_len=width,
        position=position,
    )
    model = GPT(config)
    initialize_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    count = (targets != -100).sum()
    for _ in range(150):
        loss = model(inputs, targets) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.eval()
    for row in rows:
        steps = generate(model, row[:1], Sampling(temperature=0), max_new_tokens=len(row) - 1)
        assert [tokens[0] for tokens in steps] == row[1:]
