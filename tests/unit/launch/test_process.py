"""Each rank takes the right GPU, however its launcher shows them to it; a GPU that is granted but not seen is told."""

import pytest
import torch

from launch import process
from launch.environment import ProcessEnvironment
from megagpt.errors import UsageError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Pretends that torch sees some GPUs."""

    def pretend(visible: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    return pretend


def choose(local_rank: int, local_world_size: int, wanted: str = "auto", precision: str = "bf16") -> torch.device:
    place = ProcessEnvironment("Slurm", local_rank, local_rank, local_world_size, local_world_size, ("n",), (1,), "j")
    return process._choose_device(place, wanted, precision)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (4, [0, 1, 2, 3]),  # all ranks see all
        (1, [0, 0, 0, 0]),  # each sees its own one: --gpus-per-task, --gpu-bind
        (2, [0, 1, 0, 1]),  # half of the node: which of them are the same, the roll call finds
    ],
)
def test_every_rank_has_a_gpu_among_those_it_sees(gpus, visible, indices):
    gpus(visible)
    assert [choose(rank, 4).index for rank in range(4)] == indices


def test_a_gpu_that_slurm_granted_but_torch_does_not_see_ends_the_run_instead_of_training_on_a_cpu(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert choose(0, 1).type == "cpu"
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    with pytest.raises(UsageError, match=r"sees no GPU .*Slurm gave this job 2 on this node.*train.device=cpu"):
        choose(0, 1)
    assert choose(0, 1, wanted="cpu").type == "cpu"


def test_asking_for_a_gpu_where_there_is_none_is_told(gpus):
    gpus(0)
    with pytest.raises(UsageError, match=r"train\.device=cuda"):
        choose(0, 1, wanted="cuda")
