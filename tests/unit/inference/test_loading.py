"""A trained model from its folder."""

import shutil

import pytest
import torch

from megagpt.errors import UserError
from megagpt.inference import load_model
from tests.unit.inference.runs import CONFIG, write_run


@pytest.fixture
def run_dir(tmp_path):
    write_run(tmp_path / "run", 10, 20)
    return tmp_path / "run"


def same_weights(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_run_folder_gives_its_newest_checkpoint_ready_to_use(tmp_path):
    trained = write_run(tmp_path / "run", 10, 20)
    model, tokenizer, config = load_model(tmp_path / "run", "cpu")
    assert same_weights(model, trained)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert tokenizer.name == "bytes"
    assert config.model == CONFIG


def test_a_checkpoint_folder_and_a_step_name_the_same(run_dir):
    by_step = load_model(run_dir, step=10).model
    by_folder = load_model(run_dir / "checkpoints" / "step_00000010").model
    assert same_weights(by_step, by_folder)
    assert not same_weights(by_step, load_model(run_dir).model)


def test_weights_take_the_dtype_asked_for(run_dir):
    assert {p.dtype for p in load_model(run_dir, dtype=torch.bfloat16).model.parameters()} == {torch.bfloat16}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


SHARD = "checkpoints/step_00000020/deepspeed/mp_rank_00_model_states.pt"

PROBLEMS = {
    "no folder": (lambda run: shutil.rmtree(run), "no such run folder"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "no complete checkpoint"),
    "no configuration": (lambda run: (run / "config.yaml").unlink(), "config.yaml: missing"),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json: missing; name the tokenizer"),
    "not a tokenizer": (lambda run: (run / "tokenizer.json").write_text("{}"), "not a tokenizer's description"),
    "tokenizer is a folder": (
        lambda run: ((run / "tokenizer.json").unlink(), (run / "tokenizer.json").mkdir()),
        "tokenizer.json: cannot be read: Is a directory",
    ),
    "no vocabulary file": (
        lambda run: edit(run / "tokenizer.json", '"file":null', '"file":"own.tiktoken"'),
        "own.tiktoken: the run's vocabulary is missing",
    ),
    "newer model": (
        lambda run: edit(run / "checkpoints/step_00000020/manifest.json", '"vocab_size":', '"experts":8,"vocab_size":'),
        "does not know its model.experts",
    ),
    "odd version": (
        lambda run: [
            edit(path, '"format_version":2', '"format_version":"x"') for path in run.glob("checkpoints/*/manifest.json")
        ],
        "every checkpoint in it is damaged",
    ),
    "another network's weights": (
        lambda run: torch.save({"module": {"x": torch.zeros(1)}}, run / SHARD),
        "step_00000020: has no weight blocks.0",
    ),
    "garbage weights": (
        lambda run: (run / SHARD).write_bytes(b"garbage"),
        "mp_rank_00_model_states.pt: not a file that torch saved",
    ),
    "another vocabulary": (
        lambda run: edit(run / "tokenizer.json", 'sha256":"', 'sha256":"0'),
        "has sha256 .*, that of",
    ),
    "another model": (
        lambda run: edit(run / "config.yaml", "num_layers: 2", "num_layers: 3"),
        "describes another model than .*step_00000020",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_missing_or_does_not_fit_is_named(run_dir, problem):
    make, message = PROBLEMS[problem]
    make(run_dir)
    with pytest.raises(UserError, match=message):
        load_model(run_dir)


def test_a_tokenizer_given_by_name_replaces_the_runs_own(run_dir):
    (run_dir / "tokenizer.json").unlink()
    assert load_model(run_dir, tokenizer="bytes").tokenizer.name == "bytes"


def test_a_tokenizer_larger_than_the_model_is_refused(run_dir):
    with pytest.raises(UserError, match=r"tokenizer gpt2 has 50257 ids, but the model of .* knows 260"):
        load_model(run_dir, tokenizer="gpt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named(run_dir):
    with pytest.raises(UserError, match="torch sees no GPU here; choose cpu"):
        load_model(run_dir, "cuda")
