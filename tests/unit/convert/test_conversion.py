"""What every conversion promises: verified or gone, streamed, nothing at the target before it is complete."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from megagpt.convert import Options, conversion, convert, huggingface, open_source, streamed, tokenizer_of, tokenizers
from megagpt.convert.verify import compare_logits
from megagpt.convert.writing import write_shards
from megagpt.errors import UsageError, UserError
from megagpt.inference import Sampling, generate, load_model
from megagpt.model import GPT
from megagpt.training.weights import Weight
from tests.unit.convert.models import CASES, Malicious, build, converted
from tests.unit.inference.runs import CONFIG, write_run
from tests.unit.model.configs import LLAMA

RUN = CONFIG.model_copy(update={"vocab_size": 257, "vocab_multiple_of": 64})


@pytest.fixture(scope="module", autouse=True)
def short_proofs() -> Iterator[None]:
    """The proof that tokenizers are alike is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "PROOF_TEXTS", 10)
        yield


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run folder with a padded vocabulary and the bytes tokenizer."""
    path = tmp_path_factory.mktemp("convert") / "run"
    write_run(path, 10, model=RUN)
    return path


@pytest.fixture(scope="module")
def exported(run_dir) -> Path:
    target = run_dir.parent / "hf"
    done = converted(run_dir, target, "hf")
    assert done.real_tokens
    assert done.tokenizer == "bytes"
    return target


def test_an_exported_model_runs_in_transformers_pipeline_and_says_the_same(run_dir, exported):
    generator = pipeline("text-generation", model=str(exported), device="cpu")
    (said,) = generator("To be", max_new_tokens=12, do_sample=False, return_full_text=False)
    model, tokenizer, _ = load_model(run_dir, "cpu")
    prompt = tokenizer.encode("To be")
    steps = list(generate(model, prompt, Sampling(temperature=0), max_new_tokens=12, stop_id=tokenizer.eod_id))
    assert said["generated_text"] == tokenizer.decode([token for (token,) in steps])


def test_the_vocabularys_padding_is_cut(exported, run_dir):
    assert open_source(run_dir).model.vocab_multiple_of == 1
    assert load_file(exported / "model.safetensors")["transformer.wte.weight"].shape == (257, 32)
    assert AutoModelForCausalLM.from_pretrained(exported).config.vocab_size == 257


@pytest.mark.parametrize("kind", ["hf", "megagpt"])
def test_load_model_gives_the_run_and_its_exports_alike(kind, run_dir, exported, tmp_path):
    target = exported
    if kind == "megagpt":
        target = tmp_path / "ours"
        converted(exported, target, "megagpt")
    (first, tokenizer, config), (second, again, nothing) = (load_model(path, "cpu") for path in (run_dir, target))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert (tokenizer.name, tokenizer.vocab_sha256) == (again.name, again.vocab_sha256) == ("bytes", again.vocab_sha256)
    assert (config.model, nothing) == (RUN, None)


def test_load_model_reads_llamas_folder(tmp_path):
    theirs = build(CASES["llama"])
    theirs.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"tokenizer.json: missing; name the tokenizer"):
        load_model(tmp_path / "llama", "cpu")
    with pytest.raises(UserError, match=r"tokenizer bytes has 257 ids, but the model of .* knows 97"):
        load_model(tmp_path / "llama", "cpu", tokenizer="bytes")


def test_the_tokenizer_files_of_a_foreign_model_are_carried_along(exported, tmp_path, monkeypatch):
    """One that no vocabulary file of ours can describe: its files go through an export and out again, as they are."""
    monkeypatch.setattr(conversion, "describe", lambda tokenizer, folder: None)
    done = converted(exported, tmp_path / "ours", "megagpt")
    assert done.tokenizer == "Hugging Face's files"
    converted(tmp_path / "ours", tmp_path / "again", "hf")
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == 256
    assert tokenizer_of(open_source(tmp_path / "ours")).vocab_sha256 == tokenizer_of(open_source(exported)).vocab_sha256


def swapped(monkeypatch) -> None:
    """A mistake that both directions make alike: one norm for the other."""
    entries = huggingface._gpt2_entries

    def wrong(model):
        names = {"ln_1": "ln_2", "ln_2": "ln_1"}
        for entry in entries(model):
            (theirs,) = entry.theirs
            parts = [names.get(part, part) for part in theirs.split(".")]
            yield entry._replace(theirs=(".".join(parts),))

    monkeypatch.setattr(huggingface, "_gpt2_entries", lambda model: list(wrong(model)))


def damaged(monkeypatch) -> None:
    """One weight is written with one bit less."""
    write = conversion.TARGETS["hf"].write

    def wrong(folder, model, weights, *others):
        weight = weights["norm.weight"]
        other = Weight(weight.shape, weight.dtype, lambda: weight.read() * (1 + 2**-20))
        return write(folder, model, weights | {"norm.weight": other}, *others)

    target = conversion.TARGETS["hf"]._replace(write=wrong)
    monkeypatch.setitem(conversion.TARGETS, "hf", target)


def other_theta(monkeypatch) -> None:
    """config.json says something else than the weights mean."""
    config_of = huggingface.config_of
    monkeypatch.setattr(huggingface, "config_of", lambda *a: config_of(*a) | {"layer_norm_epsilon": 1e-3})


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (swapped, "verification failed: logits differ by up to"),
        (damaged, "verification failed: weight norm.weight is not what the source holds"),
        (other_theta, "verification failed: the configuration that was written has other norm_eps"),
    ],
)
def test_a_conversion_that_went_wrong_is_told_and_leaves_nothing(mistake, message, tmp_path, monkeypatch):
    model = write_run(tmp_path / "run", 1)
    shard = tmp_path / "run/checkpoints/step_00000001/deepspeed/mp_rank_00_model_states.pt"
    weights = {name: value + 0.1 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    torch.save({"module": weights}, shard)
    mistake(monkeypatch)
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "run", tmp_path / "hf", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    converted(tmp_path / "run", tmp_path / "hf", "hf", verifies=False)
    assert (tmp_path / "hf/config.json").is_file()


def test_the_tolerance_decides(run_dir, tmp_path, monkeypatch):
    logits = streamed.transformers_logits
    monkeypatch.setattr(conversion, "transformers_logits", lambda folder: lambda ids: logits(folder)(ids) + 1e-4)
    with pytest.raises(UserError, match=r"logits differ by up to 1\.0"):
        converted(run_dir, tmp_path / "hf", "hf")
    done = converted(run_dir, tmp_path / "hf", "hf", tolerance=2e-4)
    assert done.difference.largest == pytest.approx(1e-4, rel=1e-2)


def test_differences_that_are_no_numbers_are_infinite():
    a, b = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    b[0, 0, 0] = torch.nan
    assert compare_logits([a], [b]).largest == float("inf")
    b[0, 0, 0] = 7.0
    a[0, 1, 2] = -3.0
    found = compare_logits([a], [b])
    assert (found.largest, found.mean, found.scale) == (7.0, pytest.approx(10 / 6), 3.0)


def test_what_is_there_is_never_touched(run_dir, tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UsageError, match="hf: is there already; name a new folder"):
        converted(run_dir, tmp_path / "hf", "hf")
    assert list((tmp_path / "hf").iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_and_a_killed_one_is_cleared_away(run_dir, tmp_path):
    def interrupt(what, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(run_dir, tmp_path / "hf", "hf", Options(), interrupt)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".exporting_hf").mkdir()
    (tmp_path / ".exporting_hf/model-00009.safetensors").write_bytes(b"half")
    converted(run_dir, tmp_path / "hf", "hf", verifies=False)
    assert not (tmp_path / "hf/model-00009.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_values_too_large_for_fp16_are_named(tmp_path):
    model = write_run(tmp_path / "run", 1)
    weights = model.state_dict() | {"norm.weight": torch.full((32,), 1e5)}
    shard = tmp_path / "run/checkpoints/step_00000001/deepspeed/mp_rank_00_model_states.pt"
    torch.save({"module": weights}, shard)
    with pytest.raises(UserError, match=r"weight norm.weight reaches 1e\+05, too large for torch.float16"):
        converted(tmp_path / "run", tmp_path / "hf", "hf", dtype=torch.float16)
    assert not (tmp_path / "hf").exists()


def test_a_file_that_would_run_code_is_refused(tmp_path):
    model = build(CASES["llama"])
    model.config.save_pretrained(tmp_path / "llama")
    mark = tmp_path / "code was run"
    torch.save(model.state_dict() | {"more": Malicious(mark)}, tmp_path / "llama/pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: is not loaded, since it would call \S*mkdir"):
        converted(tmp_path / "llama", tmp_path / "ours", "megagpt")
    assert not mark.exists()


class Counting:
    """Weights that know how many bytes of them are in memory at once, at most."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.live = self.peak = 0
        self.weights = {name: Weight(tuple(v.shape), v.dtype, lambda v=v: self._read(v)) for name, v in weights.items()}

    def _read(self, value: torch.Tensor) -> torch.Tensor:
        found = value.clone()
        self.live += found.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(found.untyped_storage(), self._forget, found.nbytes)
        return found

    def _forget(self, nbytes: int) -> None:
        self.live -= nbytes


def test_writing_and_comparing_hold_a_few_tensors_at_a_time_whatever_the_size_of_files(tmp_path):
    config = LLAMA.model_copy(update={"num_layers": 12})
    counting = Counting({name: value.detach() for name, value in GPT(config).named_parameters()})
    total, largest = (f(weight.nbytes for weight in counting.weights.values()) for f in (sum, max))
    write_shards(tmp_path, huggingface.foreign_weights(config, counting.weights), total, lambda done: None)
    assert counting.peak <= 2 * largest
    counting.peak = 0
    layer = sum(weight.nbytes for name, weight in counting.weights.items() if name.startswith("blocks.0."))
    streamed.gpt_logits(config, counting.weights)(torch.tensor([[1, 2, 3]]))
    assert counting.peak <= largest + layer < total / 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
