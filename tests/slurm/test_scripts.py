"""The other scripts: what they make on a cluster is what the commands make on one machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagpt.training.checkpoint import find_checkpoint, load_weights
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, SCRIPTS
from tests.slurm.runs import CPUS, MODEL, Run
from tests.unit.corpus.test_pipeline import contents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def trained(cluster: Cluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps, by train.sh with any configuration."""
    run = Run(cluster, dataset, tmp_path_factory.mktemp("trained") / "run")
    settings = run.settings | {"train.steps": 20}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    options = [*CPUS, "--nodes=1", "--ntasks-per-node=2", f"--output={run.run_dir}.out"]
    job = cluster.sbatch(SCRIPTS / "train.sh", "configs/small.yaml", *overrides, options=options, cwd=ROOT)
    cluster.wait(job, "COMPLETED", timeout=120)
    assert run.records("start")[0]["world_size"] == 2
    return run


def test_preprocessing_on_three_nodes_makes_the_bytes_of_one_process(dataset: Path, texts: Path, tmp_path: Path):
    arguments = ["--config", texts / "config.yaml", "--input", texts / "*.jsonl", "--output", tmp_path / "alone"]
    command = [sys.executable, "-m", "tools.preprocess", *map(str, arguments), "--tokenizer", "bytes", "--workers", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert contents(dataset) == contents(tmp_path / "alone")


def test_preprocessing_without_a_common_mpi_is_refused_not_done_three_times(
    cluster: Cluster, texts: Path, tmp_path: Path
):
    arguments = ["--input", texts / "*.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes"]
    options = ["--nodes=3", "--ntasks-per-node=1", f"--output={tmp_path}/job.out"]
    job = cluster.sbatch(SCRIPTS / "preprocess.sh", *arguments, options=options, cwd=ROOT, env={"MPI": "none"})
    assert cluster.wait(job, "FAILED", timeout=60).exit_code != 0
    assert cluster.output(job).startswith("error: --executor mpi: the launcher started 3 processes, but MPI sees only")
    assert not (tmp_path / "out").exists()


def test_generate_samples_from_a_run(trained: Run, cluster: Cluster, tmp_path: Path):
    arguments = [trained.run_dir, "--prompt", "the", "--max-tokens", "20", "--seed", "3"]
    job = cluster.sbatch(
        SCRIPTS / "generate.sh", *arguments, options=[*CPUS, f"--output={tmp_path}/job.out"], cwd=ROOT / "slurm"
    )
    cluster.wait(job, "COMPLETED", timeout=90)
    alone = subprocess.run(
        [sys.executable, "-m", "tools.generate", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert alone.stdout.strip()
    assert alone.stdout.strip() in cluster.output(job)


def test_generate_shares_a_file_of_prompts_among_the_nodes(trained: Run, cluster: Cluster, tmp_path: Path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "samples.jsonl"
    prompts.write_text("".join(json.dumps({"id": number, "prompt": "the"}) + "\n" for number in range(5)))
    job = cluster.sbatch(
        SCRIPTS / "generate.sh",
        *[trained.run_dir, "--prompts", prompts, "--output", output, "--max-tokens", "5"],
        options=["--nodes=2", "--gpus-per-node=0", f"--output={tmp_path}/job.out"],
        cwd=ROOT,
    )
    cluster.wait(job, "COMPLETED", timeout=120)
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [0, 1, 2, 3, 4]
    said = cluster.output(job)
    assert "3 of 5 lines were to do here" in said
    assert "2 of 5 lines were to do here" in said


def test_convert_writes_what_transformers_reads(trained: Run, cluster: Cluster, tmp_path: Path):
    export = tmp_path / "export"
    options = [*CPUS, f"--output={tmp_path}/job.out"]
    job = cluster.sbatch(SCRIPTS / "convert.sh", trained.run_dir, export, "--to", "hf", options=options, cwd=ROOT)
    cluster.wait(job, "COMPLETED", timeout=120)
    model = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(export)
    ours = load_weights(find_checkpoint(trained.run_dir))
    assert torch.equal(model.get_input_embeddings().weight, ours["embedding.weight"])


def test_a_scaling_study_runs_a_job_for_each_size_and_reports_after_all(
    cluster: Cluster, dataset: Path, tmp_path: Path
):
    overrides = {name: value for name, value in MODEL.items() if name not in ("checkpoint.every", "logging.every")}
    overrides |= {"data.train.0.path": str(dataset / "train"), "data.validation": [], "train.compile": False}
    study = {
        "configs": ["configs/small.yaml"],
        "nodes": [1, 2],
        "ranks_per_node": 1,
        "cores_per_rank": 1,
        "steps": 16,
        "discard_steps": 4,
        "overrides": overrides,
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    output = tmp_path / "out"
    arguments = ["strong", tmp_path / "study.yaml", "--output", output]
    job = cluster.sbatch(SCRIPTS / "scaling.sh", *arguments, options=[f"--output={tmp_path}/job.out"], cwd=ROOT)
    cluster.wait(job, "COMPLETED", timeout=60)
    assert cluster.output(job).count(": job ") == 3
    page = output / "report/study.html"  # written last
    cluster.until(lambda: page.exists() and "</html>" in page.read_text(), 180, f"no report{cluster.report(job)}")
    results = json.loads((output / "report/results.json").read_text())
    assert results
    assert (output / "report/study.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "tasks", "gpus"),
    [
        ([], 1, ["0"]),
        (["--gpus-per-node=2"], 2, ["0,1", "0,1"]),
        (["--gpus-per-node=1", "--exclusive"], 1, ["0"]),  # the job has both, and uses what it asked for
        (["--gpus-per-node=0", "--gres=gpu:2"], 2, ["0,1", "0,1"]),
        (["--gpus-per-node=2", "--ntasks-per-node=2", "--gpus-per-task=1"], 2, ["0", "1"]),
        (["--gpus-per-node=0", "--ntasks-per-node=2"], 2, ["none", "none"]),
    ],
)
def test_there_is_a_process_a_gpu_and_each_sees_those_that_were_asked_for(
    cluster: Cluster, tmp_path: Path, options: list[str], tasks: int, gpus: list[str]
):
    script = tmp_path / "job.sh"
    header = "#!/bin/bash\n#SBATCH --nodes=2 --gpus-per-node=1 --cpus-per-task=1\n"
    show = """on_all bash -c 'echo seen $SLURM_PROCID $SLURM_NODEID ${CUDA_VISIBLE_DEVICES:-none}'\n"""
    script.write_text(
        f"{header}source slurm/common.sh\n{show}on_one bash -c 'echo one ${{CUDA_VISIBLE_DEVICES:-none}}'"
    )
    job = cluster.sbatch(script, options=[*options, f"--output={tmp_path}/job.out"], cwd=ROOT)
    cluster.wait(job, "COMPLETED", timeout=60)
    seen = sorted(line.split()[1:] for line in cluster.output(job).splitlines() if line.startswith("seen"))
    assert [device for _, _, device in seen] == gpus * 2
    assert [node for _, node, _ in seen] == ["0"] * tasks + ["1"] * tasks
    assert cluster.output(job).count("\none ") == 1
