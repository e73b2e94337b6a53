"""A run goes on at another world size, ZeRO stage, micro-batch size or precision as if it had never been another."""

import io
import multiprocessing
import os
import shutil
import signal
from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.checkpoint import ds_to_universal
from rich.console import Console

from megagpt.config.schema import RunConfig
from megagpt.data.loader import TrainingData, ValidationData
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.model.init import initialize_weights
from megagpt.training import engine as engine_module
from megagpt.training.checkpoint import CheckpointManifest, read_manifest
from megagpt.training.engine import Engine
from megagpt.training.saving import CheckpointWriter
from megagpt.training.universal import Parameter, read_universal, universal_form, verify_universal
from megagpt.training.universal_loading import convert_together, needs_conversion
from tests.distributed.jobs import losses, refusal, tiny_config, train_and_report
from tests.distributed.ranks import Ranks

CUT, STEPS = 2, 4  # the checkpoint that is resumed, and the whole run
States = dict[str, dict[str, torch.Tensor]]  # "fp32" and the optimizer's tensors by parameter


@dataclass(frozen=True)
class Setup:
    """How a run is cut."""

    ranks: int
    zero_stage: int
    precision: str = "fp32"
    micro_batch_size: int | None = None
    offload: bool = False
    option: tuple[str, Any] | None = None
    """One of DeepSpeed's own that changes where parameters lie."""

    def __str__(self) -> str:
        return f"{self.ranks}x-zero{self.zero_stage}-{self.precision}{'-offload' * self.offload}"


def config_of(setup: Setup, corpus: Path, run_dir: Path, tied: bool = True, **checkpoint: Any) -> RunConfig:
    """No size divides well: 97 x 44 and the biases of 44 need padding on two, three and four ranks."""
    config = tiny_config(
        corpus,
        run_dir,
        model={"num_layers": 1, "hidden_size": 44, "max_seq_len": 16, "tie_embeddings": tied},
        schedule={"name": "constant", "warmup_steps": 2},
        train={
            "steps": STEPS,
            "global_batch_size": 12,
            "micro_batch_size": setup.micro_batch_size,
            "precision": setup.precision,
        },
        parallel={"zero_stage": setup.zero_stage, "offload_optimizer": setup.offload},
        checkpoint={"every": CUT, "keep": 9, "allow_changes": ["precision"]} | checkpoint,
        evaluation={"every": CUT, "batches": 1},
    )
    return config.model_copy(update={"deepspeed": {"zero_optimization": dict([setup.option] if setup.option else [])}})


def contents(form: Path) -> States:
    """Everything in a universal form, by parameter, read into memory."""
    names = [Path(name).name.removesuffix(".safetensors") for name in read_universal(form).files]
    return {
        name: {key: torch.as_tensor(value).clone() for key, value in Parameter(form, name).state().items()}
        for name in names
    }


