"""Published rows become runs without a change of what they print, and the shipped parameters are what they give."""

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from megagpt.model.counts import parameter_count
from megagpt.planning.calibration import FOLDS, fit, folds, log_errors
from megagpt.planning.efficiency import NEAREST, stored_calibration, stored_form
from megagpt.planning.published import SOURCES, load_published
from megagpt.planning.validation import SIZES, Judged, ValidationReport, draw

RUNS, LEFT_OUT = load_published()
FITTED = [run for part in folds(RUNS) for run in part]


def find(project, name, gpus, seq_len, gpu=""):
    (run,) = [run for run in RUNS if run.project == project and run.name == name and run.layout.gpus == gpus
              and run.layout.seq_len == seq_len and gpu in run.gpu]  # fmt: skip
    return run


def test_every_row_is_used_or_left_out_for_a_reason():
    assert len(RUNS) + LEFT_OUT.total() == 777
    assert LEFT_OUT["fp8 or fp4 products"] == 235
    assert len(RUNS) > 300


def test_a_row_is_read_as_its_source_prints_it():
    """MPT-70b on 64 H100 in llm-foundry's table: micro-batch 8, 4 accumulated, 2,048 in all, 1,039 tokens/s."""
    run = find("llm-foundry", "MPT-70b", 64, 2048, "H100")
    layout = run.layout
    assert (layout.micro_batch, layout.micro_steps, layout.global_batch, layout.data_parallel) == (8, 4, 2048, 64)
    assert (layout.zero_stage, layout.checkpointing, layout.precision, layout.compile) == (3, "full", "bf16", False)
    assert layout.reduce_bytes == 4  # mixed precision DEFAULT
    assert run.cluster.device.name == "H100 SXM"
    assert run.step_seconds == pytest.approx(2048 * 2048 / 66523, rel=1e-3)  # tokens/s of all GPUs there


def test_step_times_that_sources_print_follow_from_the_tokens_a_second():
    """175B of Korthikanti et al., table 5, with selective recomputation: 13.75 s; 8B of NeMo on 8 H100: 12.91 s."""
    seconds = [run.step_seconds for run in RUNS if run.name.startswith("GPT 175B") and run.project == "Megatron-LM"]
    assert min(seconds) == pytest.approx(13.75, rel=1e-3)
    run = next(run for run in RUNS if "24.11.1 llama3.1/README_8b" in run.source and run.layout.gpus == 8)
    assert run.step_seconds == pytest.approx(12.91, rel=1e-3)


def test_parameters_are_those_that_sources_print():
    # 15B of Nemotron and 20B of BigScience are names rather than counts
    ratios = [parameter_count(run.model) / run.printed_parameters for run in RUNS
              if run.printed_parameters and "Nemotron" not in run.name and "20B" not in run.name]  # fmt: skip
    assert len(ratios) > 250
    assert max(abs(np.array(ratios) - 1)) < 0.03


@pytest.mark.parametrize(
    ("project", "low", "high"),
    [("llm-foundry", 0.96, 1.001), ("Megatron-LM", 0.999, 1.001), ("torchtitan", 0.98, 1.0), ("TinyLlama", 1.0, 1.01),
     ("fms-fsdp", 0.97, 1.08)],
)  # fmt: skip
def test_recomputed_mfu_is_the_printed_one_where_formulas_agree(project, low, high):
    """llm-foundry counts biases, norms and positions too; fms-fsdp rounds to whole percents."""
    ratios = [run.mfu / run.printed_mfu for run in RUNS if run.project == project and run.printed_mfu]
    assert ratios
    assert low <= min(ratios) <= max(ratios) <= high


def test_recomputed_mfu_of_nemo_is_the_printed_one_but_for_the_recipes_known_to_differ():
    ratios = Counter(round(run.mfu / run.printed_mfu, 1) for run in RUNS if run.project == "NeMo" and run.printed_mfu)
    assert ratios[1.0] > 0.85 * ratios.total()
    assert set(ratios) == {1.0, 0.9}  # Nemotron 15B of 24.11 overstates its FLOPs: the data's audit has 0.886


def test_each_source_describes_some_rows():
    projects = {run.project for run in RUNS}
    unused = {source.project for source in SOURCES} - projects
    assert unused == {"MaxText", "Paxml"}  # whose rows are left out for what they do not say


