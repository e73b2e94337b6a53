"""Offline preparation of training data: text files in, token datasets out. `preprocess` is the whole of it."""

from megagpt.corpus.config import CorpusConfig
from megagpt.corpus.executor import Progress
from megagpt.corpus.pipeline import preprocess
from megagpt.corpus.report import Report

__all__ = ["CorpusConfig", "Progress", "Report", "preprocess"]
