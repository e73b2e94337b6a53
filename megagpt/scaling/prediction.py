"""What the planner (megagpt.planning) says of the runs of a study, to be held against what they took."""

from dataclasses import dataclass

from megagpt.errors import UsageError
from megagpt.planning.measure import Measured
from megagpt.planning.plan import run_layout
from megagpt.planning.time import step_time
from megagpt.scaling.devices import Cluster, recognize
from megagpt.scaling.measurements import Curve, Point


@dataclass(frozen=True)
class Predictor:
    """The planner for the devices that a study ran on."""

    network_bytes_per_second: float
    """Of a GPU to other nodes, in one direction."""
    measured: Measured | None = None
    """Of this machine, which stands for every device that the table does not have; None: those have no prediction."""

    def step_seconds(self, point: Point) -> float | None:
        """None for an unknown device, and for a precision that the planner knows no peak of."""
        config = point.runs[0].entry.stored.run_config()
        gpus_per_node = point.ranks // point.nodes
        device = recognize(point.runs[0].device or "")
        efficiency = None
        if device is None:
            if self.measured is None:
                return None
            device, efficiency = self.measured.cluster.device, self.measured.efficiency
        cluster = Cluster(device, gpus_per_node, self.network_bytes_per_second)
        try:
            return step_time(config.model, run_layout(config, point.ranks, gpus_per_node), cluster, efficiency).total
        except UsageError:  # the device has no peak of this precision, yet the run was done
            return None

    def efficiency(self, curve: Curve, point: Point) -> float | None:
        """Of a rank, relative to the curve's base, as Curve.efficiency."""
        base, seconds = self.step_seconds(curve.base), self.step_seconds(point)
        if base is None or seconds is None:
            return None
        return (point.tokens / seconds / point.ranks) / (curve.base.tokens / base / curve.base.ranks)