def identical(one: States, other: States) -> bool:
    """Whether both have the same parameters and states, bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].keys() == other[name].keys()
        and all(torch.equal(one[name][key], other[name][key]) for key in one[name])
        for name in one
    )


def save(engine: Engine, manifest: CheckpointManifest, folder: Path) -> None:
    """Write a checkpoint into `folder` and wait for it."""
    writer = CheckpointWriter(folder, keep=9)
    writer.begin(manifest, lambda aside: engine.save(aside, snapshot=False))
    writer.finish(beat=lambda: None)


def load_and_save(config: RunConfig, checkpoint: Path) -> tuple[States, bool, float]:
    """Load `checkpoint` into an engine and save it again without a step, into config's run folder.

    Returns what rank 0's optimizer then holds, whether the model's weights are the fp32 ones rounded, and the loss on
    the validation data.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    world_size, folder = dist.get_world_size(), Path(config.train.run_dir) / "checkpoints"
    size = config.train.micro_batch_size or config.train.global_batch_size // world_size
    engine = Engine(config, size, config.train.global_batch_size // size // world_size, torch.device("cpu"))
    engine.load_universal(convert_together(checkpoint, folder, Console(quiet=True)))
    ours = {"world_size": world_size, "zero_stage": config.parallel.zero_stage, "precision": config.train.precision}
    save(engine, read_manifest(checkpoint).model_copy(update=ours), folder)
    live, derived = {}, True
    inner = engine._engine.optimizer
    if config.parallel.zero_stage in (1, 2):
        inner._hp_optimizer_states_linked = False  # DeepSpeed links what the two functions below read at its first step
        inner._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if config.parallel.zero_stage == 0:
            live[name] = {"fp32": parameter.detach(), **inner.state[parameter]}
            continue
        live[name] = {"fp32": safe_get_full_fp32_param(parameter)}
        for key in ("exp_avg", "exp_avg_sq"):
            live[name][key] = safe_get_full_optimizer_state(parameter, key)
        live[name]["step"] = next(state["step"] for state in inner.state.values())
        with engine_module._gathered([parameter]) if config.parallel.zero_stage == 3 else torch.no_grad():
            derived &= torch.equal(parameter, live[name]["fp32"].to(parameter.dtype))
    validation = ValidationData(
        config.data.validation[0],
        config.seq_len,
        False,
        config.model.vocab_size,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=size,
        rank=dist.get_rank(),
        world_size=world_size,
        max_batches=1,
    )
    found = engine.evaluate(validation)
    assert found is not None
    engine.close()
    return live, derived, found.loss


@pytest.fixture(scope="module")
def worlds(one_rank, two_ranks, three_ranks, four_ranks) -> dict[int, Ranks]:
    return {ranks.world_size: ranks for ranks in (one_rank, two_ranks, three_ranks, four_ranks)}


# Pairwise: every stage to every other, every world size, both precisions and their changes, offload, micro-batches.
@pytest.mark.parametrize(
    ("source", "target", "tied"),
    [
        (Setup(2, 1, "bf16"), Setup(1, 0, "bf16"), True),
        (Setup(1, 0), Setup(2, 1, micro_batch_size=3), False),
        (Setup(2, 2, micro_batch_size=2), Setup(4, 3), True),
        (Setup(4, 3, "bf16"), Setup(3, 2, "bf16", micro_batch_size=1), False),
        (Setup(3, 0, "bf16"), Setup(2, 3, "fp32", offload=True), True),
        (Setup(2, 3, option=("sub_group_size", 2000)), Setup(3, 1, "bf16"), False),
        (Setup(2, 1, "bf16", offload=True), Setup(2, 2), True),
        (Setup(4, 2, option=("round_robin_gradients", True)), Setup(1, 0), True),
    ],
    ids=str,
)
def test_run_goes_on_with_the_same_bits_and_losses(source, target, tied, worlds, corpus, tmp_path):
    whole = worlds[source.ranks].run(train_and_report, config_of(source, corpus, tmp_path / "whole", tied))[0]
    checkpoint = tmp_path / f"whole/checkpoints/step_{CUT:08d}"
    before = contents(universal_form(checkpoint, tmp_path))
    assert {key for state in before.values() for key in state} == {"fp32", "exp_avg", "exp_avg_sq", "step"}

    saved = config_of(target, corpus, tmp_path / "saved", tied)
    live, derived, validation = worlds[target.ranks].run(load_and_save, saved, checkpoint)[0]
    assert identical(live, before)
    assert derived
    assert identical(contents(universal_form(tmp_path / "saved/checkpoints" / checkpoint.name, tmp_path)), before)
    assert [
        path.name for path in tmp_path.glob("saved/checkpoints/*universal*")
    ] == []  # the own checkpoint replaced it
    expected = next(r["loss"] for r in whole if r["kind"] == "validation" and r["step"] == CUT)
    exact = source.precision == target.precision == "fp32"
    assert validation == pytest.approx(expected, abs=1e-6 if exact else 5e-3)

    moved = config_of(target, corpus, tmp_path / "moved", tied, resume=str(checkpoint), every=CUT + 1)
    after = losses(worlds[target.ranks].run(train_and_report, moved)[0])
    assert after == pytest.approx(losses(whole)[CUT:], abs=1e-5 if exact else 2e-2)
    shutil.rmtree(tmp_path / f"moved/checkpoints/step_{STEPS:08d}")
    assert losses(worlds[target.ranks].run(train_and_report, moved)[0]) == after  # an ordinary resume, bit-identical


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


def with_momentum(function: Any, *arguments: Any) -> Any:
    """Call `function` where the optimizer is SGD with momentum, whose only state is momentum_buffer."""
    original = engine_module.build_optimizer
    engine_module.build_optimizer = lambda groups, config, precision: torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, fused=True
    )
    try:
        return function(*arguments)
    finally:
        engine_module.build_optimizer = original


