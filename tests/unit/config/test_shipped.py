"""Every file in configs/: it loads, it is the published model, it fits the GPUs its header names."""

import re
from pathlib import Path

import pytest

from megagpt.config import RunConfig, check_batch, load_config
from megagpt.model.counts import parameter_count

FILES = sorted(Path(__file__).parents[3].joinpath("configs").glob("*.yaml"))
#: Parameters of the published GPT-2 and Llama checkpoints; GPT-3's nominal sizes (Brown et al. 2020, Table 2.1).
PUBLISHED = {
    "gpt2_124m": 124.4e6, "gpt2_350m": 354.8e6, "gpt2_774m": 774.0e6, "gpt2_1.5b": 1557.6e6,
    "gpt3_1.3b": 1.3e9, "gpt3_2.7b": 2.7e9, "gpt3_6.7b": 6.7e9, "gpt3_13b": 13.0e9,
    "llama_1b": 1.236e9, "llama_8b": 8.030e9, "llama_70b": 70.554e9,
}  # fmt: skip
#: The nominal sizes of GPT-3 are rounded: the table's own shapes give 1.316, 2.652, 6.658 and 12.853 billion.
NOMINAL_TOLERANCE = 0.02


def shipped(stems=None):
    """Parametrise over the shipped files, or those named."""
    return pytest.mark.parametrize("path", [f for f in FILES if not stems or f.stem in stems], ids=lambda f: f.stem)


@shipped()
def test_a_shipped_configuration_loads_and_has_its_own_run_folder(path):
    config = load_config(path)
    assert config.train.run_dir == f"runs/{path.stem}"
    assert config.data.validation


@shipped(PUBLISHED)
def test_a_shipped_model_has_the_published_number_of_parameters(path):
    tolerance = NOMINAL_TOLERANCE if path.stem.startswith("gpt3") else 0.001
    assert parameter_count(load_config(path).model) == pytest.approx(PUBLISHED[path.stem], rel=tolerance)


def test_every_published_model_is_shipped():
    assert {file.stem for file in FILES} >= {*PUBLISHED, "small", "quickstart"}


@shipped()
def test_a_shipped_configuration_fits_the_gpus_its_header_names(path):
    config = load_config(path)
    header = re.search(r"^# Intended for: (\d+) x .*?(\d+) GB", path.read_text(), re.MULTILINE)
    assert header, "the header must say what it is for: '# Intended for: 8 x A100 40 GB (1 node).'"
    world_size, gigabytes = int(header[1]), int(header[2])
    micro_batch_size, _ = check_batch(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    assert memory_bytes(config, world_size, micro_batch_size) < 0.85 * gigabytes * 1e9


def memory_bytes(config: RunConfig, world_size: int, micro_batch_size: int) -> float:
    """A rough peak a rank: bf16 weights and gradients, fp32 gradients, master weights and moments (Rajbhandari et al.
    2020), activations with flash attention (Korthikanti et al. 2022, without the scores), the head's fp32 gradient."""
    model, parameters = config.model, parameter_count(config.model)
    states = {
        1: 8 + 12 / world_size,
        2: 2 + 16 / world_size,
        3: 18 / world_size,
    }[config.parallel.zero_stage] * parameters
    tokens = micro_batch_size * config.seq_len
    kv_width = model.hidden_size * model.kv_heads // model.num_attention_heads
    widenings = 4 if model.activation == "swiglu" else 2
    block = 2 * tokens * (6 * model.hidden_size + 2 * kv_width + widenings * model.ffn_size)
    if config.train.activation_checkpointing:
        activations = block + 2 * tokens * model.hidden_size * model.num_layers
    else:
        activations = block * model.num_layers
    return states + activations + 4 * model.vocab_size * model.hidden_size
