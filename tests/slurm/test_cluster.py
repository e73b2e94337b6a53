"""The test cluster is what the tests of slurm/ take it for: hosts of their own under a real Slurm."""

import errno
import glob
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, Job

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow
Submit = Callable[..., int]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Iterator[Submit]:
    """Submit the lines of a batch script; its output is in tmp_path. What a failed test leaves is cancelled."""
    jobs: list[int] = []

    def submit(*lines: str, options: tuple[str, ...] = ()) -> int:
        script = tmp_path / "job.sh"
        script.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
        jobs.append(cluster.sbatch(script, options=["--open-mode=append", *options], cwd=tmp_path))
        return jobs[-1]

    yield submit
    for job in jobs:
        if cluster.job(job).state in ("RUNNING", "PENDING"):
            cluster.scancel(job)


@pytest.fixture(scope="module", autouse=True)
def signalled(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> int:
    """A job with a time limit that runs on node4 beside the other tests; Slurm looks at these every 30 seconds."""
    script = tmp_path_factory.mktemp("signalled") / "job.sh"
    task = 'trap "echo USR1; exit 85" USR1; for i in {1..900}; do sleep 0.1; done'
    script.write_text(f"#!/bin/bash\ntrap 'echo script USR1' USR1\nsrun bash -c '{task}'\necho srun $?\nexit 3\n")
    options = ["--nodelist=node4", "--time=1", "--signal=USR1@10", "--partition=urgent"]
    return cluster.sbatch(script, options=options, cwd=script.parent)


def test_nodes_have_names_addresses_and_gpus_of_their_own(cluster: Cluster) -> None:
    lines = cluster.run(
        *["srun", "--nodes=4", "--ntasks=4", "--gpus-per-node=2", "bash", "-c"],
        "echo $(hostname) $(ip -4 -brief address show scope global) $CUDA_VISIBLE_DEVICES",
    ).splitlines()
    found = [line.split() for line in lines]
    assert sorted(line[0] for line in found) == ["node1", "node2", "node3", "node4"]
    assert {line[0]: line[3] for line in found} == {node: f"{cluster.hosts.address(node)}/24" for node in cluster.nodes}
    assert {line[4] for line in found} == {"0,1"}


def test_nodes_reach_each_other_by_name_and_nothing_else(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    answers = cluster.run(
        *["srun", "--nodes=2", "--ntasks=2", "--label", sys.executable, tmp_path / "probe.py", tmp_path / "ready"]
    )
    assert answers.split("\n")[:-1] == ["1: network: heard", "1: loopback: ECONNREFUSED", "1: outside: ENETUNREACH"]


PROBE = """
import errno, os, pathlib, socket, sys, time
names, ready = sorted(["node1", "node2", "node3", "node4"]), pathlib.Path(sys.argv[1])
if os.environ["SLURM_PROCID"] == "0":
    on_all, on_loopback = socket.create_server(("", 4001)), socket.create_server(("127.0.0.1", 4002))
    ready.write_text(socket.gethostname())
    on_all.accept()[0].sendall(b"heard")
    time.sleep(0.5)
else:
    while not ready.exists() or not ready.read_text():
        time.sleep(0.01)
    def ask(what, address):
        try:
            with socket.create_connection(address, timeout=5) as connection:
                print(f"{what}: {connection.recv(5).decode()}")
        except OSError as error:
            print(f"{what}: {errno.errorcode[error.errno]}")
    ask("network", (ready.read_text(), 4001))
    ask("loopback", (ready.read_text(), 4002))
    ask("outside", ("192.0.2.1", 80))
"""


def test_a_refused_submission_says_why(submit: Submit) -> None:
    with pytest.raises(ClusterError, match="invalid partition specified: nowhere"):
        submit("true", options=("--partition=nowhere",))


def test_a_failed_job_shows_its_output(cluster: Cluster, submit: Submit) -> None:
    job = submit("echo no data >&2", "exit 7")
    assert cluster.wait(job).exit_code == 7
    with pytest.raises(ClusterError, match=r"job \d+ is not COMPLETED, but (.*\n)*.*no data"):
        cluster.wait(job, "COMPLETED")


def test_srun_gives_mpi_its_world(cluster: Cluster) -> None:
    pytest.importorskip("mpi4py")
    program = "from mpi4py import MPI; c = MPI.COMM_WORLD; print(c.size, sum(c.allgather(c.rank)))"
    printed = cluster.run(
        *["srun", "--mpi=pmi2", "--nodes=3", "--ntasks=3", sys.executable, "-c", program],
        env={"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": f"{sys.prefix}/lib"},
    )
    assert printed == "3 3\n" * 3


def test_preemption_signals_the_tasks_and_leaves_the_script_to_requeue(cluster: Cluster, submit: Submit) -> None:
    """Within the grace time a script that ends by itself has ended for good: it must ask to be requeued."""
    job = submit(
        "trap 'echo script TERM' TERM",
        "srun bash -c 'trap \"echo task TERM; exit 85\" TERM; echo ready; for i in {1..600}; do sleep 0.1; done'",
        'echo "srun $?"; scontrol requeue $SLURM_JOB_ID; sleep 60',
        options=("--nodes=3", "--exclude=node4", "--exclusive"),
    )
    cluster.until(lambda: cluster.output(job).count("ready") == 3, 10, "not running")
    urgent = ["--partition=urgent", "--nodes=3", "--exclude=node4", "--wrap=true", "--output=/dev/null"]
    cluster.wait(int(cluster.run("sbatch", "--parsable", "--exclusive", *urgent)), "COMPLETED")
    assert cluster.job(job).restarts == 1
    said = ("srun 85", "script TERM")
    cluster.until(lambda: all(words in cluster.output(job) for words in said), 10, "the script has not said all")
    assert cluster.output(job).count("task TERM") == 3
    assert cluster.output(job).index("srun 85") < cluster.output(job).index("script TERM")
    cluster.scancel(job)


def test_a_dead_node_costs_a_job_its_attempt_and_comes_back(cluster: Cluster, submit: Submit) -> None:
    job = submit("hostname; srun sleep 60", options=("--nodes=2", "--exclude=node4", "--requeue"))
    first = cluster.wait(job, "RUNNING").nodes
    time.sleep(0.5)
    cluster.kill_node(first[1], silently=True)
    cluster.until(lambda: cluster.job(job).restarts == 1, 30, "not requeued")
    again = cluster.wait(job, "RUNNING")
    assert first[1] not in again.nodes
    cluster.start_node(first[1])
    cluster.until(lambda: cluster.node_states()[first[1]] == "idle", 10, "not back")
    cluster.scancel(job)


def test_a_signal_arrives_before_the_time_limit(cluster: Cluster, signalled: int) -> None:
    job: Job = cluster.wait(signalled, timeout=40)
    assert (job.state, job.exit_code) == ("FAILED", 3)
    assert "USR1\n" in cluster.output(signalled)
    assert cluster.output(signalled).endswith("srun 85\n")


OWNER = """
import sys, time
from pathlib import Path
from tests.slurm.cluster import Cluster
cluster = Cluster(Path(sys.argv[1]), nodes=2, names=False, ipv6=True, decoy=True)
cluster.up()
def seen(*command):
    return cluster.run("srun", "--nodelist=node2", *command).strip()
connect = "import socket, sys; print(socket.socket(int(sys.argv[1])).connect_ex((sys.argv[2], 4003)))"
print(seen("sh", "-c", "getent hosts node1 || echo unknown"), seen(sys.executable, "-c", connect, "10",
    cluster.hosts.address6("node1")), seen(sys.executable, "-c", connect, "2", "192.168.100.1"))
script = Path(sys.argv[1], "job.sh")
script.write_text("#!/bin/bash\\nsetsid sleep 98.7 & sleep 98.7\\n")
cluster.wait(cluster.sbatch(script, cwd=script.parent), "RUNNING")
print("running", flush=True)
time.sleep(600)
"""


def test_what_a_killed_owner_leaves_is_removed(cluster: Cluster) -> None:
    """Also: another cluster beside the session's, without names, with IPv6 and with interfaces that lead nowhere."""
    other = Cluster(Path(f"{cluster.folder}-b"))
    command = [sys.executable, "-c", OWNER, str(other.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        assert owner.stdout.readline().split() == ["unknown", str(errno.ECONNREFUSED), str(errno.ENETUNREACH)]
        assert owner.stdout.readline() == "running\n"
        with pytest.raises(ClusterError, match="in use by another process"):
            other.up()
        owner.kill()
    assert traces(other)
    other.down()
    assert traces(other) == []
    assert set(cluster.node_states().values()) <= {"idle", "mix"}


def traces(cluster: Cluster) -> list[str]:
    """What a cluster has in the system: processes, namespaces, interfaces, files."""
    lines = [path.read_bytes().replace(b"\0", b" ").decode() for path in Path("/proc").glob("[0-9]*/cmdline")]
    found = [line for line in lines if f"{cluster.folder}/" in line or line == "sleep 98.7 "]
    for pattern in ("/run/netns/{}-*", "/etc/netns/{}-*", "/sys/class/net/{}", f"{cluster.folder}"):
        found += glob.glob(pattern.format(cluster.hosts.tag))
    return found
