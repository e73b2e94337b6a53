"""What every test may rely on."""

import signal

# A shell starts background jobs with SIGINT ignored, and programs inherit that: the commands under test must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
