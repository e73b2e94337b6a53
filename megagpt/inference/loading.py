"""A trained model, wherever it lies, ready to sample from on one device: see megagpt.convert.source for the places."""

from pathlib import Path
from typing import NamedTuple

import torch

from megagpt.config import RunConfig, load_config
from megagpt.errors import UserError
from megagpt.model import GPT
from megagpt.tokenizer import Tokenizer, load_tokenizer


class LoadedModel(NamedTuple):
    """What `load_model` finds."""

    model: GPT
    """Without what pads its vocabulary in training."""
    tokenizer: Tokenizer
    config: RunConfig | None
    """Of the run; None where there is only a model."""


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    vocab_dir: str | Path | None = None,
) -> LoadedModel:
    """Load the model at `path` in eval mode: a run folder's newest checkpoint, a checkpoint, an export of megagpt, or a
    Hugging Face folder of GPT-2's or Llama's family.

    device: "auto" is cuda if torch sees a GPU, else cpu. dtype: of the weights; None is bf16 on a GPU, fp32 on a CPU.
    step: of a run folder the checkpoint of that step, instead of the newest. tokenizer: instead of the model's own (a
    run on a dataset without manifest has none). vocab_dir: where to look first for vocabulary files.
    Raises UserError for whatever is missing, damaged or does not fit.
    """
    from megagpt.convert.source import open_source, tokenizer_of  # training imports this package, convert that one

    device = resolve_device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = open_source(Path(path), step)
    config = None
    if source.kind == "checkpoint":
        file = source.folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"{file}: missing; a checkpoint is read together with its run folder")
        config = load_config(file)
        if config.model.without_padding() != source.model:
            raise UserError(f"{file}: describes another model than {source.path}; restore that file")
    with torch.device("meta"):
        model = GPT(source.model)
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        value = source.weights[name].read().to(device, dtype, copy=True)
        model.get_submodule(module).register_parameter(leaf, torch.nn.Parameter(value, parameter.requires_grad))
    found = load_tokenizer(tokenizer, vocab_dir) if tokenizer else tokenizer_of(source, vocab_dir)
    if found is None:
        raise UserError(_without_tokenizer(source.folder))
    if found.vocab_size > source.model.vocab_size:
        raise UserError(
            f"tokenizer {found.name} has {found.vocab_size} ids, but the model of {source.path} knows "
            f"{source.model.vocab_size}; give the tokenizer of its training data"
        )
    return LoadedModel(model.eval(), found, config)


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by its name; "auto" is cuda if torch sees a GPU, else cpu. Raises UserError for a missing GPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no GPU here; choose cpu")
    return device


def _without_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    if path.exists():
        return f"{path}: is no byte-level BPE with a known eos_token_id; name a tokenizer that has the same ids"
    return f"{path}: missing; name the tokenizer of the training data"
