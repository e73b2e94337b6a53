"""What every test may rely on."""

import os
import signal

# A shell starts background jobs with SIGINT ignored, nohup programs with SIGHUP, and programs inherit that: the
# commands under test must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tensors here are small, and several tests run side by side. Before anything imports torch; commands inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
