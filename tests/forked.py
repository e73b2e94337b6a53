"""Processes that begin with torch, DeepSpeed and a training run imported, in hundredths of a second instead of seconds.

They are forks of one server, which imports tests/preload.py. It is another server than that of multiprocessing, which
belongs to the code under test: preprocessing's workers are forks of it.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(["tests.preload"])
_ROOT = Path(__file__).parents[1]


class ForkedProcess(BaseProcess):
    """As multiprocessing.Process."""

    _start_method = "forkserver"

    @staticmethod
    def _Popen(process: BaseProcess) -> popen_forkserver.Popen:  # noqa: N802 - multiprocessing's name
        with patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
            return popen_forkserver.Popen(process)


def run_module(
    module: str, *arguments: object, stdin: bytes = b"", folder: Path = _ROOT, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """What `python -m module arguments...` in `folder` says, and its exit code."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as name:
        streams = [Path(name) / stream for stream in ("stdin", "stdout", "stderr")]
        streams[0].write_bytes(stdin)
        process = ForkedProcess(target=run_as_main, args=(module, words, streams, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([module, *words], timeout)
        output, errors = (stream.read_text(encoding="utf-8") for stream in streams[1:])
        return subprocess.CompletedProcess([module, *words], process.exitcode, output, errors)


def run_as_main(module: str, arguments: list[str], streams: list[Path], folder: Path = _ROOT) -> None:
    """In a fork: be `python -m module arguments...` from its first line on; streams: files for descriptors 0 to 2."""
    os.chdir(folder)
    for descriptor, stream in enumerate(streams):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if descriptor else os.O_RDONLY
        os.dup2(os.open(stream, flags), descriptor)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
