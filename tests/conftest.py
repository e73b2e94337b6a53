"""What every test may rely on."""

import os
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A shell starts background jobs with SIGINT ignored, nohup programs with SIGHUP, and programs inherit that: the
# commands under test must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tensors here are small, and several tests run side by side. Before anything imports torch; commands inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

# On a busy machine any example may take long: what has to be fast says so in a test of its own.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a file's tests run in one process, in order; those that share one cluster do, too."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)

    return Scheduler(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=8, help="how often the tests of random kills kill (default 8)")


@pytest.fixture
def number_of_kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")
