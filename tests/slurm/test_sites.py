"""Whatever a site's environment and paths are: jobs work, or end with one line that says what to mend."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT
from tests.slurm.runs import CPUS, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This checkout under a path with spaces, with scripts of its own."""
    folder = tmp_path / "a check out"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("slurm", "runs", ".git"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    return folder


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        ("source ../bare/bin/activate", "no torch, no deepspeed, no typer"),
        ("PATH=/no/such", "python: command not found"),
        ("RUN=(no-such-container exec)", "no-such-container: command not found"),
    ],
)
def test_an_environment_that_is_not_there_is_told_in_one_line(
    cluster: Cluster, checkout: Path, activation: str, reason: str
):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout.parent / "bare"], check=True)
    (checkout / "slurm/site.sh").write_text(activation + "\n")
    job = cluster.sbatch(checkout / "slurm/generate.sh", "run", options=[*CPUS, "--output=out"], cwd=checkout)
    assert cluster.wait(job, "FAILED", timeout=60).exit_code == 2
    (line,) = (checkout / "out").read_text().splitlines()
    assert line.startswith("error: node")
    assert f"{reason}); mend slurm/site.sh or run make setup" in line


def test_a_jobs_output_is_found_from_its_run_in_a_checkout_whose_path_has_spaces(cluster: Cluster, checkout: Path):
    run = Run(cluster, Path("/no/such/dataset"), checkout / "runs" / "a run")
    job = run.submit("--nodes=1", "--output=out of %j", cwd=checkout)
    cluster.wait(job, "FAILED", timeout=90)
    output = (run.run_dir / "logs" / str(job) / "slurm.out").resolve()
    assert output == checkout / f"out of {job}"
    assert "error: /no/such/dataset/train.bin: no such file" in output.read_text()
