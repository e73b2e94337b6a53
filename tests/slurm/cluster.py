"""A real, throw-away Slurm cluster on one host: munged, slurmctld and N slurmd from Debian's packages, as root.

The controller and every node are namespaces of their own (hosts.py), so that jobs see what they see on hosts:
`hostname` is the node's, loopback is not shared, nodes reach each other by one switch and nothing beyond it. This host
is the login node: sbatch and the others work here with SLURM_CONF=FOLDER/slurm.conf. Clusters in other folders live
side by side; what a killed process has left behind is removed by the next `up` in its folder. For developers:

    python -m tests.slurm.cluster [--folder FOLDER] up [N] | down | status | kill-node NODE | start-node NODE

Slurm looks at time limits every 30 seconds and sends --signal up to 60 seconds early: a job with --time=1 --signal=USR1
gets it within 30 seconds, and its end within 90. A node that died is noticed after 10 to 16 seconds; a job that is
requeued starts again 6 seconds later.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.slurm.hosts import PATH, Hosts, HostsError, forbidden

_COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
_FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


class ClusterError(Exception):
    """A command was refused, or something did not happen in time; says what Slurm says of it."""


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` knows of a job."""

    id: int
    state: str
    reason: str
    restarts: int
    exit_code: int
    """Of the batch script; -N if signal N ended it."""
    nodes: list[str]
    comment: str
    stdout: Path


