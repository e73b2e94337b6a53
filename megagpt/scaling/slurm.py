"""Runs of a scaling study as jobs of Slurm: one job a run, and a last one that reports when all have ended.

A job is `sbatch ... slurm/train.sh CONFIG train.run_dir=...`: that script starts launch.train with one task a rank. The
last job is `sbatch --dependency=afterany:... slurm/scaling.sh report FOLDER`. What became of a job is asked of squeue
and scontrol while the controller remembers it, then of the accounting, if there is one; a run whose metrics came to
their last step has finished whatever they say.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UsageError
from megagpt.scaling.experiments import EntryFolder, StudyFolder

TRAIN_SCRIPT, REPORT_SCRIPT = Path("slurm/train.sh"), Path("slurm/scaling.sh")

_ALIVE = {
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "RESIZING", "SIGNALING"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "STAGE_OUT"),
}


@dataclass(frozen=True)
class Slurm:
    """How jobs are submitted, and asked after."""

    environment: Mapping[str, str]
    """Of the commands; without the SLURM_* variables of a job that this process may be part of."""
    options: Sequence[str] = ()
    """Of every job: --partition=gpu --time=01:00:00. In training jobs they count more than the ones given here."""

    def check(self) -> None:
        """Raises UsageError if this is not the place to submit from."""
        for command in ("sbatch", "squeue"):
            if shutil.which(command, path=self.environment.get("PATH")) is None:
                raise UsageError(f"--slurm: there is no {command} here; start the study on a machine of the cluster")
        for script in (TRAIN_SCRIPT, REPORT_SCRIPT):
            if not script.is_file():
                raise UsageError(f"--slurm: no {script} here; start the command from the checkout")

    def settle(self, folder: StudyFolder) -> None:
        """Write down the end of jobs that have ended; where no Slurm can be asked, only of runs that have finished."""
        waiting = [(entry, entry.last) for entry in folder.entries if entry.state == "running" and entry.last]
        states = self._states() if waiting else None
        for entry, attempt in waiting:
            state = (states or {}).get(attempt.job_id or "")
            if entry.is_finished(attempt) or (states is not None and state not in _ALIVE):
                code = self._exit_code(attempt.job_id) if attempt.job_id else None
                how = f"the job ended: {state.lower()}" if state else "the job is gone, and Slurm remembers nothing"
                entry.end(attempt, code, folder.stored.study.keep_checkpoints, otherwise=how)

    def submit_all(self, folder: StudyFolder, report: Callable[[str], None]) -> None:
        """Submit what is missing or failed, and the job that reports; `report` is given a line about each."""
        todo = folder.to_run()
        waiting = [attempt.job_id for entry in folder.entries if entry.state == "running" and (attempt := entry.last)]
        report(f"{len(folder.entries)} runs, of which {len(folder.entries) - len(todo) - len(waiting)} are finished "
               f"and {len(waiting)} queued or running")  # fmt: skip
        jobs = [job for job in waiting if job]
        for entry in todo:
            job, error = self._submit(folder, entry)
            report(f"{entry.title}: {f'job {job}' if job else f'not accepted: {error}'}")
            jobs += [job] if job else []
        (folder.path / "report").mkdir(exist_ok=True)
        job, error = self._sbatch([
            *("sbatch", "--parsable", "--job-name=scaling-report", *self.options),
            *("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0"),
            f"--output={folder.path.absolute() / 'report' / 'output.log'}",
            *([f"--dependency=afterany:{':'.join(jobs)}"] if jobs else []),
            *(str(REPORT_SCRIPT), "report", str(folder.path.absolute())),
        ])  # fmt: skip
        report(f"report: job {job}, when all have ended" if job else f"report: not accepted: {error}")

    def _submit(self, folder: StudyFolder, entry: EntryFolder) -> tuple[str | None, str]:
        """(job id, "") or (None, why not); the attempt then has failed."""
        study, stored = folder.stored.study, entry.stored
        tasks = stored.ranks // stored.nodes
        gpus = 0 if stored.run_config().train.device == "cpu" else tasks
        attempt = entry.begin()
        job, error = self._sbatch([
            *("sbatch", "--parsable", f"--job-name=scaling-{stored.ranks}ranks", f"--output={entry.log(attempt)}"),
            *(f"--nodes={stored.nodes}", f"--ntasks-per-node={tasks}", f"--gpus-per-node={gpus}"),
            *([f"--cpus-per-task={study.cores_per_rank}"] if study.cores_per_rank else []),
            *(*self.options, str(TRAIN_SCRIPT), *entry.arguments(attempt)),
        ])  # fmt: skip
        attempt.job_id = job
        if job is None:
            entry.end(attempt, None, study.keep_checkpoints, error=error)
        entry.save()
        return job, error

    def _sbatch(self, command: Sequence[str]) -> tuple[str | None, str]:
        done = self._ask(command)
        job = done.stdout.strip().partition(";")[0]  # --parsable: "id" or "id;cluster"
        if done.returncode or not job:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return None, lines[-1] if lines else f"sbatch ended with exit code {done.returncode}"
        return job, ""

    def _states(self) -> dict[str, str] | None:
        """State by job id, of all jobs that the controller remembers; None: there is none to ask."""
        done = self._ask(["squeue", "--noheader", "--me", "--states=all", "--format=%i %T"])
        if done.returncode:
            return None
        return {job: state for job, _, state in (line.strip().partition(" ") for line in done.stdout.splitlines())}

    def _exit_code(self, job: str) -> int | None:
        """Of an ended job, -N for signal N; None: nobody knows it any more."""
        text = self._ask(["scontrol", "--oneliner", "show", "job", job]).stdout
        found = re.search(r"\bExitCode=(\d+):(\d+)", text)
        if found is None:
            text = self._ask(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}",
                              "--format=ExitCode"]).stdout  # fmt: skip
            found = re.search(r"^(\d+):(\d+)", text)
        if found is None:
            return None
        return int(found[1]) or -int(found[2])

    def _ask(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(self.environment))
        except FileNotFoundError:
            return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: not found")
