"""What a run reads, opened and checked before anything is built: datasets, and the tokenizer where text is needed."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megagpt.config.schema import DataSource, RunConfig
from megagpt.data.loader import TrainingData, ValidationData
from megagpt.data.manifest import Manifest, common_tokenizer
from megagpt.data.names import distinct_names
from megagpt.errors import UsageError, UserError
from megagpt.inference.batch import tokens_left
from megagpt.inference.generate import encode_prompt
from megagpt.tokenizer import Tokenizer, token_byte_lengths
from megagpt.training.recording import Metrics
from megagpt.training.samples import continuations
from megagpt.training.trainer import Trainer

logger = logging.getLogger(__name__)


def sample_writer(config: RunConfig) -> Callable[[Trainer, Metrics], None]:
    """What continues evaluation.prompts after an evaluation. Raises UsageError if that cannot work."""
    prompts, length = config.evaluation.prompts, config.evaluation.sample_tokens
    if not prompts:
        return lambda trainer, metrics: None
    tokenizer = _tokenizer(config.data.train)
    if tokenizer is None:
        raise UsageError("evaluation.prompts: no dataset of data.train has a manifest that names its tokenizer")
    for prompt in prompts:
        tokens = len(encode_prompt(tokenizer, prompt))
        tokens_left(config.model, tokens)

    def write(trainer: Trainer, metrics: Metrics) -> None:
        texts = continuations(trainer.engine.module, tokenizer, prompts, length, config.train.seed)
        for prompt, text in zip(prompts, texts, strict=True):
            metrics.write({"kind": "sample", "step": trainer.step, "prompt": prompt, "text": text})

    return write


def _tokenizer(sources: Sequence[DataSource]) -> Tokenizer | None:
    """The tokenizer of the first dataset whose manifest names one; None if none does."""
    for source in sources:
        folder = Path(source.path).parent
        if manifest := Manifest.load(folder):
            return manifest.load_tokenizer(folder)
    return None


def _token_bytes(source: DataSource) -> npt.NDArray[np.int64] | None:
    """Bytes of each token of a dataset, for bits per byte; None where its tokenizer is not to be had."""
    try:
        tokenizer = _tokenizer([source])
    except UserError as error:  # training itself needs no vocabulary
        logger.warning("no bits per byte in evaluations: %s", error)
        return None
    return None if tokenizer is None else token_byte_lengths(tokenizer)


def open_data(
    config: RunConfig, micro_batch_size: int, rank: int, world_size: int
) -> tuple[TrainingData, dict[str, ValidationData]]:
    """Training data, and validation data by name. Raises UserError for what is missing, damaged or does not fit."""
    vocab_size = config.model.vocab_size
    data = TrainingData(config.data.train, config.seq_len, config.train.seed, config.data.document_mask, vocab_size)
    names = distinct_names(config.data.validation, "data.validation")
    validation = {
        name: ValidationData(
            source,
            config.seq_len,
            config.data.document_mask,
            vocab_size,
            _token_bytes(source),
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            max_batches=config.evaluation.batches,
        )
        for name, source in zip(names, config.data.validation, strict=True)
    }
    common_tokenizer([*data.datasets, *(split.dataset for split in validation.values())], vocab_size)
    return data, validation
