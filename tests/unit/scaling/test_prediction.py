"""What the plan says of a study's runs: tools.plan's own number beside what was measured, or nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megagpt.config import save_config
from megagpt.scaling.devices import find_device, parse_network
from megagpt.scaling.prediction import Predictor
from megagpt.scaling.report import write_report
from megagpt.scaling.study import load_study
from tests.unit.scaling.fake_studies import create, finish, write_study
from tools.plan import main as plan_command
from tools.scaling import app


def finished(folder: Path, device: str):
    study = load_study(write_study(folder, ranks=[2, 8]))
    made = create(folder / "output", "strong", study)
    for entry in made.entries:
        finish(entry, [0.1] * study.steps, device=device)
    return made


def test_a_known_gpus_runs_stand_beside_what_tools_plan_says(tmp_path: Path):
    folder = finished(tmp_path, "NVIDIA H100 80GB HBM3")
    write_report(folder, Predictor(parse_network("100gbps")))
    points = json.loads((tmp_path / "output/report/results.json").read_text())["curves"][0]["points"]
    planned = []
    for entry, point in zip(folder.entries, points, strict=True):
        save_config(entry.stored.run_config(), tmp_path / "config.yaml")
        plan_command(
            tmp_path / "config.yaml",
            gpu="h100-sxm",
            gpus=str(point["ranks"]),
            nodes_gpus=point["ranks"],
            network="100gbps",
            json=tmp_path / "plan.json",
        )
        seconds = json.loads((tmp_path / "plan.json").read_text())["step_seconds"]["total"]
        assert point["planned_step_seconds"] == pytest.approx(seconds)
        planned.append(seconds)
    assert points[0]["planned_efficiency"] == 1
    assert points[1]["planned_efficiency"] == pytest.approx(planned[0] * 2 / (planned[1] * 8))
    page = (tmp_path / "output/report/study.html").read_text()
    assert "Planned efficiency" in page
    assert "Planned: what tools.plan says, with 100 Gbit/s a GPU between nodes." in page


def test_an_unknown_device_has_no_prediction_and_no_column(tmp_path: Path):
    folder = finished(tmp_path, "a chip")
    reported = write_report(folder)
    assert "Planned" not in reported.page.read_text()
    assert not any("planned" in line for line in reported.lines())
    assert find_device("h100-sxm").name not in reported.page.read_text()


def test_a_bad_network_is_one_line(tmp_path: Path):
    finished(tmp_path, "a chip")
    done = CliRunner().invoke(app, ["report", str(tmp_path / "output"), "--network", "fast"])
    assert "fast" in str(done.exception)
