"""A real, throw-away Slurm cluster on one host: munged, slurmctld and N slurmd from Debian's packages, as root.

Every node, and the controller, is a network and a UTS namespace of its own, so that jobs see what they see on hosts:
`hostname` is the node's, loopback is not shared, nodes reach each other through one switch, and nothing lies beyond it.

    namespace TAG-controller   slurmctld, munged, and the bridge (the switch) with 10.x.y.1
    namespace TAG-nodeI        slurmd and all that jobs run there: 10.x.y.(10+I) [and fd00:x:y::(10+I)]
    the host, a login node     10.x.y.254 on interface TAG: sbatch, scontrol, ... with SLURM_CONF=FOLDER/slurm.conf

TAG comes from the folder's name: clusters in other folders live side by side, and what a killed process has left
behind is found and removed by the next `up` in its folder. For developers:

    python -m tests.slurm.cluster [--folder FOLDER] up [N] | down | status | kill-node NODE | start-node NODE
"""

import argparse
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare")
_NETNS = Path("/run/netns")  # of `ip netns`
_FILES = Path("/etc/netns")  # NAME/hosts there is /etc/hosts in namespace NAME
_FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


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
    absent = [command for command in _COMMANDS if shutil.which(command, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed; `make slurm`, as root, does it on Debian"
    with tempfile.TemporaryDirectory() as folder:
        probe = (
            "ip link add bridge0 type bridge && ip link add veth0 type veth peer name veth1 && "
            f"mknod {folder}/gpu0 c 1 3 && mount -t tmpfs none {folder}"
        )
        done = subprocess.run(
            ["unshare", "--net", "--uts", "--mount", "sh", "-c", probe],
            capture_output=True, text=True, env={"PATH": _PATH},
        )  # fmt: skip
    return f"no namespaces, bridges or device nodes here: {done.stderr.strip()}" if done.returncode else None


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
        self.folder, self.nodes = folder, [f"node{i}" for i in range(1, nodes + 1)]
        self.tag = "mg" + hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]
        self.interface = "eth1" if decoy else "eth0"
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._cpus, self._gpus, self._partitions, self._extra = cpus, gpus, partitions, extra
        self._names, self._ipv6, self._decoy = names, ipv6, decoy
        self._kill_wait, self._slurmd_timeout = kill_wait, slurmd_timeout
        self._lock: IO[str] | None = None

    def __enter__(self) -> "Cluster":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # ---- the life of the cluster

    def up(self) -> None:
        """Start it, in place of what an earlier one has left in this folder."""
        self._claim()
        self._clear()
        try:
            self._subnet = _free_subnet(self.tag)
            self._write_files()
            self._connect()
            self._start("controller", "munged", "--force", "--num-threads=4", *self._munge_files())
            self._start("controller", "slurmctld", "-f", self.environment["SLURM_CONF"])
            for node in self.nodes:
                self._start(node, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)
            self._until(lambda: self.node_states() == dict.fromkeys(self.nodes, "idle"), 20, "the nodes are not ready")
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Kill all its processes and remove its namespaces, interfaces and folder."""
        self._claim()
        self._clear()
        assert self._lock is not None
        self._lock.close()
        self._lock = None
        Path(f"{self.folder}.lock").unlink(missing_ok=True)

    def kill_node(self, node: str, silently: bool = False) -> None:
        """Cut its power: SIGKILL for slurmd and all that jobs run there, at one moment.

        silently: take its network down first, so that the others see no closed connections, only silence.
        """
        if silently:
            self._ip("-n", f"{self.tag}-controller", "link", "set", node, "down")
        _kill_all([f"{self.tag}-{node}"])

    def start_node(self, node: str) -> None:
        """Start it after kill_node."""
        self._ip("-n", f"{self.tag}-controller", "link", "set", node, "up")
        self._start(node, "slurmd", "-f", self.environment["SLURM_CONF"], "-N", node)

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
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd, env=inherited | self.environment | dict(env or {}), capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        if done.returncode:
            raise ClusterError(done.stderr.strip() or f"{command[0]} ended with exit code {done.returncode}")
        return done.stdout

    def job(self, job_id: int) -> Job:
        """What Slurm knows of a job, finished ones too."""
        text = self.scontrol("show", "job", "--oneliner", job_id)

        def value(key: str) -> str:
            found = re.search(rf"(?:^| ){key}=(.*?)(?= [A-Z][A-Za-z:/]*=|\s*$)", text)
            return found[1] if found else ""

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

    def node_states(self) -> dict[str, str]:
        """idle, alloc, mix, down, ... of each node."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines()
        return dict(line.split() for line in lines)

    def report(self, job_id: int | None = None) -> str:
        """The ends of the logs and Slurm's view of nodes and jobs, for messages of failure."""
        parts = {"job's output": self.output(job_id)} if job_id is not None else {}
        for name, command in {"nodes": ["sinfo", "-N", "-l"], "jobs": ["squeue", "--all", "--states=all"]}.items():
            try:
                parts[name] = self.run(*command, timeout=10)
            except (ClusterError, subprocess.TimeoutExpired) as error:
                parts[name] = str(error)
        parts |= {path.name: path.read_text(errors="replace") for path in sorted((self.folder / "log").glob("*.log"))}
        tails = {name: "\n".join(text.splitlines()[-15:]) for name, text in parts.items()}
        return "".join(f"\n--- {name}:\n{tail}" for name, tail in tails.items())

    # ---- how it is made

    def _claim(self) -> None:
        """Keep other processes off this folder while this object has the cluster up (or takes it down)."""
        if self._lock is not None:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{self.folder}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ClusterError(f"the cluster in {self.folder} belongs to another process that still runs") from None
        self._lock = lock

    def _clear(self) -> None:
        namespaces = [path.name for path in _NETNS.glob(f"{self.tag}-*")]
        _kill_all(namespaces)
        if Path(f"/sys/class/net/{self.tag}").exists():
            self._ip("link", "delete", self.tag)
        for name in namespaces:
            self._ip("netns", "delete", name)
        for folder in _FILES.glob(f"{self.tag}-*"):
            shutil.rmtree(folder)
        if _FILES.exists() and not any(_FILES.iterdir()):
            _FILES.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _address(self, node: str) -> str:
        return str(self._subnet[10 + self.nodes.index(node) + 1])

    def _address6(self, node: str) -> str:
        return f"fd00:{self.tag[2:6]}:{self.tag[6:]}::{10 + self.nodes.index(node) + 1}"

    def _connect(self) -> None:
        """Namespaces, their interfaces and addresses."""
        switch = f"{self.tag}-controller"
        hosts = ["127.0.0.1 localhost", "::1 localhost"]
        if self._names:
            hosts += [f"{self._subnet[1]} controller", *(f"{self._address(node)} {node}" for node in self.nodes)]
            hosts += [f"{self._address6(node)} {node}" for node in self.nodes] if self._ipv6 else []
        for name in ["controller", *self.nodes]:
            files = _FILES / f"{self.tag}-{name}"
            files.mkdir(parents=True)
            (files / "hosts").write_text("\n".join(hosts) + "\n")
            (files / "resolv.conf").write_text("")
            self._ip("netns", "add", f"{self.tag}-{name}")
        links = [f"link add {self.tag} type veth peer name login netns {switch}"]
        links += [f"addr add {self._subnet[254]}/24 dev {self.tag}", f"link set {self.tag} up"]
        ports = ["login", *self.nodes]
        for i, node in enumerate(self.nodes):
            space = f"{self.tag}-{node}"
            if self._decoy:
                links.append(f"link add eth0 netns {space} type veth peer name decoy{i} netns {switch}")
            links.append(f"link add {self.interface} netns {space} type veth peer name {node} netns {switch}")
        self._ip("-batch", "-", lines=links)
        bridge = ["link set lo up", "link add switch type bridge", "link set switch up"]
        bridge += [f"addr add {self._subnet[1]}/24 dev switch"]
        bridge += [f"link set {port} master switch up" for port in ports]
        bridge += [f"link set decoy{i} up" for i in range(len(self.nodes))] if self._decoy else []
        self._ip("-n", switch, "-batch", "-", lines=bridge)
        for i, node in enumerate(self.nodes):
            inside = ["link set lo up", f"addr add {self._address(node)}/24 dev {self.interface}"]
            inside += [f"addr add {self._address6(node)}/64 dev {self.interface} nodad"] if self._ipv6 else []
            inside += [f"addr add 192.168.{100 + i}.1/24 dev eth0", "link set eth0 up"] if self._decoy else []
            self._ip("-n", f"{self.tag}-{node}", "-batch", "-", lines=[*inside, f"link set {self.interface} up"])

    def _write_files(self) -> None:
        folder, conf = self.folder, Path(self.environment["SLURM_CONF"])
        for name in ("log", "state", "dev", *(f"{kind}/{node}" for node in self.nodes for kind in ("spool", "tmp"))):
            (folder / name).mkdir(parents=True)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"controller({self._subnet[1]})",
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
            "MinJobAge": "86400",
            "EnforcePartLimits": "ALL",
            "GresTypes": "gpu",
        }
        settings |= dict(line.split("=", 1) for line in self._extra)
        lines = [f"{key}={value}" for key, value in settings.items()]
        gpus = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        for node in self.nodes:
            lines.append(f"NodeName={node} NodeAddr={self._address(node)} CPUs={self._cpus} RealMemory=16000{gpus}")
        for i, partition in enumerate(self._partitions):
            lines.append(f"PartitionName={partition} Nodes=ALL Default={'NO' if i else 'YES'} MaxTime=INFINITE")
        conf.write_text("\n".join(lines) + "\n")
        # slurmd loads a plugin for cgroups even if nothing uses them; this one loads where there are none.
        conf.with_name("cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = [folder / "dev" / f"gpu{i}" for i in range(self._gpus)]
        for device in devices:
            os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        conf.with_name("gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))

    def _munge_files(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        return [f"--{key}={self.folder}/{name}" for key, name in files.items()] + [
            f"--log-file={self.folder}/log/munged.log"
        ]

    def _start(self, host: str, *daemon: str) -> None:
        """Start a daemon on the controller or a node; it returns when it has gone to the background."""
        inside = ["ip", "netns", "exec", f"{self.tag}-{host}", "unshare", "--uts", "sh", "-c"]
        path = self.folder / "log" / f"start-{daemon[0]}-{host}.log"
        with path.open("w") as output:
            done = subprocess.run(
                [*inside, 'hostname "$0" && exec "$@"', host, *daemon],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={"PATH": _PATH, "LC_ALL": "C"}, timeout=20,
            )  # fmt: skip
        if done.returncode:
            raise ClusterError(f"{daemon[0]} does not start on {host}: {path.read_text()}{self.report()}")

    def _until(self, condition: Callable[[], bool], timeout: float, message: str) -> None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                if condition():
                    return
            except (ClusterError, subprocess.TimeoutExpired) as error:
                message = f"{message}: {error}"
            if time.monotonic() > deadline:
                raise ClusterError(message + self.report())
            time.sleep(0.05)

    def _ip(self, *arguments: str, lines: Sequence[str] = ()) -> None:
        done = subprocess.run(
            ["ip", *arguments], input="\n".join(lines), capture_output=True, text=True, env={"PATH": _PATH}
        )
        if done.returncode:
            raise ClusterError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _free_subnet(tag: str) -> ipaddress.IPv4Network:
    """A /24 of 10.0.0.0/8 of which no route of this host knows; which one it tries first depends on the tag."""
    routes = json.loads(subprocess.check_output(["ip", "-4", "-json", "route"], env={"PATH": _PATH}))
    taken = [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]
    first = int(tag[2:6], 16)
    for i in range(2**16):
        subnet = ipaddress.IPv4Network((0x0A000000 + (first + i) % 2**16 * 256, 24))
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise ClusterError("no free subnet in 10.0.0.0/8")


def _kill_all(namespaces: Sequence[str]) -> None:
    """SIGKILL for every process in these network namespaces; stopped first, so that none sees another one die."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        again = True
        while again:
            pids = [pid for name in namespaces for pid in _pids(name)]
            for pid in pids:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            again = number == signal.SIGKILL and bool(pids)


def _pids(namespace: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, env={"PATH": _PATH})
    return [int(pid) for pid in listed.stdout.split()]


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
    return 0


if __name__ == "__main__":
    sys.exit(main())
