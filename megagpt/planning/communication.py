"""Seconds that collectives take by the bytes that cross the slowest link (ring algorithms; Patarasu & Yuan 2009).

A ring through n GPUs moves (n - 1) / n of the data over each link for a reduce-scatter or an all-gather, twice that for
an all-reduce. A ring between nodes enters and leaves each node once a network card, so that it has the cards of all the
group's GPUs of the node together, but no more than a GPU's links in the node. Start-up times of messages are left out.
"""

from megagpt.planning.efficiency import Efficiency
from megagpt.scaling.devices import Cluster


def ring_bandwidth(cluster: Cluster, efficiency: Efficiency, gpus: int, gpus_of_a_node: int) -> float:
    """Bytes a second over the slowest link of a ring through `gpus`, of which `gpus_of_a_node` share a node."""
    link = efficiency.links * cluster.device.link_bandwidth
    if gpus <= gpus_of_a_node:
        return link
    return min(link, efficiency.links * cluster.network_bytes_per_second * gpus_of_a_node)


def ring_seconds(nbytes: float, gpus: int, bandwidth: float) -> float:
    """Of a reduce-scatter or an all-gather of `nbytes` in all; an all-reduce takes two."""
    return nbytes * (gpus - 1) / gpus / bandwidth if gpus > 1 else 0.0


def exposed(communication: float, hiding: float, overlap: float) -> float:
    """Seconds of communication that computation does not hide: `overlap` of it may run beside `hiding` seconds."""
    return max((1 - overlap) * communication, communication - hiding)
