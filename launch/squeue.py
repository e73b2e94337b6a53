"""What Slurm says of jobs, by one call of squeue: its --format is the same in every version, its --json is not."""

import os
import re
import shutil
import subprocess
from collections.abc import Collection
from datetime import datetime

from megagpt.training.history import printable
from megagpt.training.status import SlurmAnswer, SlurmJob

TIMEOUT_SECONDS = 10.0
"""squeue itself would go on for minutes to look for a controller that does not answer."""

_FORMAT = "%A|%i|%T|%r|%D|%N|%L|%S"  # id, id of an array's task, state, reason, node count, nodes, time left, start


def ask_slurm(job_ids: Collection[str]) -> dict[str, SlurmAnswer]:
    """The answer about each of these jobs."""
    if odd := [job_id for job_id in job_ids if not re.fullmatch(r"\d+(_\d+)?", job_id)]:
        answers = dict.fromkeys(odd, SlurmAnswer(problem="is no id of a Slurm job"))
        return answers | ask_slurm([job_id for job_id in job_ids if job_id not in odd])
    if not job_ids:
        return {}
    if shutil.which("squeue") is None:
        return dict.fromkeys(job_ids, SlurmAnswer(problem="squeue is not installed here"))
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}", f"--format={_FORMAT}"]
    # SQUEUE_* are options that a user has set for his own eyes: filters, formats, other clusters.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    environment["SLURM_TIME_FORMAT"] = "standard"
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return dict.fromkeys(job_ids, SlurmAnswer(problem=f"squeue has not answered in {TIMEOUT_SECONDS:.0f} s"))
    except OSError as error:
        return dict.fromkeys(job_ids, SlurmAnswer(problem=f"squeue does not start: {error.strerror}"))
    if done.returncode and "Invalid job id" not in done.stderr:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return dict.fromkeys(job_ids, SlurmAnswer(problem=f"squeue fails: {printable(words[-1])}"))
    jobs = _jobs(done.stdout)
    return {job_id: SlurmAnswer(jobs.get(job_id)) for job_id in job_ids}


def _jobs(output: str) -> dict[str, SlurmJob]:
    """The jobs of squeue's lines, under their ids and, of an array's tasks, also under ARRAY_TASK."""
    jobs: dict[str, SlurmJob] = {}
    for line in output.splitlines():
        fields = [printable(text.strip()) for text in line.split("|")]
        if len(fields) != 8:
            continue  # no line of the format that was asked for, such as a site's greeting
        own_id, task_id, state, reason, count, nodes, left, start = fields
        job = SlurmJob(
            id=own_id,
            state=state,
            reason="" if reason == "None" else reason,
            node_count=int(count) if count.isdigit() else None,
            nodes=nodes,
            time_left="" if left in ("INVALID", "NOT_SET", "N/A") else left,
            start=_moment(start),
        )
        jobs |= {own_id: job, task_id: job}
    return jobs


def _moment(text: str) -> float | None:
    """Seconds since 1970 of what Slurm writes in local time; None: N/A."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
