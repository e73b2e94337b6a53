"""How many layers all contenders fit a GPU with."""

import pytest

from megagpt.benchmark.fit import contenders_bytes, most_layers, with_layers
from megagpt.config import load_config
from megagpt.errors import UserError
from megagpt.model.counts import parameter_count
from tools.benchmark import train

LLAMA = load_config(
    "configs/llama_8b.yaml", ["data.seq_len=4096", "train.global_batch_size=2", "train.micro_batch_size=2"]
)


@pytest.mark.parametrize(("gib", "variants"), [(80, 0), (141, 1)])
def test_one_layer_more_would_be_too_much(gib: int, variants: int):
    layers = most_layers(LLAMA, [LLAMA] * variants, 1, gib * 2**30)
    assert 1 <= layers < LLAMA.model.num_layers
    fitting, larger = (
        contenders_bytes([with_layers(LLAMA, count)] * (1 + variants), 1) / (gib * 2**30)
        for count in (layers, layers + 1)
    )
    assert fitting <= 1 < larger


def test_a_model_that_fits_keeps_its_layers():
    small = load_config("configs/small.yaml", [])
    assert most_layers(small, [], 1, 80 * 2**30) == small.model.num_layers


def test_where_not_one_layer_fits_it_says_so():
    with pytest.raises(UserError, match=r"^not even one layer fits 12 GiB beside the plain loop; take "):
        most_layers(LLAMA, [], 1, 12 * 2**30)


def test_all_hold_their_states_and_one_takes_a_step():
    config = load_config("configs/gpt3_1.3b.yaml", ["train.global_batch_size=8", "train.micro_batch_size=8"])
    parameters = parameter_count(config.model)
    alone, with_plain, twice = (contenders_bytes([config] * ours, plain) for ours, plain in ((1, 0), (1, 1), (2, 1)))
    assert with_plain - alone >= 16 * parameters
    assert 16 * parameters <= twice - with_plain <= 22 * parameters


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--fit-layers is for a GPU, and there is none here; say model\.num_layers=N"):
        train("configs/small.yaml", [], fit_layers=True)
