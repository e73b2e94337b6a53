"""The folder of a scaling study: what it is, its runs, and every attempt at each, failures included.

folder/
    study.json                the study, whether strong, weak or laws, who starts its runs, the names of the runs
    entries/NAME/entry.json   one run: ranks, nodes, configuration, and its attempts with what became of them
    entries/NAME/config.yaml  what launch.train is given, with train.run_dir=entries/NAME/attempt_N
    entries/NAME/attempt_N/   a run folder, and output.log
    report/                   see megagpt.scaling.report
    .lock                     held by the command that starts runs

A NAME ends with the hash of what the run is, so a folder goes on with its own study only. Nothing is deleted but the
checkpoints of finished runs.
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megagpt.config import RunConfig, save_config
from megagpt.data.atomic import replace_file
from megagpt.errors import UsageError, UserError
from megagpt.scaling.laws.study import LawsConfig
from megagpt.scaling.study import Entry, Kind, StudyConfig
from megagpt.training.metrics import read_metrics

Launcher = Literal["torchrun", "slurm"]
LAUNCHERS = {"torchrun": "on this machine", "slurm": "through Slurm"}

_TAIL_BYTES = 200_000
_LONGEST_ERROR = 300


class _Stored(BaseModel):
    """Common behaviour of what is stored as JSON."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Attempt(_Stored):
    """One try at a run; its folder is a run folder."""

    number: int
    """Counts from 1."""
    state: Literal["running", "finished", "failed"] = "running"
    """running: started or queued, and its end is not known yet."""
    started: float
    """Seconds since 1970, of the start or the submission."""
    ended: float | None = None
    """Seconds since 1970 when the end was seen."""
    job_id: str | None = None
    """Of Slurm."""
    exit_code: int | None = None
    """Of the rank that failed first, -9 for SIGKILL; None: not known."""
    error: str | None = None
    """The last error line of its output."""
    shared_cores: int | None = None
    """CPU cores that the ranks had to share, if there were fewer than ranks."""


class StoredEntry(_Stored):
    """One run of a study, as entry.json has it."""

    curve: str
    ranks: int
    nodes: int
    repeat: int
    identity: str
    config: dict[str, Any]
    """Resolved, without train.run_dir."""
    attempts: list[Attempt] = []

    def run_config(self) -> RunConfig:
        """The configuration."""
        return RunConfig.model_validate(self.config)


class StoredStudy(_Stored):
    """study.json."""

    kind: Kind
    launcher: Launcher
    source: str
    """The file that the study was read from."""
    versions: dict[str, str]
    """Of the libraries that decide how fast a run is, here."""
    study: StudyConfig | LawsConfig
    entries: list[str]
    """Names of the runs, curve by curve."""

    @property
    def timing(self) -> StudyConfig:
        """The study, of a strong or weak one."""
        assert isinstance(self.study, StudyConfig)
        return self.study

    @property
    def ladder(self) -> LawsConfig:
        """The study, of one of scaling laws."""
        assert isinstance(self.study, LawsConfig)
        return self.study


class EntryFolder:
    """One run of a study in its folder."""

    def __init__(self, path: Path, stored: StoredEntry) -> None:
        self.path, self.stored = path.absolute(), stored

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.path.name

    @property
    def title(self) -> str:
        """For people: "zero_stage 1, 4 ranks"."""
        stored = self.stored
        run = f", run {stored.repeat}" if stored.repeat > 1 else ""
        return f"{stored.curve}, {stored.ranks} rank{'s' * (stored.ranks > 1)}{run}"

    @property
    def last(self) -> Attempt | None:
        """The newest attempt."""
        return self.stored.attempts[-1] if self.stored.attempts else None

    @property
    def state(self) -> str:
        """finished, running, failed, or missing: not attempted yet."""
        return self.last.state if self.last else "missing"

    def run_dir(self, attempt: Attempt) -> Path:
        """The run folder of an attempt."""
        return self.path / f"attempt_{attempt.number}"

    def log(self, attempt: Attempt) -> Path:
        """What the ranks of an attempt print."""
        return self.run_dir(attempt) / "output.log"

    def arguments(self, attempt: Attempt) -> list[str]:
        """Of launch.train."""
        return [str(self.path / "config.yaml"), f"train.run_dir={self.run_dir(attempt)}"]

    def is_finished(self, attempt: Attempt) -> bool:
        """Whether its metrics end with the run's last step."""
        path = self.run_dir(attempt) / "metrics.jsonl"
        if not path.is_file():
            return False
        ends = [record for record in read_metrics(path) if record["kind"] in ("start", "stop")]
        return bool(ends) and ends[-1].get("reason") == "finished"

    def begin(self, shared_cores: int | None = None) -> Attempt:
        """A new attempt, with an empty run folder."""
        attempt = Attempt(number=len(self.stored.attempts) + 1, started=time.time(), shared_cores=shared_cores)
        with _writing(self.path):
            self.run_dir(attempt).mkdir(exist_ok=True)
        self.stored.attempts.append(attempt)
        self.save()
        return attempt

    def end(
        self,
        attempt: Attempt,
        exit_code: int | None,
        keep_checkpoints: bool,
        error: str | None = None,
        otherwise: str = "it ended before its last step, without a word",
    ) -> None:
        """Write down how an attempt ended. It finished if its metrics came to the last step and nothing says otherwise.

        error: what is known to have gone wrong; else the output says it, or `otherwise` does.
        """
        finished = error is None and not exit_code and self.is_finished(attempt)
        attempt.state = "finished" if finished else "failed"
        if exit_code is not None and exit_code < 0:
            otherwise = f"killed by {signal.Signals(-exit_code).name}"
        attempt.error = None if finished else error or last_error(self.log(attempt)) or otherwise
        attempt.ended, attempt.exit_code = time.time(), exit_code
        if finished and not keep_checkpoints:
            shutil.rmtree(self.run_dir(attempt) / "checkpoints", ignore_errors=True)
        self.save()

    def save(self) -> None:
        """Write entry.json."""
        with _writing(self.path):
            replace_file(self.path / "entry.json", (self.stored.model_dump_json(indent=1) + "\n").encode())


