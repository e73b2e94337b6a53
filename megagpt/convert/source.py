"""A trained model wherever it lies: what kind of folder or file it is, its weights by our names, its tokenizer.

    runs/small, runs/small/checkpoints/step_00001000      a run folder, or one of its checkpoints
    a folder with config.yaml and *.safetensors           an export of megagpt
    a folder with config.json                             Hugging Face's GPT-2 or Llama
    ckpt.pt, or the folder that it is in                  nanoGPT
    a folder with mp_rank_00/model_optim_rng.pt           Megatron-LM, or the folder of its iterations

Only the configuration and the names of weights are read at first; weights come one by one, when they are asked for.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from megagpt.config.schema import ModelConfig
from megagpt.convert import huggingface, megatron, nanogpt
from megagpt.convert.tokenizers import FILES, read_tokenizer
from megagpt.data.manifest import TokenizerInfo
from megagpt.errors import UserError
from megagpt.tokenizer import Tokenizer, load_tokenizer
from megagpt.training.checkpoint import SHARDS, checkpoint_name, find_checkpoint, read_manifest, verify_checksums
from megagpt.training.export import model_of, read_export
from megagpt.training.weights import Weights, check_weights, open_weights, without_padding

Kind = Literal["checkpoint", "megagpt", "hf", "nanogpt", "megatron"]

TOKENIZER = "tokenizer.json"


class Source(NamedTuple):
    """A trained model."""

    kind: Kind
    path: Path
    """The checkpoint, or the folder."""
    model: ModelConfig
    weights: Weights
    """By our names: those of `model`, in the types in which they are stored. Nothing pads the vocabulary."""

    @property
    def folder(self) -> Path:
        """Where the tokenizer is described: of a checkpoint its run folder."""
        if self.kind == "checkpoint":
            return self.path.resolve().parent.parent
        return self.path if self.path.is_dir() else self.path.parent


def open_source(path: Path, step: int | None = None) -> Source:
    """The model at `path`; of a run folder the newest checkpoint, or that of `step`.

    Raises UserError for what is not there, is damaged or of no known kind; UsageError for another architecture.
    """
    if step is not None or (path / "checkpoints").is_dir() or (path / SHARDS).is_dir():
        return _checkpoint(path if step is None else path / "checkpoints" / checkpoint_name(step))
    if (path / "config.yaml").is_file() and any(path.glob("*.safetensors")):
        source = Source("megagpt", path, *without_padding(*read_export(path, str(path))))
    elif (path / huggingface.CONFIG).is_file():
        source = Source("hf", path, *huggingface.read_folder(path))
    elif (path / nanogpt.FILE).is_file() or (path.is_file() and path.name == nanogpt.FILE):
        source = Source("nanogpt", path, *nanogpt.read_file(path if path.is_file() else path / nanogpt.FILE))
    elif file := megatron.find_file(path):
        source = Source("megatron", path, *megatron.read_file(file))
    else:
        return _checkpoint(path)
    check_weights(source.weights, source.model, str(path))
    return source


def tokenizer_of(source: Source, vocab_dir: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer of the model's training data; None if the folder does not say, or says what is none of ours.

    vocab_dir: where to look first for vocabulary files. Raises UserError for one that is named and cannot be had.
    """
    folder = source.folder
    path = folder / TOKENIZER
    if source.kind == "hf" or not path.exists():
        return read_tokenizer(folder, end_of_document(folder))
    try:
        info = TokenizerInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        if source.kind == "megagpt":  # of a model that was not trained here
            return read_tokenizer(folder, end_of_document(folder))
        raise UserError(f"{path}: not a tokenizer's description: {error.errors()[0]['msg']}") from None
    if info.file and not (folder / info.file).is_file():
        raise UserError(f"{folder / info.file}: the run's vocabulary is missing; copy it from the dataset's folder")
    tokenizer = load_tokenizer(folder / info.file if info.file else info.name, vocab_dir)
    if tokenizer.vocab_sha256 != info.vocab_sha256:
        raise UserError(
            f"{path}: the vocabulary of tokenizer {info.name} has sha256 {tokenizer.vocab_sha256[:12]}..., that of "
            f"the training data {info.vocab_sha256[:12]}...; find that vocabulary"
        )
    return tokenizer


def huggingface_files(source: Source) -> Path | None:
    """The folder in which Hugging Face's files describe the model's tokenizer; None if ours do, or nothing does."""
    path = source.folder / TOKENIZER
    if source.kind == "hf":
        return source.folder
    if source.kind != "megagpt" or not any((source.folder / name).is_file() for name in FILES):
        return None
    try:
        TokenizerInfo.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return source.folder
    return None


def special_ids(folder: Path) -> dict[str, object]:
    """bos_token_id and eos_token_id as a Hugging Face folder has them, generation_config.json before config.json."""
    found: dict[str, object] = {}
    for name in (huggingface.CONFIG, "generation_config.json"):
        if (folder / name).is_file():
            values = huggingface.read_json(folder / name)
            found |= {key: values[key] for key in ("bos_token_id", "eos_token_id") if key in values}
    return found


def end_of_document(folder: Path) -> int | None:
    """The token after which a Hugging Face model stops, the first if there are several; None if it does not say."""
    found = special_ids(folder).get("eos_token_id")
    if isinstance(found, list) and found:
        found = found[0]
    return found if isinstance(found, int) else None


def _checkpoint(path: Path) -> Source:
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    verify_checksums(checkpoint)
    model = model_of(manifest.model, str(checkpoint))
    weights = open_weights(checkpoint / SHARDS, manifest.zero_stage, manifest.world_size)
    source = Source("checkpoint", checkpoint, *without_padding(model, weights))
    check_weights(source.weights, source.model, str(checkpoint))
    return source