def missing() -> str | None:
    """Why no cluster can be started here, in one line; None if it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a test cluster needs root on Linux: its nodes are network namespaces"
    absent = [command for command in _COMMANDS if shutil.which(command, path=PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed; `make slurm`, as root, does it on Debian"
    return forbidden()


class Cluster:
    """A cluster of `nodes` nodes, node1, node2, ...; a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 4,
        cpus: int = 4,
        gpus: int = 2,
        partitions: Sequence[str] = ("debug",),
        names: bool = True,
        ipv6: bool = False,
        decoy: bool = False,
        kill_wait: int = 5,
        slurmd_timeout: int = 10,
        extra: Sequence[str] = (),
    ) -> None:
        """folder: for state, configuration and logs; a short path, it holds sockets; removed by `down`.

        cpus, gpus: of a node; neither need exist, GPUs are copies of /dev/null.
        partitions: "NAME [slurm.conf settings]" each, such as "low PriorityTier=1 GraceTime=10"; the first is the
        default. extra: more lines for slurm.conf; a key given there replaces the one here.
        names: node names resolve on the nodes; if not, they resolve nowhere.
        ipv6: nodes have IPv6 addresses too. decoy: nodes have another interface, in front of the one that leads to
        the others, with an address that nobody else can reach.
        kill_wait: seconds between SIGTERM and SIGKILL. slurmd_timeout: seconds until a silent node is down.
        """
        self.folder, self.nodes = folder.absolute(), [f"node{i}" for i in range(1, nodes + 1)]
        self._conf = self.folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self._conf)}
        tag = "mg" + hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:8]
        self.hosts = Hosts(tag, self.nodes, names, ipv6, decoy)
        self._cpus, self._gpus, self._partitions, self._extra = cpus, gpus, partitions, extra
        self._kill_wait, self._slurmd_timeout = kill_wait, slurmd_timeout
        self._lock: int | None = None

    def __enter__(self) -> "Cluster":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- the life of the cluster

    def up(self) -> None:
        """Start it, in place of what an earlier one has left in this folder."""
        if len(str(self.folder)) > 60:
            raise ClusterError(
                f"{self.folder} is too long a path for the sockets in it; take one of up to 60 characters"
            )
        self._claim()
        self._clear()
        try:
            self._conf.touch()
            self.hosts.create()
            self._write_files()
            self._start("controller", "munged", "--force", *self._munge_files())
            self._start("controller", "slurmctld", "-f", str(self._conf))
            for node in self.nodes:
                self._start(node, "slurmd", "-f", str(self._conf), "-N", node)
            self.until(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), 20, "the nodes are not ready")
        except BaseException:  # Ctrl-C, too, must leave nothing behind; it goes on to the caller
            self.down()
            raise

    def down(self) -> None:
        """Kill all its processes and remove its namespaces, interfaces and folder."""
        self._claim()
        self._clear()
        self.folder.rmdir()
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None

    def kill_node(self, node: str, silently: bool = False) -> None:
        """Cut its power: SIGKILL for slurmd and all that jobs run there, at one moment.

        silently: take its network down first, so that the others see no closed connections, only silence.
        """
        if silently:
            self.hosts.plug(node, "down")
        self.hosts.kill(node)

    def start_node(self, node: str) -> None:
        """Start it after kill_node."""
        self.hosts.plug(node, "up")
        self._start(node, "slurmd", "-f", str(self._conf), "-N", node)

    # ---- what users do

    def sbatch(
        self,
        script: str | Path,
        *arguments: object,
        options: Iterable[str] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a script (a path) with its arguments; options: sbatch's own. The job's id.

        env: variables beside this process's. Raises ClusterError with what sbatch says if it refuses.
        """
        command = ["sbatch", "--parsable", *options, str(script), *map(str, arguments)]
        return int(self.run(*command, cwd=cwd, env=env).split(";")[0])

    def scontrol(self, *arguments: object) -> str:
        """What `scontrol ARGUMENTS` prints."""
        return self.run("scontrol", *arguments)

    def scancel(self, *arguments: object) -> None:
        """`scancel ARGUMENTS`: job ids and options."""
        self.run("scancel", *arguments)

    def run(
        self, *command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> str:
        """What a command on the login node prints. Raises ClusterError with its stderr if it fails."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        variables = inherited | self.environment | dict(env or {})
        try:
            done = subprocess.run(
                list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{' '.join(map(str, command))} has not ended after {timeout} s") from None
        if done.returncode:
            raise ClusterError(done.stderr.strip() or f"{command[0]} ended with exit code {done.returncode}")
        return done.stdout

    def job(self, job_id: int) -> Job:
        """What Slurm knows of a job, finished ones too."""
        text = self.scontrol("show", "job", "--oneliner", job_id)

        def value(key: str) -> str:
            found = re.search(rf"(?:^| ){key}=(.*?)(?= [A-Z][A-Za-z:/]*=|\s*$)", text)
            return found[1].strip() if found else ""

        code, number = value("ExitCode").split(":")
        nodes = value("NodeList")
        return Job(
            id=job_id,
            state=value("JobState"),
            reason=value("Reason"),
            restarts=int(value("Restarts")),
            exit_code=-int(number) or int(code),
            nodes=self.scontrol("show", "hostnames", nodes).split() if nodes not in ("", "(null)") else [],
            comment=value("Comment"),
            stdout=Path(value("StdOut")),
        )

    def output(self, job_id: int) -> str:
        """What a job's batch script has printed so far."""
        path = self.job(job_id).stdout
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job_id: int, states: str | Sequence[str] = _FINISHED, timeout: float = 60) -> Job:
        """Wait until a job is in one of these states; the job then.

        Raises ClusterError after `timeout` seconds, and at once when the job has finished in another state.
        """
        states = (states,) if isinstance(states, str) else states
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id)).state not in states:
            if job.state in _FINISHED or time.monotonic() > deadline:
                raise ClusterError(f"job {job_id} is not {' or '.join(states)}, but {job}{self.report(job_id)}")
            time.sleep(0.1)
        return job

    def until(self, condition: Callable[[], bool], timeout: float, message: str) -> None:
        """Wait until a condition holds. Raises ClusterError with the message and the report after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with contextlib.suppress(ClusterError):  # Slurm may not answer yet
                if condition():
                    return
            time.sleep(0.05)
        raise ClusterError(message + self.report())

    def node_states(self) -> dict[str, str]:
        """idle, alloc, mix, down, ... of each node."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)

    def report(self, job_id: int | None = None) -> str:
        """The ends of the logs and Slurm's view of nodes and jobs, for messages of failure."""
        questions: dict[str, Callable[[], str]] = {
            "nodes": lambda: self.run("sinfo", "--Node", "--long"),
            "jobs": lambda: self.run("squeue", "--all", "--states=all"),
        }
        if job_id is not None:
            questions["job's output"] = lambda: self.output(job_id)
        parts = {}
        for name, question in questions.items():
            try:
                parts[name] = question()
            except ClusterError as error:
                parts[name] = str(error)
        parts |= {path.name: path.read_text(errors="replace") for path in sorted((self.folder / "log").glob("*.log"))}
        tails = {name: "\n".join(text.splitlines()[-15:]) for name, text in parts.items()}
        return "".join(f"\n--- {name}:\n{tail}" for name, tail in tails.items())

    # ---- how it is made

    def _claim(self) -> None:
        """Lock the folder: another process must not take down, or bring up again, what this one uses."""
        while self._lock is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.folder.exists() and os.path.samestat(os.fstat(lock), self.folder.stat()):
                    self._lock = lock
            except BlockingIOError:
                raise ClusterError(f"the cluster in {self.folder} is in use by another process") from None
            finally:
                if self._lock is None:  # refused, or of a folder that has just been removed
                    os.close(lock)

    def _clear(self) -> None:
        """Remove all that a cluster in this folder has made but the folder itself."""
        if any(self.folder.iterdir()) and not self._conf.exists():
            raise ClusterError(f"{self.folder} holds other things than a cluster; name a new folder")
        self.hosts.remove()
        for path in sorted(self.folder.iterdir(), key=lambda path: path == self._conf):  # the mark comes last
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write_files(self) -> None:
        folder = self.folder
        for name in ("log", "state", "dev", *(f"{kind}/{node}" for node in self.nodes for kind in ("spool", "tmp"))):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"controller({self.hosts.address('controller')})",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            # A requeued job starts again when its old credential has expired; 5 seconds is the least that Slurm takes.
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "TmpFS": f"{folder}/tmp/%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{folder}/log/slurmd-%n.log",
            "SlurmdParameters": "config_overrides",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "PropagateResourceLimits": "NONE",
            "ReturnToService": "2",
            "KillWait": str(self._kill_wait),
            "SlurmdTimeout": str(self._slurmd_timeout),
            "MessageTimeout": "5",  # a node that died is noticed in 10 to 16 seconds
            "MinJobAge": "86400",
            "EnforcePartLimits": "ALL",
            "GresTypes": "gpu",
        }
        settings |= dict(line.split("=", 1) for line in self._extra)
        lines = [f"{key}={value}" for key, value in settings.items()]
        gpus = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        for node in self.nodes:
            lines.append(
                f"NodeName={node} NodeAddr={self.hosts.address(node)} CPUs={self._cpus} RealMemory=16000{gpus}"
            )
        for i, partition in enumerate(self._partitions):
            lines.append(f"PartitionName={partition} Nodes=ALL Default={'NO' if i else 'YES'} MaxTime=INFINITE")
        self._conf.write_text("\n".join(lines) + "\n")
        # slurmd loads a plugin for cgroups even if nothing uses them; this one loads where there are none.
        self._conf.with_name("cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = [folder / "dev" / f"gpu{i}" for i in range(self._gpus)]
        for device in devices:
            os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        self._conf.with_name("gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))

    def _munge_files(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder}/{name}" for option, name in (files | {"log-file": "log/munged.log"}).items()]

    def _start(self, host: str, *daemon: str) -> None:
        if self.hosts.start(host, daemon, self.folder / "log" / f"start-{daemon[0]}-{host}.log"):
            raise ClusterError(f"{daemon[0]} does not start on {host}{self.report()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/megagpt-slurm"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up").add_argument("nodes", type=int, nargs="?", default=4)
    commands.add_parser("down")
    commands.add_parser("status")
    for command in ("kill-node", "start-node"):
        commands.add_parser(command).add_argument("node")
    options = parser.parse_args()
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    cluster = Cluster(options.folder, nodes=getattr(options, "nodes", 0))
    try:
        if options.command == "up":
            cluster.up()
            print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
        elif options.command == "down":
            cluster.down()
        elif options.command == "status":
            print(cluster.report())
        elif options.command == "kill-node":
            cluster.kill_node(options.node)
        else:
            cluster.start_node(options.node)
    except (ClusterError, HostsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
