"""Imported once by the fork server of launched.py, so that its forks need not."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import tiktoken  # noqa: F401
import torch  # noqa: F401

import launch.process
import launch.supervisor
import megagpt.training.run
import tools.command  # noqa: F401
from megagpt.training.engine import import_muon_uncompiled

import_muon_uncompiled()
gc.freeze()  # or each fork would look through, and so copy, all that is imported here