def test_state_of_another_optimizer_than_adam_moves_as_well(two_ranks, one_rank, corpus, tmp_path):
    whole = config_of(Setup(2, 3), corpus, tmp_path / "whole")
    expected = losses(two_ranks.run(with_momentum, train_and_report, whole)[0])
    checkpoint = tmp_path / f"whole/checkpoints/step_{CUT:08d}"
    assert all(state.keys() == {"fp32", "momentum_buffer"} for state in contents(universal_form(checkpoint)).values())
    for zero_stage in (0, 2):
        moved = config_of(Setup(1, zero_stage), corpus, tmp_path / f"moved{zero_stage}", resume=str(checkpoint))
        found = losses(one_rank.run(with_momentum, train_and_report, moved)[0])
        assert found == pytest.approx(expected[CUT:], abs=1e-5)


def scale_after_moving(config: RunConfig, checkpoint: Path, folder: Path) -> float:
    """Load an fp16 checkpoint, save it into `folder` with a loss scale of 512, move that; the scale that arrives."""
    source = Engine(config, 12, 1, torch.device("cpu"))
    source.load(checkpoint)
    scaler = source._engine.torch_autocast_z0_gradscaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 512.0})
    save(source, read_manifest(checkpoint), folder)
    source.close()
    target = Engine(config, 12, 1, torch.device("cpu"))
    target.load_universal(convert_together(folder / checkpoint.name, folder, Console(quiet=True)))
    scale = target._engine.torch_autocast_z0_gradscaler.get_scale()
    target.close()
    return scale


def test_loss_scale_of_fp16_moves_as_well(one_rank, corpus, tmp_path):
    config = config_of(Setup(1, 0), corpus, tmp_path / "run")
    train = config.train.model_copy(update={"precision": "fp16"})  # which the configuration refuses on a CPU
    fp16 = config.model_copy(update={"train": train})
    one_rank.run(train_and_report, fp16)
    checkpoint = tmp_path / f"run/checkpoints/step_{STEPS:08d}"
    assert one_rank.run(scale_after_moving, fp16, checkpoint, tmp_path / "saved") == [512.0]


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


@pytest.mark.parametrize("option", [{"round_robin_gradients": True}, {"sub_group_size": 1000}])
def test_a_raw_option_that_cuts_the_shards_otherwise_is_no_danger_at_a_resume(option, two_ranks, corpus, tmp_path):
    """DeepSpeed would load shards of another cut without a word."""
    stage = 3 if "sub_group_size" in option else 2

    def run(name: str, steps: int, raw: dict) -> list[float]:
        config = tiny_config(
            corpus,
            tmp_path / name,
            schedule={"name": "constant", "warmup_steps": 2},
            train={"steps": steps},
            parallel={"zero_stage": stage},
            deepspeed={"zero_optimization": raw},
        )
        return losses(two_ranks.run(train_and_report, config)[0])

    expected = run("whole", 8, {})
    run("run", 4, {})
    assert run("run", 8, option) == pytest.approx(expected, abs=1e-5)
