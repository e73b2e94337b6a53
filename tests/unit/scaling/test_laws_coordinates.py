"""muP: activations change alike at all widths, and under the standard parametrisation they do not."""

import numpy as np
import pytest
import torch

from megagpt.config import RunConfig
from megagpt.data.indexed import IndexedDatasetWriter
from megagpt.errors import UserError
from megagpt.scaling.experiments import StudyFolder
from megagpt.scaling.laws.coordinates import check_coordinates
from megagpt.scaling.laws.report import check_and_keep_coordinates, write_laws_report
from megagpt.scaling.laws.study import load_laws
from tests.unit.scaling.fake_ladders import create_ladder, write_ladder

MODELS = {
    "gpt2": {"position": "learned", "norm": "layernorm", "activation": "gelu", "bias": True},
    "llama": {"position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False},
}


def write_tokens(prefix, count: int = 2000) -> None:
    """Text-like: a few tokens are frequent, and each often follows the one before it."""
    random = np.random.default_rng(0)
    tokens = np.minimum(random.zipf(1.5, count), 127)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_document(np.where(random.random(count) < 0.5, np.roll(tokens, 1), tokens))


def config(folder, **model) -> RunConfig:
    size = {"vocab_size": 128, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_seq_len": 32}
    return RunConfig.model_validate({
        "model": size | {"initializer_range": 0.1} | model,
        "data": {"train": [{"path": str(folder / "train")}]},
        "optimizer": {"lr": 3e-3},
    })  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_changes_are_flat_in_the_width_under_mup_and_grow_without_it(tmp_path, model):
    write_tokens(tmp_path / "train")
    torch.manual_seed(0)
    mup, standard = check_coordinates(config(tmp_path, **model))
    assert mup.widths == standard.widths == [32, 64, 128, 256]
    assert mup.is_flat, mup.exponents
    assert not standard.is_flat
    assert standard.exponents["residual stream"] > 0.7, "Adam's steps of one size add up over the channels"
    for place, changes in mup.changes.items():
        assert changes[0] == pytest.approx(standard.changes[place][0], rel=1e-3), "at the base they are the same"


def test_data_that_are_too_short_are_named(tmp_path):
    write_tokens(tmp_path / "train", 100)
    with pytest.raises(UserError, match="100 tokens, but the check needs 264"):
        check_coordinates(config(tmp_path))


def test_the_check_is_kept_for_the_report(tmp_path):
    path = write_ladder(tmp_path, transfer="mup")
    (tmp_path / "train.idx").unlink()
    write_tokens(tmp_path / "train")
    folder = create_ladder(tmp_path / "out", load_laws(path))
    check_and_keep_coordinates(folder)
    reported = write_laws_report(StudyFolder.open(folder.path))
    assert (folder.path / "report" / "coordinates.png").is_file()
    assert any("muP, 8 steps, widths 32 to 256" in line for line in reported.lines())
    (folder.path / "coordinates.json").write_text("[{}]")
    with pytest.raises(UserError, match="make it again with --coordinates"):
        write_laws_report(folder)
