"""What every test may rely on."""

import signal

# A shell starts background jobs with SIGINT ignored, nohup programs with SIGHUP, and programs inherit that: the
# commands under test must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
