"""FlexAttention as a GPU runs it, compiled: against SDPA with a mask, and against a pass for each document."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.config import ModelConfig, save_config
from megagpt.model import GPT, compile_attention, compile_blocks, missing_for_flex_attention
from tests.distributed.jobs import losses, tiny_config, write_dataset
from tests.gpu.test_training import launched
from tests.unit.model.configs import LLAMA, build, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

DEVICE = torch.device("cuda")
ROWS = [[1, 100, 1, 27, 300, 2, 69], [500]]  # documents of two rows of 500 tokens: no multiple of 128
SEQ = 500


@pytest.fixture(autouse=True)
def fresh_compilations() -> Iterator[None]:
    if missing := missing_for_flex_attention(shaped(), DEVICE):
        pytest.skip(f"FlexAttention needs {missing}")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def shaped(head_dim: int = 64, position: str = "rope", kv_heads: int = 2) -> ModelConfig:
    shape = {"hidden_size": 6 * head_dim, "position": position, "num_kv_heads": kv_heads, "max_seq_len": 8192}
    return LLAMA.model_copy(update=shape | {"num_layers": 2})


def on_gpu(config: ModelConfig, compiled: str = "", **options: int) -> GPT:
    """A model on the GPU; compiled "alone": FlexAttention only, as with ZeRO-3; "in blocks": these, too."""
    model = build(config, **options).to(DEVICE).train()
    if compiled:
        compile_attention(model)
    if compiled == "in blocks":
        compile_blocks(model)
    return model


def ids_of(rows: list[list[int]]) -> Tensor:
    ids = [[number for number, n in enumerate(row) for _ in range(n)] for row in rows]
    return torch.tensor(ids, dtype=torch.int32, device=DEVICE)


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def separate_logits(model: GPT, ids: Tensor) -> Tensor:
    parts = [[model(part[None]) for part in row.split(lengths)] for row, lengths in zip(ids, ROWS, strict=True)]
    return torch.cat([torch.cat(row, dim=1) for row in parts])


@pytest.mark.parametrize("compiled", ["in blocks", "alone"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "position", "kv_heads"),
    [(64, "rope", 2), (64, "learned", 6), (48, "sinusoidal", 6), (16, "rope", 6), (128, "rope", 2), (80, "rope", 3)],
)
def test_fp32_logits_and_gradients_are_those_of_separate_passes(head_dim, position, kv_heads, checkpointing, compiled):
    config = shaped(head_dim, position, kv_heads)
    if missing := missing_for_flex_attention(config, DEVICE):
        pytest.skip(f"FlexAttention needs {missing}")
    ids, targets = tokens(config, seq=SEQ).to(DEVICE), tokens(config, seq=SEQ, seed=2).to(DEVICE)
    alone = on_gpu(config)
    expected_logits = separate_logits(alone, ids)
    expected = gradients(alone, F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten()))

    model = on_gpu(config, compiled, checkpointing_every=int(checkpointing))
    with torch.no_grad():
        assert relative_error(model(ids, document_ids=ids_of(ROWS)), expected_logits) < 1e-4
    found = gradients(model, model(ids, targets, ids_of(ROWS)) / targets.numel())
    for name, exact in expected.items():
        assert relative_error(found[name], exact) < 1e-4, name


@pytest.mark.parametrize("compiled", ["in blocks", "alone"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_exact_as_masked_sdpa(autocast, compiled):
    config = shaped()
    ids, targets = tokens(config, seq=SEQ).to(DEVICE), tokens(config, seq=SEQ, seed=2).to(DEVICE)

    def errors(model: GPT) -> dict[str, float]:
        model = model if autocast else model.bfloat16()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(ids, targets, ids_of(ROWS)) / targets.numel()
        found = gradients(model, loss)
        return {name: relative_error(found[name], exact) for name, exact in expected.items()}

    exact = on_gpu(config)
    expected = gradients(exact, exact(ids, targets, ids_of(ROWS)) / targets.numel())
    masked, flex = errors(on_gpu(config)), errors(on_gpu(config, compiled))
    for name, error in flex.items():
        assert error < 1.5 * masked[name] + 1e-3, name


@pytest.mark.parametrize("compiled", ["in blocks", "alone"])
def test_neither_pass_waits_for_the_device(compiled):
    config = shaped()
    model, ids = on_gpu(config, compiled), tokens(config, seq=SEQ).to(DEVICE)
    documents = [ids_of(ROWS), ids_of(ROWS[::-1]), ids_of([[250, 250], [500]])]
    for each in documents[:2]:
        model(ids, ids, each).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, ids, documents[2]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_with_the_square_of_the_sequence():
    config, batch, seq = shaped(), 4, 8192
    ids = tokens(config, batch, seq).to(DEVICE)
    documents = (torch.arange(seq, device=DEVICE) // 1000).expand(batch, seq)

    def peak_bytes(compiled: str) -> int:
        model = on_gpu(config, compiled).bfloat16()
        model(ids, ids, documents).backward()
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(ids, ids, documents).backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak_bytes("alone") + batch * seq**2 / 2 < peak_bytes("")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_dataset(folder / "train", 40_000)
    write_dataset(folder / "validation", 3_001, seed=1)
    config = tiny_config(
        folder,
        folder / "run",
        model={"hidden_size": 64, "num_kv_heads": 2, "position": "rope", "max_seq_len": 200},
        data={"document_mask": True},
        train={"device": "cuda"},
    )
    save_config(config, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def cpu_losses(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("cpu") / "run"
    return losses(launched(config_file, "train.device=cpu", f"train.run_dir={run_dir}"))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_runs_with_documents_apart_are_those_of_the_cpu(
    checkpointing, zero_stage, config_file, cpu_losses, tmp_path
):
    settings = [f"parallel.zero_stage={zero_stage}", f"train.activation_checkpointing={checkpointing}"]
    compiled = ["train.compile=true", "train.micro_batch_size=4", f"train.run_dir={tmp_path / 'run'}"]
    records = launched(config_file, *settings, *compiled)
    assert "FlexAttention needs" not in "".join(log.read_text() for log in (tmp_path / "run/logs").iterdir())
    assert losses(records) == pytest.approx(cpu_losses, rel=1e-4)
