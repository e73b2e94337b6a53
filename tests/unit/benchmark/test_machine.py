"""The head of a result: the command as anyone may type it, the revision of the code, the machine as it is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megagpt.benchmark import machine
from megagpt.benchmark.machine import HEAD, MATRIX_FLAGS, command_of, describe_machine, head
from tests.forked import run_module

HOST = os.uname().nodename


@pytest.mark.parametrize(
    ("words", "portable"),
    [
        (["train", "configs/small.yaml", "--output", "/x/a.json"], "train configs/small.yaml"),
        (["growth", "--plot=/x/a.png", "--steps", "3", "--output=a.json"], "growth --steps 3"),
        (["generate", "--nanogpt", "../nanoGPT/model.py", "--rows", "1"], "generate --nanogpt PATH/model.py --rows 1"),
        (["generate", "--nanogpt=/home/me/model.py"], "generate --nanogpt PATH/model.py"),
        (["data", "--folder", "/scratch/me", "--repeats", "2"], "data --folder PATH/me --repeats 2"),
        (["data", "--folder=/scratch/me"], "data --folder=PATH/me"),
        (["train", "/home/me/tiny.yaml"], "train PATH/tiny.yaml"),
        (["train", "--against", "train.compile=false a=1"], "train --against 'train.compile=false a=1'"),
        (["train", "--against", "train.run_dir=/home/me/r"], "train --against train.run_dir=PATH/r"),
        (["train", "data.train=[{path: /home/me/d}]"], "train 'data.train=[{path: PATH/d}]'"),
    ],
)
def test_the_command_has_no_path_of_this_machine(words: list[str], portable: str):
    assert command_of(words) == f"python -m tools.benchmark {portable}"


def test_the_head_says_what_the_machine_is_and_reaches_but_not_which(monkeypatch: pytest.MonkeyPatch):
    started = time.perf_counter()
    found = head("train", ["train", "configs/small.yaml"])
    assert time.perf_counter() - started < 60, "it is measured after every benchmark"
    assert tuple(found) == HEAD
    text = json.dumps(found)
    assert HOST not in text
    assert str(Path.cwd()) not in text
    assert str(Path.home()) not in text
    described = found["machine"]
    assert described["cpus"] == len(os.sched_getaffinity(0))
    assert described["threads"] == torch.get_num_threads()
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    assert described["memory_gib"] == pytest.approx(pages * size / 2**30, abs=0.51)
    assert described["versions"]["torch"] == torch.__version__
    assert described["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(described["matrix_flags"]) <= set(MATRIX_FLAGS)
    for rate in described["rates"]["cpu"].values():
        assert 0.1 < rate < 1e5


def test_a_processor_is_read_as_the_kernel_describes_it(monkeypatch: pytest.MonkeyPatch):
    lines = ["processor\t: 0", "model name\t: Intel(R) Xeon(R) 6", "flags\t\t: fpu avx512f amx_bf16 amx_tile", ""]
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "\n".join(lines * 2))
    assert machine._processor() == "Intel(R) Xeon(R) 6"
    assert machine._matrix_flags() == ["avx512f", "amx_bf16"]
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Features\t: fp asimd i8mm bf16\n")
    assert machine._processor() == os.uname().machine
    assert machine._matrix_flags() == ["bf16", "i8mm"]


def test_a_product_of_matrices_is_counted_in_multiplications_and_additions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "take_turns", lambda contenders, repeats: {"product": [9.0, 2.0, 1.0]})
    assert machine._product_rate(torch.device("cpu")) == 2 * 2048 * 2048 * 2048


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *who, "-C", folder, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_revision_is_the_commit_and_whether_the_code_differs_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = tmp_path / "megagpt/benchmark/machine.py"
    code.parent.mkdir(parents=True)
    code.write_text("1")
    monkeypatch.setattr(machine, "__file__", str(code))
    assert machine.revision.__wrapped__() is None, "no checkout"
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "a")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "result.json").write_text("{}")
    assert machine.revision.__wrapped__() == {"commit": commit, "changed": False}, "what is no code does not count"
    code.write_text("2")
    assert machine.revision.__wrapped__() == {"commit": commit, "changed": True}
    monkeypatch.setenv("PATH", "")
    assert machine.revision.__wrapped__() is None, "no git"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "growth", "corpus", "data", "checkpoint", "generate"])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(command: str, tmp_path: Path):
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    for output, reason in ((tmp_path / "file/a.json", "Not a directory|File exists"), (tmp_path, "Is a directory")):
        done = run_module("tools.benchmark", command, "--output", output)
        assert (done.returncode, done.stdout) == (2, "")
        message, _, rest = done.stderr.partition(" cannot be written: ")
        assert message == f"error: --output {output}:"
        assert rest.removesuffix("; choose another\n") in reason.split("|")
    assert time.monotonic() - started < 60


def test_gpus_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch):
    properties = type("Properties", (), {"name": "NVIDIA H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    assert machine._gpus() == [{"name": "NVIDIA H100", "memory_gib": 80}] * 2
    if not torch.cuda.is_available():
        assert describe_machine()["driver"] is None
