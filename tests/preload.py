"""Imported once by the fork server of forked.py, so that its forks need not."""

# ruff: noqa: F401
import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import matplotlib.figure
import tiktoken
import torch

import launch.process
import launch.supervisor
import megagpt.corpus
import megagpt.inference.generate
import megagpt.inference.loading
import megagpt.training.report
import megagpt.training.run
import tools.command
from megagpt.training.engine import import_muon_uncompiled

import_muon_uncompiled()
gc.freeze()  # or each fork would look through, and so copy, all that is imported here
