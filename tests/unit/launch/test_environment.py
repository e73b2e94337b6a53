"""Every launcher's variables lead to the right place in the job; contradictions stop with the variable's name."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.environment import (
    compress_hosts,
    discover,
    expand_hosts,
    is_first_task,
    log_folder,
    ports_of_step,
    tasks_per_node,
)
from launch.process import cpu_threads
from megagpt.errors import UsageError

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"} | {
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
RENDEZVOUS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4242"}


def place(environ):
    found = discover(environ)
    return (
        found.rank,
        found.local_rank,
        found.world_size,
        found.local_world_size,
        found.master_addr,
        found.master_port,
    )


def test_alone_without_any_launcher():
    found = discover({})
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (0, 0, 1, 1)
    assert found.master_addr == "127.0.0.1"
    assert 1024 < found.master_port < 65536


def test_torchrun():
    assert place(TORCHRUN) == (5, 1, 8, 4, "node1", 29500)


def test_open_mpi():
    variables = {"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "4"} | {
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    }
    assert place(variables | RENDEZVOUS) == (4, 1, 6, 3, "10.0.0.1", 4242)


def test_hydra():
    variables = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert place(variables | RENDEZVOUS) == (3, 1, 4, 2, "10.0.0.1", 4242)


def test_slurm_tasks_with_uneven_nodes():
    variables = {
        "SLURM_PROCID": "4",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_NODELIST": "node7",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_ID": "2",
    }
    found = discover(variables)
    assert place(variables)[:5] == (4, 0, 5, 1, "node7")
    assert found.ports == ports_of_step(123456, 2)
    assert found.job == "123456.2.0"
    again = discover(variables | {"SLURM_RESTART_COUNT": "1"})
    assert again.ports == found.ports  # found again without asking anyone
    assert again.job != found.job  # but not mistaken for what is left of the first start


def test_a_slurm_allocation_without_srun_is_one_process():
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"})[:4] == (0, 0, 1, 1)


def test_mpiexec_inside_a_slurm_allocation_is_mpi():
    allocation = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}
    proxies = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    hydra = {"PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
    assert place(allocation | hydra | RENDEZVOUS)[:4] == (5, 1, 8, 4)
    assert place(allocation | proxies | hydra | RENDEZVOUS)[:4] == (5, 1, 8, 4)


def test_srun_with_pmi2_is_slurm():
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n1", "PMI_SIZE": "4", "PMI_RANK": "3"}
    assert place(slurm)[:4] == (3, 1, 4, 2)


def test_a_batch_script_that_forgets_srun_is_told_so():
    with pytest.raises(UsageError, match="start the command with srun"):
        discover({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"})


def test_task_counts_that_do_not_cover_the_node_are_named():
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "5", "SLURM_STEP_NUM_TASKS": "4"}
    with pytest.raises(UsageError, match="say nothing of node 5"):
        discover(slurm | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n1"})


@pytest.mark.parametrize(
    ("text", "counts"), [("1", [1]), ("2(x3)", [2, 2, 2]), ("4,3(x2),1", [4, 3, 3, 1]), ("8(x1)", [8])]
)
def test_compressed_task_counts_expand(text, counts):
    assert tasks_per_node(text) == counts


def test_a_partial_environment_names_what_is_missing():
    with pytest.raises(UsageError, match="RANK, WORLD_SIZE set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"):
        discover({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(UsageError, match="rank 8 of 8"):
        discover(TORCHRUN | {"RANK": "8"})


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(UsageError, match="WORLD_SIZE='two' in the environment is not a whole number"):
        discover(TORCHRUN | {"WORLD_SIZE": "two"})


def test_ranks_share_the_cores_unless_the_user_says_otherwise():
    assert cpu_threads({}, cores=8, local_world_size=2) == 4
    assert cpu_threads({}, cores=2, local_world_size=4) == 1
    assert cpu_threads({"OMP_NUM_THREADS": "3"}, cores=8, local_world_size=2) == 3
    torchrun_default = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert cpu_threads(torchrun_default, cores=8, local_world_size=2) == 4
    assert cpu_threads({"OMP_NUM_THREADS": "1"}, cores=8, local_world_size=2) == 1


def test_ports_of_neighbouring_jobs_and_steps_begin_apart_and_are_all_unprivileged():
    firsts = [ports_of_step(job, step)[0] for job in range(1000, 1050) for step in range(3)]
    assert len(set(firsts)) == len(firsts)
    for job in (0, 1, 123, 67_108_863):
        ports = ports_of_step(job, 2)
        assert len(set(ports)) == 16
        assert all(20_000 <= port < 30_000 for port in ports)


def test_a_given_address_and_port_are_the_only_candidates():
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "node[1-2]"}
    found = discover(slurm | {"MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "7000"})
    assert (found.addresses, found.ports) == (("10.1.2.3",), (7000,))


def test_a_first_host_whose_name_does_not_resolve_has_the_address_of_the_node_that_called_srun_to_fall_back_on():
    slurm = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    slurm |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "no-such-host-[07-08]"}
    found = discover(slurm | {"SLURM_LAUNCH_NODE_IPADDR": "10.9.8.7"})
    assert found.addresses == ("no-such-host-07", "10.9.8.7")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[08-10,3],cpu", ["gpu08", "gpu09", "gpu10", "gpu3", "cpu"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("a[1-2].cluster,b-3", ["a1.cluster", "a2.cluster", "b-3"]),
    ],
)
def test_compressed_host_lists_expand(text, hosts):
    assert expand_hosts(text) == hosts


@given(st.sets(st.from_regex(r"(gpu|n-1-)(0?[0-9]|1[0-9]{1,2})|login", fullmatch=True)))
def test_compressing_host_names_is_undone_by_expanding(hosts):
    assert sorted(expand_hosts(compress_hosts(hosts))) == sorted(hosts)


def test_three_and_more_hosts_that_count_up_are_compressed():
    assert compress_hosts(["gpu10", "gpu9", "gpu11", "gpu12"]) == "gpu[9-12]"
    assert compress_hosts(["gpu01", "gpu02", "gpu03", "gpu7", "gpu8", "login"]) == "gpu[01-03],gpu7,gpu8,login"


def test_a_host_list_that_cannot_be_read_is_told():
    with pytest.raises(UsageError, match=r"cannot read the node list 'node\[a-b\]'"):
        expand_hosts("node[a-b]")


def test_one_torchrun_a_slurm_task_without_the_others_is_refused():
    alone = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}
    alone |= {"TORCHELASTIC_RUN_ID": "x", "SLURM_STEP_NUM_TASKS": "2"}
    with pytest.raises(UsageError, match=r"2 tasks, but WORLD_SIZE=4 .torchrun was told of 1 node.*--nnodes"):
        discover(alone)
    assert discover(alone | {"WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}).world_size == 8


def test_a_world_of_one_that_somebody_exported_does_not_hide_the_tasks_of_slurm():
    exported = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(UsageError, match=r"4 tasks, but WORLD_SIZE=1 .*unset RANK"):
        discover(exported | {"SLURM_STEP_NUM_TASKS": "4"})


def test_the_first_task_speaks_for_all():
    assert is_first_task({})
    assert is_first_task({"SLURM_PROCID": "0"})
    assert not is_first_task({"SLURM_PROCID": "3"})
    assert not is_first_task({"PMI_RANK": "1"})


def test_every_slurm_job_logs_into_a_folder_of_its_own():
    assert log_folder(Path("runs/a"), {}) == Path("runs/a/logs")
    assert log_folder(Path("runs/a"), {"SLURM_JOB_ID": "17"}) == Path("runs/a/logs/17")
