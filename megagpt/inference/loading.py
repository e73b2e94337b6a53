"""A trained model from its run folder, or from one checkpoint folder of it, ready to sample from on one device.

    RUN/config.yaml, RUN/tokenizer.json, RUN/checkpoints/step_00001000/

See megagpt.training.run and megagpt.training.checkpoint, which write them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from megagpt.config import RunConfig, load_config
from megagpt.config.schema import ModelConfig
from megagpt.data.manifest import TokenizerInfo
from megagpt.errors import UserError
from megagpt.model import GPT
from megagpt.tokenizer import Tokenizer, load_tokenizer


class LoadedModel(NamedTuple):
    """What `load_model` finds in a run folder."""

    model: GPT
    tokenizer: Tokenizer
    config: RunConfig


def load_model(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    vocab_dir: str | Path | None = None,
) -> LoadedModel:
    """Load the newest complete checkpoint of run folder `path`, or `path` if it is one itself; model in eval mode.

    device: "auto" is cuda if torch sees a GPU, else cpu. dtype: of the weights; None is bf16 on a GPU, fp32 on a CPU.
    step: the checkpoint of that step, instead of the newest. tokenizer: instead of the run's own (a run on a dataset
    without manifest has none). vocab_dir: where to look first for vocabulary files.
    Raises UserError for whatever is missing, damaged or does not fit.
    """
    from megagpt.training.checkpoint import checkpoint_name, find_checkpoint, load_weights, read_manifest

    path = Path(path)
    device = _resolve(device)
    checkpoint = find_checkpoint(path if step is None else path / "checkpoints" / checkpoint_name(step))
    run_dir = checkpoint.resolve().parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir / 'config.yaml'}: missing; a checkpoint is read together with its run folder")
    config = load_config(run_dir / "config.yaml")
    if _model_of(checkpoint, read_manifest(checkpoint).model) != config.model:
        raise UserError(f"{run_dir / 'config.yaml'}: describes another model than {checkpoint}; restore that file")
    with torch.device("meta"):
        model = GPT(config.model)
    weights = load_weights(checkpoint)
    expected = set(model.state_dict())
    if wrong := sorted(expected ^ weights.keys()):
        state = "has no" if wrong[0] in expected else "has an unknown"
        raise UserError(f"{checkpoint}: {state} weight {wrong[0]}; it is damaged or of another version of megagpt")
    model.load_state_dict(weights, assign=True)
    model = model.to(device, dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)).eval()
    found = load_tokenizer(tokenizer, vocab_dir) if tokenizer else _own_tokenizer(run_dir, vocab_dir)
    if found.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer {found.name} has {found.vocab_size} ids, but the model of {checkpoint} knows "
            f"{config.model.vocab_size}; give the tokenizer of its training data"
        )
    return LoadedModel(model, found, config)


def _resolve(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no GPU here; choose cpu")
    return device


def _model_of(checkpoint: Path, values: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{checkpoint}: this version of megagpt does not know its model's {key}={values.get(key)!r}"
        ) from None


def _own_tokenizer(run_dir: Path, vocab_dir: str | Path | None) -> Tokenizer:
    """The tokenizer that tokenizer.json describes, checked to be the one of the training data."""
    path = run_dir / "tokenizer.json"
    try:
        info = TokenizerInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing; name the tokenizer of the training data") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(f"{path}: not a tokenizer's description: {error.errors()[0]['msg']}") from None
    if info.file and not (run_dir / info.file).is_file():
        raise UserError(f"{run_dir / info.file}: the run's vocabulary is missing; copy it from the dataset's folder")
    tokenizer = load_tokenizer(run_dir / info.file if info.file else info.name, vocab_dir)
    if tokenizer.vocab_sha256 != info.vocab_sha256:
        raise UserError(
            f"{path}: the vocabulary of tokenizer {info.name} has sha256 {tokenizer.vocab_sha256[:12]}..., that of "
            f"the training data {info.vocab_sha256[:12]}...; find that vocabulary"
        )
    return tokenizer
