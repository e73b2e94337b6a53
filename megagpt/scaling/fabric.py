"""How fast ranks exchange data: the ranks of one node, pairs of nodes, all ranks together.

A slow node slows every collective that it takes part in, so nodes are told apart by pairs: a round-robin tournament in
which all pairs of a round exchange at once, rank i of one node with rank i of the other, so that every network card
carries what it carries in training. A pair needs no process group of its own. Rates are those of nccl-tests
(doc/PERFORMANCE.md there): algbw = bytes / seconds, and busbw = algbw x 2 (n - 1) / n for all-reduce, x (n - 1) / n for
all-gather, x 1 for broadcast, with the bytes of the whole result. Message sizes follow from a probe of 1 MiB and the
time that is given. Every received element is compared with what was sent.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

MOST_ROUNDS = 16
"""Rounds of the tournament: all pairs of up to 16 nodes; of more nodes each meets 16 others, or 15."""

_PROBE_BYTES = 1 << 20
_SMALLEST_BYTES = 1 << 16
_LARGEST_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}
_REPEATS = 5
_SMALL_REPEATS = 5
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name, from torch 2.13 on
_BUS_FACTORS: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all-gather": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
}


@dataclass(frozen=True)
class Exchange:
    """What a rank measured with its partner on another node, both sending to each other at once."""

    partner: int
    bytes: int
    bytes_per_second: float
    """In each direction."""
    latency_seconds: float
    """Of an exchange of 4 bytes."""
    intact: bool
    """Whether all bytes arrived as they were sent."""


@dataclass(frozen=True)
class Collective:
    """One operation among `ranks` ranks."""

    operation: str
    ranks: int
    bytes: int
    seconds: float
    """Of the large message, on the slowest rank."""
    latency_seconds: float
    """Of 4 bytes a rank, on the slowest rank."""
    intact: bool
    """Whether this rank received the right values."""

    @property
    def algbw(self) -> float:
        """Bytes of the result a second."""
        return self.bytes / self.seconds

    @property
    def busbw(self) -> float:
        """Bytes a second through the slowest link that the operation needs at least, whatever the number of ranks."""
        return self.algbw * _BUS_FACTORS[self.operation](self.ranks)


def tournament(nodes: int, most_rounds: int = MOST_ROUNDS) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs of `nodes`, no pair twice, by the circle method; all pairs if the rounds suffice."""
    places = nodes + nodes % 2  # of an odd number, one sits out each round
    rounds = []
    wanted = min(most_rounds, places - 1)
    for turn in (number * (places - 1) // wanted for number in range(wanted)):
        circle = [(turn + seat) % (places - 1) for seat in range(places - 1)]
        pairs = [(places - 1, circle[0]), *zip(circle[1 : places // 2], reversed(circle[places // 2 :]), strict=True)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < nodes])
    return rounds


class Fabric:
    """Measurements in the default process group. Every rank calls the same methods in the same order."""

    def __init__(self, device: torch.device, nodes: Sequence[Sequence[int]]) -> None:
        """nodes: the ranks of each node."""
        self._device, self._nodes = device, nodes
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._node = next(number for number, ranks in enumerate(nodes) if self._rank in ranks)

    def connect(self) -> float:
        """The first collective of all ranks, which sets connections up; the time of day when it was over for all."""
        for _ in range(2):
            self._slowest(0.0, None)
        return time.time()

    def within_node(self, seconds: float) -> Collective | None:
        """All-reduce among the ranks of this node; None if this is its only one."""
        ranks = list(self._nodes[self._node])
        if len(ranks) == 1:
            return None
        group = dist.new_group(ranks, use_local_synchronization=True)
        measured = self._measure("all-reduce", group, len(ranks), seconds)
        dist.destroy_process_group(group)
        return measured

    def between_nodes(self, seconds: float, on_step: Callable[[int, int | None], object]) -> Iterator[Exchange]:
        """The exchanges of this rank, each as it is done.

        on_step: called before each step with its number and this rank's partner; without one it waits for all others.
        """
        rounds = [self._partner(pairs) for pairs in tournament(len(self._nodes))] if len(self._nodes) > 1 else []
        if not rounds:
            return
        on_step(0, rounds[0])
        probe = self._exchange(rounds[0], _PROBE_BYTES) if rounds[0] is not None else None
        on_step(1, None)
        slowest = self._slowest(_PROBE_BYTES / probe.bytes_per_second if probe else 0.0, None)
        nbytes = self._fitting(slowest, seconds / len(rounds) / (_REPEATS + 1))
        for number, partner in enumerate(rounds):
            if partner is not None:
                on_step(2 + number, partner)
                yield self._exchange(partner, nbytes)

    def among_all(self, seconds: float) -> list[Collective]:
        """All-reduce, all-gather and broadcast of all ranks; nothing if there is one rank."""
        if self._ranks == 1:
            return []
        return [self._measure(operation, None, self._ranks, seconds / len(_BUS_FACTORS)) for operation in _BUS_FACTORS]

    def _partner(self, pairs: Sequence[tuple[int, int]]) -> int | None:
        """The rank that this one meets in a round: the one at its own place on the other node, if there is one."""
        place = list(self._nodes[self._node]).index(self._rank)
        for first, second in pairs:
            if self._node in (first, second):
                others = self._nodes[second if self._node == first else first]
                return others[place] if place < len(others) else None
        return None

    def _exchange(self, partner: int, nbytes: int) -> Exchange:
        def seconds(outgoing: torch.Tensor, incoming: torch.Tensor, repeats: int) -> float:
            def action() -> None:
                operations = [
                    dist.P2POp(dist.isend, outgoing, partner),
                    dist.P2POp(dist.irecv, incoming, partner),
                ]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()

            return min(self._seconds(action) for _ in range(repeats))

        outgoing = torch.full((nbytes // 4,), float(self._rank), device=self._device)
        incoming = torch.full_like(outgoing, -1.0)
        seconds(outgoing[:1], incoming[:1], 1)  # connects, and waits until the partner has come to this round
        latency = seconds(outgoing[:1], incoming[:1], _SMALL_REPEATS)
        best = seconds(outgoing, incoming, _REPEATS)
        intact = bool((incoming == partner).all())
        return Exchange(partner, outgoing.nbytes, outgoing.nbytes / best, latency, intact)

    def _measure(self, operation: str, group: dist.ProcessGroup | None, ranks: int, seconds: float) -> Collective:
        def prepared(nbytes: int) -> tuple[int, Callable[[], object], bool]:
            """The bytes of the result, the operation, whether it gave the right values."""
            elements = max(1, nbytes // 4 // ranks) * ranks
            return elements * 4, *self._operation(operation, group, ranks, elements)

        def measured(action: Callable[[], object], repeats: int) -> float:
            return self._slowest(min(self._seconds(action) for _ in range(repeats)), group)

        _, action, intact = prepared(4)
        latency = measured(action, _SMALL_REPEATS)
        _, action, _ = prepared(_PROBE_BYTES)
        nbytes = self._fitting(measured(action, 1), seconds / (_REPEATS + 1))
        nbytes, action, intact_too = prepared(nbytes)
        return Collective(operation, ranks, nbytes, measured(action, _REPEATS), latency, intact and intact_too)

    def _operation(
        self, operation: str, group: dist.ProcessGroup | None, ranks: int, elements: int
    ) -> tuple[Callable[[], object], bool]:
        """An operation to repeat, done once, and whether it gave the right values."""
        mine = dist.get_rank(group)
        if operation == "all-reduce":
            data = torch.ones(elements, device=self._device)
            dist.all_reduce(data, group=group)
            intact = bool((data == ranks).all())
            data.zero_()  # so that the sums of the repetitions stay finite
            return lambda: dist.all_reduce(data, group=group), intact
        if operation == "all-gather":
            part = torch.full((elements // ranks,), float(mine), device=self._device)
            data = torch.full((elements,), -1.0, device=self._device)
            _all_gather(data, part, group=group)
            expected = torch.arange(ranks, device=self._device).unsqueeze(1)
            intact = bool((data.view(ranks, -1) == expected).all())
            return lambda: _all_gather(data, part, group=group), intact
        data = torch.full((elements,), 0.0 if mine else 1.0, device=self._device)
        dist.broadcast(data, src=0, group=group)
        return lambda: dist.broadcast(data, src=0, group=group), bool((data == 1.0).all())

    def _seconds(self, action: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        action()
        self._synchronize()
        return time.perf_counter() - start

    def _slowest(self, seconds: float, group: dist.ProcessGroup | None) -> float:
        """The largest of all ranks' times; the same on all."""
        largest = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        return float(largest)

    def _fitting(self, probe_seconds: float, seconds: float) -> int:
        """How many bytes take `seconds` if the probe took `probe_seconds`: a multiple of 4, within bounds."""
        wanted = _PROBE_BYTES * seconds / max(probe_seconds, 1e-6)
        return int(min(max(wanted, _SMALLEST_BYTES), _LARGEST_BYTES[self._device.type])) // 4 * 4

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
