"""Hugging Face folders against transformers' own classes, which write and read what is converted here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megagpt.convert import huggingface, open_source
from megagpt.errors import UsageError, UserError
from megagpt.model import GPT
from tests.unit.convert.models import CASES, build, converted, ids_for
from tests.unit.inference.runs import CONFIG


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def our_model(folder: Path) -> GPT:
    source = open_source(folder)
    model = GPT(source.model).eval()
    model.load_state_dict({name: weight.read() for name, weight in source.weights.items()})
    return model


@pytest.fixture(params=CASES, scope="module")
def saved(request, tmp_path_factory):
    """A model of transformers, and the folder to which that wrote it."""
    model = build(CASES[request.param])
    folder = tmp_path_factory.mktemp("theirs") / "model"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_our_model_of_their_folder_has_their_logits(saved, tmp_path):
    theirs, folder = saved
    ids = ids_for(theirs.config)
    expected = theirs(ids).logits
    assert expected.abs().max() > 1, "weights so small that nothing would be compared"
    converted(folder, tmp_path / "ours", "megagpt")
    tolerance = 1e-5 * float(expected.abs().max())  # as tools.convert's own
    for path in (folder, tmp_path / "ours"):
        torch.testing.assert_close(our_model(path)(ids), expected, atol=tolerance, rtol=0)


@torch.no_grad()
def test_there_and_back_again_is_bit_identical_for_transformers(saved, tmp_path):
    theirs, folder = saved
    converted(folder, tmp_path / "ours", "megagpt")
    done = converted(tmp_path / "ours", tmp_path / "back", "hf", max_shard_bytes=20_000)
    assert done.difference.top1 == 1
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same(tensors(tmp_path / "back"), tensors(folder))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", local_files_only=True)
    assert type(back) is type(theirs)
    ids = ids_for(theirs.config)
    assert torch.equal(back(ids).logits, theirs(ids).logits)
    ours, original = back.config.to_dict(), theirs.config.to_dict()
    apart = {key for key in original if ours[key] != original[key]}
    assert apart <= {
        "_name_or_path",
        "architectures",
        "transformers_version",
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
    }


def write_as(form: str, folder: Path, target: Path) -> None:
    """The weights of `folder` as other versions of transformers wrote them."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = tensors(folder)
    names = sorted(weights)
    halves = [{name: weights[name] for name in part} for part in (names[::2], names[1::2])]
    if form == "sharded safetensors":
        save_file(halves[0], target / "model-00001-of-00002.safetensors")
        save_file(halves[1], target / "model-00002-of-00002.safetensors")
        files = {name: f"model-0000{1 + (name in halves[1])}-of-00002.safetensors" for name in names}
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        save_file({"other": torch.ones(1)}, target / "consolidated.safetensors")  # which the index does not name
        mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 37, 37, dtype=torch.bool)}
        save_file(halves[0] | mask, target / "model-00001-of-00002.safetensors")
    elif form == "sharded bin":
        torch.save(halves[0], target / "pytorch_model-00001-of-00002.bin")
        torch.save(halves[1], target / "pytorch_model-00002-of-00002.bin")
        files = {name: f"pytorch_model-0000{1 + (name in halves[1])}-of-00002.bin" for name in names}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        if "transformer.wte.weight" in weights:  # as GPT-2 itself was published
            weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
            weights["h.0.attn.bias"] = torch.ones(1, 1, 37, 37).tril()
            weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        else:
            weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
        torch.save(weights, target / "pytorch_model.bin", _use_new_zipfile_serialization=form != "old bin")


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin", "bin", "old bin"])
def test_every_form_of_a_folder_holds_the_same_weights(saved, form, tmp_path):
    _, folder = saved
    write_as(form, folder, tmp_path / "model")
    found, expected = open_source(tmp_path / "model"), open_source(folder)
    assert found.model == expected.model
    assert_same(*({name: w.read() for name, w in source.weights.items()} for source in (found, expected)))


@torch.no_grad()
def test_a_gpt2_without_prefix_verifies_against_transformers(tmp_path):
    build(CASES["gpt2"]).save_pretrained(tmp_path / "theirs")
    write_as("bin", tmp_path / "theirs", tmp_path / "old")
    assert converted(tmp_path / "old", tmp_path / "new", "hf").difference.top1 == 1
    assert_same(tensors(tmp_path / "new"), tensors(tmp_path / "theirs"))


@torch.no_grad()
def test_rounding_to_bf16_is_verified_against_rounded_weights_and_told(saved, tmp_path):
    theirs, folder = saved
    done = converted(folder, tmp_path / "bf16", "hf", dtype=torch.bfloat16)
    assert done.difference.largest <= 1e-5 * done.difference.scale
    assert 1e-4 < done.rounding.largest < 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, parameter in theirs.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16()), name


def edit(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type llama3"),
        (
            "llama",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type linear",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"head_dim": 12}, "head_dim is 12, but this model knows 10 only"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, but this model knows silu only"),
        ("llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' is none that is read here"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu' is none of gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ],
)
def test_what_our_model_cannot_express_is_refused_before_any_work(case, values, message, tmp_path):
    build(CASES[case]).save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", **values)
    with pytest.raises(UsageError, match=message):
        converted(tmp_path / "theirs", tmp_path / "ours", "megagpt")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("values", "position"),
    [
        ({"position": "sinusoidal"}, "Hugging Face's GPT-2 cannot express model.position sinusoidal"),
        ({"norm": "rmsnorm"}, "GPT-2 cannot express model.norm rmsnorm .it has layernorm"),
        ({"num_kv_heads": 1, "activation": "swiglu"}, "model.activation swiglu .*, model.num_kv_heads 1"),
        ({"position": "rope"}, "Llama cannot express model.norm layernorm .*, model.activation gelu"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused_with_all_reasons(values, position):
    with pytest.raises(UsageError, match=position):
        huggingface.expressed(CONFIG.model_copy(update=values), {})


def damage(folder: Path, change: object) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: damage(f, lambda w: w.pop("model.norm.weight")), "has no weight model.norm.weight"),
        (lambda f: damage(f, lambda w: w.update({"model.extra": torch.ones(1)})), "has weight model.extra, which its"),
        (
            lambda f: damage(f, lambda w: w.update({"model.norm.weight": torch.ones(7)})),
            r"norm.weight has shape \(7,\) instead of \(60,\)",
        ),
        (lambda f: edit(f, tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight"),
        (lambda f: edit(f, hidden_size=None), "hidden_size=None, where a number"),
        (lambda f: edit(f, num_hidden_layers="x"), "num_hidden_layers='x'"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors: cannot be read"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "names ../x.safetensors, which is not beside it",
        ),
    ],
)
def test_a_damaged_folder_is_named_with_what_is_wrong(change, message, tmp_path):
    folder = tmp_path / "theirs"
    build(CASES["llama"]).save_pretrained(folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        converted(folder, tmp_path / "ours", "megagpt")
    assert not (tmp_path / "ours").exists()
