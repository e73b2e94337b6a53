"""Imported once by the fork server of launched.py, so that its forks need not."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import tiktoken  # noqa: F401
import torch  # noqa: F401

import megagpt.training.run  # noqa: F401
