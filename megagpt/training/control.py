"""What the ranks agree on beside the computation: whether to stop, whether their checkpoint files are written.

The flags travel over a gloo group of their own between the hosts, while the devices compute: a step neither waits for
them nor does the host wait for the device. A flag raised on one rank before a step begins is known to all when it ends.
Cost: an all-reduce of a few bytes a step, and a second set of connections.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=7)  # a rank that is lost or hangs is noticed by the supervisor, not by a timeout here


class HostGroup:
    """All ranks' hosts. Every method is called on every rank, in the same order."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    def begin(self, flags: list[int]) -> None:
        """Send this rank's flags on their way."""
        sent = torch.tensor(flags)
        work = dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = work, sent

    def end(self) -> list[int]:
        """The largest value that any rank gave for each flag at `begin`."""
        assert self._pending is not None, "begin comes before end"
        work, flags = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return flags.tolist()

    def agree(self, flags: list[int]) -> list[int]:
        """The largest value that any rank gives for each flag now."""
        self.begin(flags)
        return self.end()

    def gather(self, value: float) -> list[float]:
        """Every rank's value."""
        values = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(values, torch.tensor([value], dtype=torch.float64), group=self._group)
        return torch.cat(values).tolist()

    def close(self) -> None:
        """Give the connections back."""
        dist.destroy_process_group(self._group)
