"""python -m tools.report: pictures and one page of what training runs did."""

from pathlib import Path
from typing import Annotated

import typer

from megagpt.training.report import write_report
from tools.command import run_command, single_command

PROGRAM = "python -m tools.report"


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs (train.run_dir).")],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; default: RUN/report of one run, ./report of several.")
    ] = None,
) -> None:
    """Draw loss, throughput, gradient norm, goodput and where the time went: report.html and PNG files.

    report.html holds everything, needs no network and shows the runs side by side. A run may still be going.

    Example: python -m tools.report runs/small runs/large --output comparison
    """
    folder = output or (runs[0] / "report" if len(runs) == 1 else Path("report"))
    for summary in write_report(runs, folder):
        losses = "".join(f", {name} {last.loss:.4f}" for name, last in summary.last.items())
        print(f"{summary.name}: {summary.steps:,} steps{losses}")
    print(folder / "report.html")


if __name__ == "__main__":
    run_command(single_command(main, PROGRAM), PROGRAM)
