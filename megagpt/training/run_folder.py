"""The folder of a run: one run at a time writes it.

run_dir/
    config.yaml       the resolved configuration
    tokenizer.json    how tokens become text again (and beside it the vocabulary's file, if it is an own one)
    metrics.jsonl     see megagpt.training.metrics
    checkpoints/      see megagpt.training.checkpoint
    logs/rank_*.log   (of a Slurm job: logs/JOBID/rank_*.log)
    .lock             held by rank 0 of the run that is writing
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagpt.config import save_config
from megagpt.config.schema import RunConfig
from megagpt.data.atomic import replace_file
from megagpt.data.loader import TrainingData
from megagpt.errors import UserError
from megagpt.training.metrics import drop_records_after


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder; raises UserError naming the process that holds it already.

    A POSIX lock: it works across nodes where the file system has locks (NFSv4, Lustre with flock), and ends with the
    process, however that dies.
    """
    with writable(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the run
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"train.run_dir {run_dir}: another run is writing to it ({lock.read().strip()}); "
                "stop that one, or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"train.run_dir {run_dir}: its file system gives no locks ({error.strerror}), without which two runs "
                "could write into it; choose a folder on another one"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def prepare(config: RunConfig, data: TrainingData, first_step: int, evaluates_again: bool = False) -> None:
    """Write config.yaml and the tokenizer; drop the metrics of steps after `first_step`, which will be done again.

    evaluates_again: so will the evaluation of `first_step`.
    """
    run_dir, tokenizer = Path(config.train.run_dir), data.tokenizer
    with writable(run_dir):
        save_config(config, run_dir / "config.yaml")
        if tokenizer:
            if tokenizer.file:
                shutil.copyfile(_manifest_folder(data) / tokenizer.file, run_dir / tokenizer.file)
            replace_file(run_dir / "tokenizer.json", (tokenizer.model_dump_json(indent=1) + "\n").encode())
        drop_records_after(run_dir / "metrics.jsonl", first_step, evaluates_again)


@contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the run folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"train.run_dir {run_dir}: {error.strerror}: {error.filename}") from error


def _manifest_folder(data: TrainingData) -> Path:
    """Folder of the first training dataset that has a manifest, and with it the vocabulary's file."""
    folders = (Path(dataset.prefix).parent for dataset in data.datasets)
    return next(folder for folder in folders if (folder / "manifest.json").exists())