class StudyFolder:
    """A study and its runs."""

    def __init__(self, path: Path, stored: StoredStudy, entries: list[EntryFolder]) -> None:
        self.path, self.stored, self.entries = path, stored, entries

    @classmethod
    def open(cls, path: Path) -> "StudyFolder":
        """An existing one. Raises UsageError for a folder without a study, UserError for a damaged one."""
        if not (path / "study.json").is_file():
            raise UsageError(f"{path}: no study: it has no study.json; give the --output of a study")
        stored = _read(path / "study.json", StoredStudy)
        entries = [path / "entries" / name for name in stored.entries]
        return cls(path, stored, [EntryFolder(entry, _read(entry / "entry.json", StoredEntry)) for entry in entries])

    @classmethod
    def create(cls, path: Path, stored: StoredStudy, planned: Sequence[Entry]) -> "StudyFolder":
        """The folder for these runs, empty or as far as an earlier command came; to be called inside `locked`.

        Raises UsageError if it holds something else: another study's runs, or a study of the other kind.
        """
        known: dict[str, EntryFolder] = {}
        if (path / "study.json").exists():
            before = cls.open(path)
            if before.stored.kind != stored.kind:
                raise UsageError(f"--output {path}: holds a {before.stored.kind} study; choose another folder")
            if before.stored.launcher != stored.launcher:
                ran = LAUNCHERS[before.stored.launcher]
                raise UsageError(f"--output {path}: its runs were started {ran}; go on so, or choose another folder")
            known = {entry.name: entry for entry in before.entries}
            if foreign := [entry for entry in before.entries if entry.name not in {one.name for one in planned}]:
                raise UsageError(_describe_foreign(path, foreign, planned))
        with _writing(path):
            entries = [known.get(entry.name) or _new_entry(path / "entries" / entry.name, entry) for entry in planned]
            replace_file(path / "study.json", (stored.model_dump_json(indent=1) + "\n").encode())
        return cls(path, stored, entries)

    @property
    def curves(self) -> list[str]:
        """Names of the curves, in the study's order."""
        return list(dict.fromkeys(entry.stored.curve for entry in self.entries))

    def to_run(self) -> list[EntryFolder]:
        """The runs that are missing or failed."""
        return [entry for entry in self.entries if entry.state in ("missing", "failed")]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only command that starts runs of the study in `path`, a new folder or one with a study.

    Raises UsageError for a folder with other files, UserError naming the other command.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"--output {path}: is a file; name a folder for the study")
    if path.exists() and {file.name for file in path.iterdir()} - {".lock"} and not (path / "study.json").exists():
        raise UsageError(f"--output {path}: has files, but no study; choose another folder")
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+", encoding="utf-8")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(f"--output {path}: another command runs this study ({lock.read().strip()})") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def is_locked(path: Path) -> bool:
    """Whether a command is starting runs of the study in `path` now."""
    try:
        with (path / ".lock").open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def last_error(log: Path) -> str | None:
    """The line of a log that says best why its program failed: the last `error: ...`, or an exception, or any error."""
    if not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if "ChildFailedError" not in line and "SignalException" not in line]
    exception = r"[\w.]*(?:Error|Exception|Interrupt)\b(?::|$)"
    for pattern in (r"error: ", exception, r"slurmstepd\S* error: ", r".*\b(?:error|ERROR): "):
        if found := [line for line in ours if re.match(pattern, line)]:
            return found[-1].removeprefix("error: ")[:_LONGEST_ERROR]
    return None


def failed_rank_code(log: Path) -> int | None:
    """The exit code of the rank that failed first, from the summary that torchrun ends its log with."""
    if not log.is_file():
        return None
    codes = re.findall(r"^\s*exitcode\s*: (-?\d+)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return int(codes[-1]) if codes else None


def _read(path: Path, schema: type[Any]) -> Any:
    try:
        return schema.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; the study is damaged") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {where}: {problem['msg']}; damaged, or of another version") from None


def _new_entry(path: Path, entry: Entry) -> EntryFolder:
    path.mkdir(parents=True, exist_ok=True)
    stored = StoredEntry(
        curve=entry.curve,
        ranks=entry.ranks,
        nodes=entry.nodes,
        repeat=entry.repeat,
        identity=entry.identity,
        config=entry.described(),
    )
    save_config(entry.config, path / "config.yaml")
    folder = EntryFolder(path, stored)
    folder.save()
    return folder


def _describe_foreign(path: Path, foreign: Sequence[EntryFolder], planned: Sequence[Entry]) -> str:
    """Which run does not belong, and how it differs from the one that the study has in its place."""
    first = foreign[0]
    stored = first.stored
    others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    place = (stored.curve, stored.ranks, stored.nodes, stored.repeat)
    same = [entry for entry in planned if (entry.curve, entry.ranks, entry.nodes, entry.repeat) == place]
    why = "which this study does not have"
    if same:
        there, here = _flat(stored.config), _flat(same[0].described())
        differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        why = ", ".join(f"{key} {there.get(key)!r} there and {here.get(key)!r} here" for key in differing[:3])
        why = f"with another configuration ({why}{', ...' * (len(differing) > 3)})"
    return f"--output {path}: holds the run {first.name}{others}, {why}; choose another folder"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
