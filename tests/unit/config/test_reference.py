import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.config.describe import all_keys
from megagpt.config.reference import reference

ROOT = Path(__file__).parents[3]


def config_docs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.config_docs", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_committed_page_is_what_the_schema_gives():
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run python -m tools.config_docs"


def test_every_key_has_a_row_and_a_meaning():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    for key, _ in all_keys():
        (row,) = [row for row in rows if row.startswith(f"| `{key}` |")]
        assert all(cell.strip() for cell in row.strip("|").split(" | ")), key


@pytest.mark.slow
def test_the_command_writes_the_page_and_tells_when_it_is_stale(tmp_path):
    page = tmp_path / "page.md"
    assert config_docs("--output", str(page)).returncode == 0
    assert page.read_text(encoding="utf-8") == reference()
    assert config_docs("--output", str(page), "--check").returncode == 0
    page.write_text("old", encoding="utf-8")
    stale = config_docs("--output", str(page), "--check")
    assert (stale.returncode, stale.stderr) == (1, f"error: {page}: not current; run python -m tools.config_docs\n")
    assert page.read_text(encoding="utf-8") == "old"
    missing = config_docs("--output", str(tmp_path / "none" / "page.md"))
    assert (missing.returncode, missing.stderr) == (1, f"error: {tmp_path}/none/page.md: No such file or directory\n")
