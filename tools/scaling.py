"""python -m tools.scaling: how a run scales over ranks and nodes, measured, fitted and extrapolated."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megagpt.errors import UsageError, UserError
from megagpt.scaling.devices import DEFAULT_NETWORK, parse_network
from megagpt.scaling.experiments import StoredStudy, StudyFolder, is_locked, locked
from megagpt.scaling.laws.report import check_and_keep_coordinates, write_laws_report
from megagpt.scaling.laws.study import LawsConfig, load_laws, plan_laws, rung
from megagpt.scaling.prediction import Predictor
from megagpt.scaling.report import DEFAULT_PREDICTOR, versions, write_report
from megagpt.scaling.slurm import Slurm
from megagpt.scaling.study import Entry, Kind, StudyConfig, load_study, plan
from tools.command import end_when_asked_to, run_command
from tools.simulate import simulate

PROGRAM = "python -m tools.scaling"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

LawsFile = Annotated[Path, typer.Argument(metavar="STUDY", help="A ladder, a YAML file: configs/scaling/laws_cpu.yaml")]
StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="A study, a YAML file: configs/scaling/cpu.yaml")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...",
        help="Changes to the study; after -- options of sbatch for all jobs: --partition=gpu --time=30",
    ),
]
Output = Annotated[Path, typer.Option(help="Folder of the study; what is in it already is not run again.")]
UseSlurm = Annotated[bool, typer.Option("--slurm", help="Submit one job a run, and one that reports after all.")]
CheckOnly = Annotated[bool, typer.Option("--check", help="Say what would run, and stop.")]


@app.callback()
def main() -> None:
    """Measure how training scales with the number of ranks, and report it.

    Example: python -m tools.scaling strong configs/scaling/cpu.yaml --output runs/scaling/cpu
    """


@app.command()
def strong(
    study: StudyFile, output: Output, words: Words = None, slurm: UseSlurm = False, check: CheckOnly = False
) -> None:
    """The same global batch on every number of ranks.

    A study that was stopped goes on with the same command; runs that failed are tried again.

    Example: python -m tools.scaling strong configs/scaling/cpu.yaml --output runs/scaling/strong ranks=[1,2]
    """
    _run_timing("strong", study, output, words or [], slurm, check)


@app.command()
def weak(
    study: StudyFile, output: Output, words: Words = None, slurm: UseSlurm = False, check: CheckOnly = False
) -> None:
    """The same number of sequences for each rank, so a global batch that grows with the ranks.

    A study that was stopped goes on with the same command; runs that failed are tried again.

    Example: python -m tools.scaling weak configs/scaling/cpu.yaml --output runs/scaling/weak lr_scaling=sqrt
    """
    _run_timing("weak", study, output, words or [], slurm, check)


@app.command()
def laws(
    study: LawsFile,
    output: Output,
    words: Words = None,
    slurm: UseSlurm = False,
    check: CheckOnly = False,
    coordinates: Annotated[
        bool,
        typer.Option("--coordinates", help="Only check, on the CPU, that activations change alike at all widths."),
    ] = False,
) -> None:
    """A ladder of model sizes and budgets, the law its losses follow, and the sizes that are best for a budget.

    A study that was stopped goes on with the same command; runs that failed are tried again, and the law is fitted to
    the others if they are enough.

    Example: python -m tools.scaling laws configs/scaling/laws_cpu.yaml --output runs/scaling/laws
    """
    overrides, options = _split(words or [])
    config = load_laws(study, overrides)
    entries = plan_laws(config)
    _check_place(config, entries, options, slurm)
    if check:
        for entry in entries:
            _, parameters, tokens, flops = rung(config, entry.curve, entry.config)
            steps, lr = entry.config.train.steps, entry.config.optimizer.lr
            _say(f"{entry.name}: N {parameters:,}, {steps:,} steps, D {tokens:,}, {flops:.3g} FLOPs, lr {lr:.3g}")
        return
    if coordinates:
        with locked(output):
            folder = StudyFolder.create(output, _stored("laws", study, config, entries, slurm), entries)
            check_and_keep_coordinates(folder)
        _report(folder)
        return
    _run("laws", study, config, entries, output, options, slurm)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The --output of a study.")],
    network: Annotated[
        str, typer.Option(help="For the plan's prediction: of one GPU to other nodes, 400gbps or 50GB/s.")
    ] = DEFAULT_NETWORK,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine, to predict runs on its CPU or unknown GPU, too.")
    ] = False,
) -> None:
    """Draw what a study has measured so far: FOLDER/report/study.html, PNG files, results.json.

    Example: python -m tools.scaling report runs/scaling/strong
    """
    study = StudyFolder.open(folder)
    if study.stored.launcher == "slurm":
        Slurm(_environment()).settle(study)
    elif not is_locked(folder):
        from megagpt.scaling.local import settle

        settle(study)
    measured = None
    if measure:
        from megagpt.planning.measure import measure_device

        measured = measure_device(study.entries[0].stored.run_config().train.precision)
    _report(study, Predictor(parse_network(network), measured))


def _run_timing(kind: Kind, file: Path, output: Path, words: list[str], use_slurm: bool, check: bool) -> None:
    overrides, options = _split(words)
    study = load_study(file, overrides)
    entries = plan(study, kind)
    _check_place(study, entries, options, use_slurm)
    if check:
        for entry in entries:
            ranks, nodes = (f"{n} {what}{'s' * (n > 1)}" for n, what in ((entry.ranks, "rank"), (entry.nodes, "node")))
            batch, lr = entry.config.train.global_batch_size, entry.config.optimizer.lr
            _say(f"{entry.name}: {ranks} on {nodes}, global batch {batch}, lr {lr:.3g}")
        return
    _run(kind, file, study, entries, output, options, use_slurm)


def _check_place(study: StudyConfig | LawsConfig, entries: list[Entry], options: list[str], use_slurm: bool) -> None:
    """Raises UsageError if these runs cannot be started here."""
    if options and not use_slurm:
        raise UsageError(f"{options[0]}: options of sbatch need --slurm")
    if use_slurm:
        Slurm(_environment(), options).check()
        return
    from megagpt.scaling.local import check_machine

    check_machine(study, entries)


def _run(
    kind: Kind,
    file: Path,
    study: StudyConfig | LawsConfig,
    entries: list[Entry],
    output: Path,
    options: list[str],
    use_slurm: bool,
) -> None:
    """What is missing or failed of a study, and its report."""
    end_when_asked_to()
    with locked(output):
        folder = StudyFolder.create(output, _stored(kind, file, study, entries, use_slurm), entries)
        if use_slurm:
            slurm = Slurm(_environment(), options)
            slurm.settle(folder)
            slurm.submit_all(folder, _say)
            return
        from megagpt.scaling.local import run_all, settle

        settle(folder)
        run_all(folder, _say)
    _report(folder)
    if failed := len(folder.to_run()):
        raise UserError(f"{failed} of {len(folder.entries)} runs failed; the same command tries them again")


def _stored(
    kind: Kind, file: Path, study: StudyConfig | LawsConfig, entries: list[Entry], use_slurm: bool
) -> StoredStudy:
    """What the folder of a study says of it."""
    return StoredStudy(
        kind=kind, launcher="slurm" if use_slurm else "torchrun", source=str(file), versions=versions(), study=study,
        entries=[entry.name for entry in entries],
    )  # fmt: skip


def _report(folder: StudyFolder, predictor: Predictor = DEFAULT_PREDICTOR) -> None:
    laws = folder.stored.kind == "laws"
    reported = write_laws_report(folder) if laws else write_report(folder, predictor)
    for line in [*reported.lines(), str(reported.page)]:
        _say(line)


def _say(line: str) -> None:
    print(line, flush=True)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Changes to the study, and options of sbatch: what begins with a dash, which only `--` lets through."""
    options = [word for word in words if word.startswith("-")]
    return [word for word in words if not word.startswith("-")], options


def _environment() -> dict[str, str]:
    """Without the variables of a Slurm job that this process is part of, which its own jobs would take for theirs."""
    foreign = ("SLURM_", "SRUN_", "OMP_NUM_THREADS") if "SLURM_JOB_ID" in os.environ else ()
    return {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(foreign)}


app.command()(simulate)


if __name__ == "__main__":
    run_command(app, PROGRAM)
