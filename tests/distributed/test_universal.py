"""The universal form of a checkpoint holds what was trained, is made once, and is never used half made or damaged."""

import io
import multiprocessing
import os
import shutil
import signal
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from deepspeed.checkpoint import ds_to_universal
from rich.console import Console

from megagpt.config.schema import RunConfig
from megagpt.data.loader import TrainingData
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.model.init import initialize_weights
from megagpt.training.checkpoint import read_manifest
from megagpt.training.universal import read_universal, universal_form, verify_universal
from megagpt.training.universal_loading import convert_together, needs_conversion
from tests.distributed.cuts import CUT, STEPS, Setup, States, config_of, contents, identical
from tests.distributed.jobs import refusal, train_and_report


def plain_training(config: RunConfig) -> States:
    """Weights and optimizer state after CUT steps of the same training, written with nothing but torch."""
    model = GPT(config.model)
    initialize_weights(model, config.train.seed)
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    data = TrainingData(config.data.train, config.seq_len, config.train.seed, document_mask=False)
    for step in range(CUT):
        batch = data.read(step * 12, 12)
        loss = F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 2)
        optimizer.step()
    return {name: {"fp32": p.detach(), **optimizer.state[p]} for name, p in parameters.items()}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_universal_form_holds_what_plain_torch_and_deepspeeds_own_tool_say(zero_stage, two_ranks, corpus, tmp_path):
    config = config_of(Setup(2, zero_stage), corpus, tmp_path / "run")
    two_ranks.run(train_and_report, config)
    checkpoint = tmp_path / f"run/checkpoints/step_{CUT:08d}"
    found = contents(universal_form(checkpoint))
    reference = plain_training(config)
    assert found.keys() == reference.keys()
    for name, state in reference.items():
        assert found[name]["step"] == state["step"] == CUT
        torch.testing.assert_close(found[name]["fp32"], state["fp32"], rtol=0, atol=2e-5)
        torch.testing.assert_close(found[name]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found[name]["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-3, atol=1e-10)
    if zero_stage == 0:  # which the tool does not read
        return
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint / "deepspeed"), "output_folder": str(tmp_path / "theirs")}
    with redirect_stdout(io.StringIO()):
        ds_to_universal.main(Namespace(**folders, **options, inject_missing_state=True))
    for name, state in found.items():
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            theirs = torch.load(tmp_path / f"theirs/zero/{name}/{key}.pt", weights_only=True)
            whole = theirs if zero_stage == 3 else theirs["param"]
            assert torch.equal(whole.view(state[key].shape), state[key])


@pytest.fixture(scope="module")
def finished(two_ranks, corpus, tmp_path_factory) -> Path:
    """The checkpoint of a finished run on two ranks at stage 2."""
    run_dir = tmp_path_factory.mktemp("finished")
    two_ranks.run(train_and_report, config_of(Setup(2, 2), corpus, run_dir))
    return run_dir / f"checkpoints/step_{STEPS:08d}"


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(finished, tmp_path / "checkpoints" / finished.name)


def convert_and_listen(checkpoint: Path, folder: Path) -> str:
    console = Console(file=io.StringIO(), width=300)
    convert_together(checkpoint, folder, console)
    return console.file.getvalue()


def test_conversion_is_done_once_by_rank_0(two_ranks, checkpoint, tmp_path):
    first = two_ranks.run(convert_and_listen, checkpoint, tmp_path / "own")
    assert f"converted {checkpoint} to universal form" in first[0]
    assert first[1] == ""
    assert two_ranks.run(convert_and_listen, checkpoint, tmp_path / "own") == ["", ""]
    assert [path.name for path in (tmp_path / "own").iterdir()] == [f".universal_{checkpoint.name}"]


def test_killed_conversion_is_begun_anew(checkpoint):
    def kill_in_the_middle(fraction: float) -> None:
        if fraction > 0.5:
            os.kill(os.getpid(), signal.SIGKILL)

    expected = contents(universal_form(checkpoint, checkpoint.parent / "elsewhere"))
    process = multiprocessing.get_context("fork").Process(
        target=universal_form, args=(checkpoint, None, kill_in_the_middle)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    half = checkpoint.parent / f".converting_{checkpoint.name}"
    assert 0 < len(list((half / "parameters").iterdir())) < len(expected)
    (half / "stale").touch()
    form = universal_form(checkpoint)
    assert identical(contents(form), expected)
    assert not half.exists()
    assert not (form / "stale").exists()


@pytest.mark.parametrize("harm", ["short", "missing", "no manifest", "other checkpoint"])
def test_form_that_is_not_whole_or_not_of_this_checkpoint_is_made_anew(harm, checkpoint, caplog):
    form = universal_form(checkpoint)
    expected, file = contents(form), form / "parameters/norm.weight.safetensors"
    if harm == "short":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "missing":
        file.unlink()
    elif harm == "no manifest":
        (form / "manifest.json").write_text("{")
    else:
        manifest = read_manifest(checkpoint)
        manifest.skipped_steps += 1
        (checkpoint / "manifest.json").write_text(manifest.model_dump_json())
    assert identical(contents(universal_form(checkpoint)), expected)
    assert read_universal(form).skipped_steps == (harm == "other checkpoint")
    verify_universal(form)
    assert ("not using" in caplog.text) == (harm != "other checkpoint")


def test_one_flipped_byte_in_the_form_is_noticed(two_ranks, corpus, checkpoint, tmp_path):
    form = universal_form(checkpoint)
    file = form / "parameters/embedding.weight.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"embedding\.weight\.safetensors is not what was written"):
        verify_universal(form)


def test_damaged_checkpoint_is_not_converted_and_every_rank_says_so(two_ranks, corpus, checkpoint, tmp_path):
    shard = max((checkpoint / "deepspeed").glob("*optim_states.pt"), key=lambda path: path.name)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    config = config_of(Setup(2, 1), corpus, tmp_path, resume=str(checkpoint))
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS + 1})})
    first, second = two_ranks.run(refusal, longer)
    assert first == second
    assert "is not what was written" in first[0]
    assert list(checkpoint.parent.glob(".*universal*")) == []


def test_form_that_cannot_be_written_is_one_line_on_every_rank(two_ranks, corpus, checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to("/proc/nowhere")  # nobody can write there, root neither
    config = config_of(Setup(2, 1), corpus, tmp_path / "run", resume=str(checkpoint))
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEPS + 1})})
    first, second = two_ranks.run(refusal, longer)
    assert first == second
    assert first[1] == 1
    assert first[0].startswith(f"cannot write universal form {tmp_path}/run/checkpoints/.universal_")
    assert "\n" not in first[0]


def test_only_another_cut_or_precision_needs_a_conversion(corpus, checkpoint, tmp_path):
    manifest = read_manifest(checkpoint)
    assert not needs_conversion(manifest, config_of(Setup(2, 2, micro_batch_size=1), corpus, tmp_path), 2)
    assert needs_conversion(manifest, config_of(Setup(3, 2), corpus, tmp_path), 3)
    assert needs_conversion(manifest, config_of(Setup(2, 3), corpus, tmp_path), 2)
    assert needs_conversion(manifest, config_of(Setup(2, 2, "bf16"), corpus, tmp_path), 2)
