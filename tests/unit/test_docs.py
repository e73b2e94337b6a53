"""Command lines and paths in the documentation are real: modules, options, configuration keys, files, links."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from megagpt.config import load_config
from tests.forked import run_module

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines() -> list[tuple[str, list[str]]]:
    """(module, words after it) of every `python -m tools.x ...` or `-m launch.x ...` in a page's code."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            for match in re.finditer(r"-m ((?:tools|launch)\.\w+)([^`]*)", line):
                words = shlex.split(match[2].split("#")[0].replace("...", ""), posix=True)
                found.append((match[1], [word for word in words if word not in ("\\", "[--check]")]))
    return found


@cache
def help_of(module: str, *subcommand: str) -> str:
    done = run_module(module, *subcommand, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("module", "words"), command_lines(), ids=lambda value: str(value)[:60])
def test_every_documented_command_line_is_accepted(module, words):
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    has_subcommand = words and re.search(rf"^  (?!-){re.escape(words[0])} ", help_of(module), flags=re.MULTILINE)
    text = help_of(module, words[0]) if has_subcommand else help_of(module)
    assert [option for option in options if option not in text] == []
    if module == "launch.train":
        config, *overrides = words
        load_config(ROOT / config, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_path_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    paths = re.findall(r"\b((?:configs|docs|slurm|tests)/[\w./]+\w)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\bmake ([a-z]+)\b +#|`make ([a-z]+)`", page.read_text())}
    assert {name for pair in named for name in pair if name} <= targets
