import subprocess
from pathlib import Path

import pytest

from megagpt.config.describe import all_keys
from megagpt.config.schema import RunConfig
from megagpt.corpus.config import CorpusConfig
from megagpt.scaling.laws.study import LawsConfig
from megagpt.scaling.study import StudyConfig
from tests.forked import run_module
from tools.config_docs import pages

ROOT = Path(__file__).parents[3]
NAMES = ("configuration.md", "corpus_configuration.md", "laws_configuration.md", "scaling_configuration.md")


def config_docs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_module("tools.config_docs", *arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_pages_are_what_the_schemas_give(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages()[name], "run python -m tools.config_docs"


@pytest.mark.parametrize(
    ("name", "schema"), list(zip(NAMES, (RunConfig, CorpusConfig, LawsConfig, StudyConfig), strict=True))
)
def test_every_key_has_a_row_and_a_meaning(name, schema):
    rows = [line for line in pages()[name].splitlines() if line.startswith("| `")]
    for key, _ in all_keys(schema):
        (row,) = [row for row in rows if row.startswith(f"| `{key}` |")]
        assert all(cell.strip() for cell in row.strip("|").split(" | ")), key


@pytest.mark.slow
def test_the_command_writes_the_pages_and_tells_when_one_is_stale(tmp_path):
    assert config_docs("--folder", str(tmp_path)).returncode == 0
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == pages()
    assert config_docs("--folder", str(tmp_path), "--check").returncode == 0
    page = tmp_path / "corpus_configuration.md"
    page.write_text("old", encoding="utf-8")
    stale = config_docs("--folder", str(tmp_path), "--check")
    assert (stale.returncode, stale.stderr) == (1, f"error: {page}: not current; run python -m tools.config_docs\n")
    assert page.read_text(encoding="utf-8") == "old"
    missing = config_docs("--folder", str(tmp_path / "none"))
    missing_page = tmp_path / "none" / NAMES[0]
    assert (missing.returncode, missing.stderr) == (1, f"error: {missing_page}: No such file or directory\n")
