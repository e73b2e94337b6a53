"""Processes that begin with torch, DeepSpeed and a training run imported, in hundredths of a second instead of seconds.

They are forks of one server, which imports tests/distributed/preload.py. It is another server than that of
multiprocessing, which belongs to the code under test: preprocessing's workers are forks of it.
"""

from multiprocessing import forkserver, popen_forkserver
from multiprocessing.process import BaseProcess
from unittest.mock import patch

_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(["tests.distributed.preload"])


class ForkedProcess(BaseProcess):
    """As multiprocessing.Process."""

    _start_method = "forkserver"

    @staticmethod
    def _Popen(process: BaseProcess) -> popen_forkserver.Popen:  # noqa: N802 - multiprocessing's name
        with patch.object(forkserver, "connect_to_new_process", _SERVER.connect_to_new_process):
            return popen_forkserver.Popen(process)
