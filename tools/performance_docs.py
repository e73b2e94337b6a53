"""python -m tools.performance_docs: write docs/performance.md and its picture from the results in docs/measurements."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megagpt.benchmark.measurements import read_measurement
from megagpt.benchmark.page import GROWTH, draw_growth, is_drawn_from, render
from megagpt.errors import UserError
from tools.command import run_command, single_command

PROGRAM = "python -m tools.performance_docs"
PAGE, PICTURE = "performance.md", "performance_growth.png"


def main(
    folder: Annotated[Path, typer.Option(help="Has the template and the results; where the page is written.")] = Path(
        "docs"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if page or picture is not current.")
    ] = False,
) -> None:
    """Write the page of measured speed from performance.md.j2 and measurements/*.json.

    Example: python -m tools.performance_docs --check
    """
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # drawing needs none, but imports DeepSpeed, which would look for one
    page, growth = render(folder), read_measurement(folder / "measurements" / f"{GROWTH}.json")
    paths = (folder / PAGE, folder / PICTURE)
    try:
        if not check:
            paths[0].write_text(page, encoding="utf-8")
            if growth:
                paths[1].write_bytes(draw_growth(growth))
            return
        current = (
            paths[0].read_text(encoding="utf-8") == page,
            not growth or is_drawn_from(paths[1].read_bytes(), growth),
        )
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    for path, is_current in zip(paths, current, strict=True):
        if not is_current:
            raise UserError(f"{path}: not current; run {PROGRAM}")


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
