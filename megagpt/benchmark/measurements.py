"""Files of results: written whole or not at all, and read with one line of what is wrong with them."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.benchmark.figures import Figure, figures_of
from megagpt.benchmark.machine import HEAD, command_of
from megagpt.benchmark.targets import Target
from megagpt.data.atomic import replace_file
from megagpt.errors import UsageError, UserError


def check_writable(path: Path, option: str) -> None:
    """Before hours of work; makes its folder. Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(None, "Is a directory")
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror}; choose another") from error


def write_measurement(path: Path, head: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """As JSON. Raises UserError for what cannot be written."""
    assert not head.keys() & result.keys()
    try:
        replace_file(path, (json.dumps({**head, **result}, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def read_measurement(path: Path) -> dict[str, Any] | None:
    """None: there is no such file. Raises UserError for one that is no result of tools.benchmark."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: no JSON ({error}); measure it again or remove it") from None
    missing = [key for key in HEAD if key not in found] if isinstance(found, dict) else ["benchmark"]
    if missing:
        raise UserError(f"{path}: no result of tools.benchmark, as it has no {missing[0]!r}; measure it again")
    return found


def read_figures(path: Path, targets: Mapping[str, Target]) -> list[Figure]:
    """Those of a file, none if it is not there; `targets` as of `figures_of`. Raises UserError for a damaged one."""
    found = read_measurement(path)
    try:
        return figures_of(found, targets) if found else []
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); measure it again") from None


def date_measured(path: Path, words: Sequence[str]) -> str | None:
    """When `tools.benchmark` with these words was measured, if `path` is its result."""
    try:
        found = read_measurement(path)
    except UserError:
        return None  # damaged: to be measured again
    return found["date"] if found and found["command"] == command_of(words) else None
