"""What every command promises, whichever it is: --help with an example, and one line and exit code 2 for a typo."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in ("launch", "tools")
    for file in (ROOT / folder).glob("*.py")
    if re.search(r'^if __name__ == "__main__":', file.read_text(encoding="utf-8"), re.MULTILINE)
)
ARGUMENTS = ("--help", "--no-such-option")

pytestmark = pytest.mark.slow


def run(command: str, argument: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", command, argument],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def runs():
    """Every command with every argument, started side by side: each spends its time importing."""
    cases = [(command, argument) for command in COMMANDS for argument in ARGUMENTS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(lambda case: run(*case), cases), strict=True))


def test_the_commands_are_found():
    assert {"launch.train", "tools.config_docs"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_succeeds_and_shows_an_example(runs, command):
    done = runs[command, "--help"]
    assert (done.returncode, done.stderr) == (0, "")
    usage, *rest = [line for line in done.stdout.splitlines() if f"-m {command}" in line]
    assert usage.lstrip().startswith("Usage:")
    assert any(re.search(rf"-m {re.escape(command)} \S", line) for line in rest), "no example with arguments"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_option_is_one_line_and_exit_code_2(runs, command):
    done = runs[command, "--no-such-option"]
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]*--no-such-option[^\n]*--help\n", done.stderr)
