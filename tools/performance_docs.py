"""python -m tools.performance_docs: write docs/performance.md and its pictures from results in docs/measurements."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megagpt.benchmark.measurements import read_measurement
from megagpt.benchmark.page import PICTURES, drawn, is_drawn_from, render
from megagpt.errors import UserError
from tools.command import run_command, single_command

PROGRAM = "python -m tools.performance_docs"
PAGE = "performance.md"


def main(
    folder: Annotated[Path, typer.Option(help="Has the template and the results; where the page is written.")] = Path(
        "docs"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the page or a picture is not current.")
    ] = False,
) -> None:
    """Write the page of measured speed from performance.md.j2 and measurements/*.json.

    Example: python -m tools.performance_docs --check
    """
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # drawing needs none, but imports DeepSpeed, which would look for one
    page = render(folder)
    results = {
        name: read_measurement(folder / "measurements" / f"{one.measurement}.json") for name, one in PICTURES.items()
    }
    pictures = {folder / name: (PICTURES[name], result) for name, result in results.items() if result}
    try:
        if check:
            _check(folder / PAGE, (folder / PAGE).read_text(encoding="utf-8") == page)
            for path, (picture, result) in pictures.items():
                _check(path, is_drawn_from(path.read_bytes(), picture, result))
            return
        (folder / PAGE).write_text(page, encoding="utf-8")
        for path, (picture, result) in pictures.items():
            path.write_bytes(drawn(picture, result))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error


def _check(path: Path, is_current: bool) -> None:
    if not is_current:
        raise UserError(f"{path}: not current; run {PROGRAM}")


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