def test_no_group_is_in_two_folds_and_every_run_that_may_be_fitted_in_one():
    parts = folds(RUNS)
    groups = [{run.group for run in part} for part in parts]
    assert len(parts) == FOLDS
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert sum(map(len, parts)) == sum(run.may_be_fitted for run in RUNS)
    assert all(run.layout.tensor == run.layout.pipeline == 1 for run in FITTED)


def test_the_same_model_of_a_project_is_one_group_on_any_gpu_and_in_any_table():
    mpt = {run.group for run in RUNS if run.name == "MPT-7b"}
    assert mpt == {"llm-foundry: MPT-7b"}
    proxies = {run.group for run in RUNS if run.name.startswith("Llama 3.1 405B") and run.project == "NeMo"}
    assert proxies == {"NeMo: Llama 3.1 405B"}


def test_a_fit_recovers_the_parameters_that_times_were_made_with():
    """Throughput computed with other shares than the shipped ones, in place of the published."""
    from dataclasses import replace

    known = replace(stored_calibration(), matmul={"ampere": 0.7, "hopper": 0.6}, memory=0.7, unfused=2.0, overlap=0.5)
    made = [replace(run, tokens_per_second_per_gpu=run.tokens_per_second_per_gpu * run.step_seconds
                    / run.predicted_seconds(known.of(run.cluster.device.architecture, run.first_flash)))
            for run in FITTED[::3]]  # fmt: skip
    found = fit(made)
    assert np.abs(log_errors(made, found)).max() < 0.01
    assert found.matmul == pytest.approx(known.matmul, rel=0.03)
    assert found.memory * known.unfused == pytest.approx(known.memory * found.unfused, rel=0.1)


def test_the_shipped_parameters_are_those_of_a_new_fit():
    """After a change of the model or of the rows, renew them: `python -m tools.plan --validate FOLDER` says where."""
    renewed = json.loads(stored_form(fit(FITTED), len(FITTED)))["parameters"]
    for name, shipped in asdict(stored_calibration()).items():
        assert renewed[name] == pytest.approx(shipped, rel=0.02)


def test_the_shipped_parameters_predict_what_they_were_fitted_to():
    errors = np.abs(np.expm1(log_errors(FITTED, stored_calibration())))
    assert np.median(errors) < 0.05
    assert np.quantile(errors, 0.9) < 0.15


def test_a_model_that_was_not_seen_is_predicted_within_ten_percent():
    """One of the five folds, as `tools.plan --validate` does with all."""
    held_out, *others = folds(RUNS)
    calibration = fit([run for part in others for run in part])
    errors = np.abs(np.expm1(log_errors(held_out, calibration)))
    assert len({run.group for run in held_out}) >= 4
    assert np.median(errors) < 0.1


def test_generations_without_a_fit_take_those_of_a_fitted_one():
    calibration = stored_calibration()
    assert set(NEAREST.values()) <= set(calibration.matmul)
    assert calibration.of("hopper", first_flash=True).attention < calibration.of("hopper").attention


@pytest.fixture
def report():
    judged = [Judged(run, error) for run, error in zip(FITTED[:4], (0.0, 0.1, -0.3, 0.05), strict=True)]
    return ValidationReport(stored_calibration(), judged, judged[:2], judged[2:], Counter({"no reason": 3}))


def test_errors_are_summed_up_by_median_bias_and_worst(report):
    (line,) = report.lines(report.held_out)
    errors = np.expm1([0.0, 0.1, -0.3, 0.05])
    assert line.runs == 4
    assert line.median == pytest.approx(np.median(np.abs(errors)))
    assert line.bias == pytest.approx(np.median(errors))
    assert line.worst == pytest.approx(np.expm1(-0.3))
    assert sum(line.runs for line in report.lines(report.held_out, "gpu", "size")) == 4


def test_the_report_names_the_worst_and_the_reasons(report):
    text = report.text()
    assert "-25.9%" in text
    assert "- 3: no reason" in text
    assert json.loads(json.dumps(report.to_json()))["left_out"] == {"no reason": 3}
    assert [name for _, name in SIZES][-1] == "above 10 B"


def test_the_picture_is_drawn(report):
    assert draw(report).startswith(b"\x89PNG")
