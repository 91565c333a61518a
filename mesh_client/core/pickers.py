"""The balancing algorithms, each over a fixed list of at least two nodes.

Weights are relative, above 0 and given apart from the nodes, because slow start changes them while a picker lives:
`reweigh` replaces them and keeps cursors.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from itertools import accumulate, cycle
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from random import Random

    from mesh_client.core.node import Node

RING_POINTS = 160
"""Points on the ring of an endpoint of average weight, as in ketama: shares differ by about 8%."""

MAX_SCHEDULE_WORK = 20_000
"""Turns times nodes up to which a smooth weighted order is worked out beforehand: about a millisecond."""

DRAWS_BEFORE_SEARCH = 4
"""Draws of a retry before it looks for the nodes that it has not tried."""

_POINTS_PER_DIGEST = 8
_OWNER_BITS = 20
_OWNER_MASK = (1 << _OWNER_BITS) - 1

_Item = TypeVar("_Item")


class WeightedPicker(Protocol):
    """A picker whose weights can change while its nodes stay."""

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node | None:
        """See `mesh_client.core.node.Picker`."""
        ...

    def reweigh(self, weights: Sequence[float]) -> None:
        """Use these weights from now on; one for each node, in the order of the nodes."""
        ...


class EmptyPicker:
    """No node at all."""

    __slots__ = ()

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> None:
        """None."""


class SinglePicker:
    """One node."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """The node, excluded or not."""
        return self._node


class RoundRobinPicker:
    """Each node in turn, from a random one on, so that many clients do not march in step. Weights are ignored.

    As gRPC's ``round_robin``: https://github.com/grpc/grpc/blob/master/doc/load-balancing.md.
    """

    __slots__ = ("_count", "_turns")

    def __init__(self, nodes: Sequence[Node], rng: Random) -> None:
        self._count = len(nodes)
        self._turns = _cycle_from(nodes, rng)

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """The next node; excluded ones lose their turn."""
        node = next(self._turns)
        if excluded:
            for _ in range(self._count):
                if node not in excluded:
                    break
                node = next(self._turns)
        return node


class SmoothWeightedPicker:
    """Weighted round robin that spreads each node's turns evenly.

    nginx's algorithm (https://github.com/nginx/nginx/commit/52327e0627f49dbda1e8db695e63a4b0af4448b1): every turn adds
    its weight to each node's credit; the node with most credit is picked and pays the sum of weights. Nodes of equal
    weight share one entry and take turns within it. With whole weights the order of the entries repeats after
    ``sum / gcd`` turns: unless that is very long it is worked out once and replayed from a random turn on. Otherwise,
    in slow start too, a pick is linear in the number of nodes.
    """

    __slots__ = ("_credits", "_nodes", "_rng", "_total", "_turns", "_weights")

    def __init__(self, nodes: Sequence[Node], weights: Sequence[float], rng: Random) -> None:
        self._nodes = tuple(nodes)
        self._rng = rng
        self._weights: tuple[float, ...] = ()
        self._total = 0.0
        self._turns: Iterator[Iterator[Node]] | None = None
        # Without a random phase every client would begin with the heaviest node.
        self._credits = [rng.random() * weight for weight in weights]
        self._credits[rng.choices(range(len(weights)), weights)[0]] += math.fsum(weights)
        self.reweigh(weights)

    def reweigh(self, weights: Sequence[float]) -> None:
        """Use these weights from now on; credits stay."""
        self._weights = tuple(weights)
        self._total = math.fsum(weights)
        self._turns = self._plan([int(weight) for weight in weights]) if _all_whole(weights) else None

    def _plan(self, weights: Sequence[int]) -> Iterator[Iterator[Node]] | None:
        groups: dict[int, list[Node]] = {}
        for node, weight in zip(self._nodes, weights, strict=True):
            groups.setdefault(weight, []).append(node)
        shares = [weight * len(nodes) for weight, nodes in groups.items()]
        period = sum(shares) // math.gcd(*shares)
        if period * len(shares) > MAX_SCHEDULE_WORK:
            return None
        balance = [0.0] * len(shares)
        total = sum(shares)
        entries = [_cycle_from(nodes, self._rng) for nodes in groups.values()]
        return _cycle_from([entries[_smooth_turn(balance, shares, total)] for _ in range(period)], self._rng)

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """The node whose turn it is; excluded ones lose theirs."""
        turns = self._turns
        if turns is None:
            node = self._nodes[_smooth_turn(self._credits, self._weights, self._total)]
        else:
            node = next(next(turns))
        if excluded and node in excluded:
            others = [index for index, other in enumerate(self._nodes) if other not in excluded]
            if others:
                return self._nodes[self._rng.choices(others, [self._weights[index] for index in others])[0]]
        return node


def _cycle_from(items: Sequence[_Item], rng: Random) -> Iterator[_Item]:
    """The items in turn for ever, from a random one on."""
    first = rng.randrange(len(items))
    return cycle((*items[first:], *items[:first]))


def _all_whole(weights: Sequence[float]) -> bool:
    return all(weight == int(weight) for weight in weights)


def _smooth_turn(balance: list[float], weights: Sequence[float], total: float) -> int:
    best = 0
    for index, weight in enumerate(weights):
        credit = balance[index] = balance[index] + weight
        if credit > balance[best]:
            best = index
    balance[best] -= total
    return best


class _SamplingPicker(ABC):
    """What the pickers that draw at random share: weights, and what a retry does about nodes it has tried."""

    __slots__ = ("_bounds", "_count", "_last", "_nodes", "_random", "_rng", "_total", "_uniform", "_weights")

    def __init__(self, nodes: Sequence[Node], weights: Sequence[float], rng: Random) -> None:
        self._nodes = tuple(nodes)
        self._count = len(self._nodes)
        self._last = self._count - 1
        self._rng = rng
        self._random = rng.random
        self.reweigh(weights)

    def reweigh(self, weights: Sequence[float]) -> None:
        """Use these weights from now on."""
        self._weights = tuple(weights)
        self._bounds = list(accumulate(weights))
        self._total = self._bounds[-1]
        self._uniform = min(weights) == max(weights)

    @abstractmethod
    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """A drawn node; one that is not excluded while there is any."""

    def _pick_other(self, excluded: Collection[Node], now: float) -> Node:
        """A few draws nearly always find a node that is not excluded; if not, draw among those alone."""
        for _ in range(DRAWS_BEFORE_SEARCH):
            node = self.pick(None, (), now)
            if node not in excluded:
                return node
        left = [pair for pair in zip(self._nodes, self._weights, strict=True) if pair[0] not in excluded]
        if not left:
            return self.pick(None, (), now)
        if len(left) == 1:
            return left[0][0]
        nodes, weights = zip(*left, strict=True)
        return type(self)(nodes, weights, self._rng).pick(None, (), now)


class RandomPicker(_SamplingPicker):
    """Independent draws in proportion to weight.

    As Envoy's ``RANDOM``, with weights:
    https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/load_balancers#random.
    """

    __slots__ = ()

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """A node."""
        if excluded:
            return self._pick_other(excluded, now)
        if self._uniform:
            return self._nodes[int(self._random() * self._count)]
        return self._nodes[bisect_right(self._bounds, self._random() * self._total, 0, self._last)]


class LeastRequestPicker(_SamplingPicker):
    """Power of two choices on calls in flight.

    Of two distinct nodes the one with fewer calls in flight for its weight is picked (M. Mitzenmacher, "The Power of
    Two Choices in Randomized Load Balancing", 1996; two distinct draws as in Finagle's ``P2CPick``). Both draws are in
    proportion to weight and a tie goes to the first, so that weights hold with no load at all too.
    """

    __slots__ = ()

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """A node."""
        if excluded:
            return self._pick_other(excluded, now)
        nodes = self._nodes
        random = self._random
        if self._uniform:
            first = int(random() * self._count)
            second = int(random() * self._last)
            if second >= first:
                second += 1
            left = nodes[first]
            right = nodes[second]
            return right if right.load.outstanding < left.load.outstanding else left
        bounds = self._bounds
        weights = self._weights
        last = self._last
        first = bisect_right(bounds, random() * self._total, 0, last)
        # The second draw is over the line of weights with the first node's piece cut out.
        weight = weights[first]
        point = random() * (self._total - weight)
        if point >= bounds[first] - weight:
            point += weight
        second = bisect_right(bounds, point, 0, last)
        left = nodes[first]
        right = nodes[second]
        if right.load.outstanding * weight < left.load.outstanding * weights[second]:
            return right
        return left


class PeakEwmaPicker(_SamplingPicker):
    """Power of two choices on peak-sensitive latency times calls in flight, over weight.

    Finagle's ``P2CPeakEwma``, see `mesh_client.core.load.EndpointLoad`.
    """

    __slots__ = ()

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """A node."""
        if excluded:
            return self._pick_other(excluded, now)
        random = self._random
        first = int(random() * self._count)
        second = int(random() * self._last)
        if second >= first:
            second += 1
        left = self._nodes[first]
        right = self._nodes[second]
        left_cost = left.load.latency_cost(now)
        right_cost = right.load.latency_cost(now)
        if self._uniform:
            return right if right_cost < left_cost else left
        return right if right_cost * self._weights[first] < left_cost * self._weights[second] else left


def stable_hash(text: str) -> int:
    """64 bits of BLAKE2b: the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class RingHashPicker:
    """Consistent hashing: a key goes to the node with the next point on a ring.

    Ketama (https://www.metabrew.com/article/libketama-consistent-hashing-algo-for-memcached) with BLAKE2b; an
    endpoint's points come from its id alone, so one endpoint more or less moves about ``1/n`` of the keys. A key whose
    node is excluded goes on along the ring. Without a key the pick is random by weight.

    A node's weight decides how many of its points count. The average is rounded to a power of two before it
    is used as the scale, so that a change of one weight rarely changes the other nodes' points.
    """

    __slots__ = ("_keyless", "_nodes", "_ring", "_scale")

    def __init__(self, nodes: Sequence[Node], weights: Sequence[float], rng: Random) -> None:
        self._nodes = tuple(nodes)
        self._keyless = RandomPicker(nodes, weights, rng)
        self._scale = RING_POINTS / 2.0 ** round(math.log2(math.fsum(weights) / len(weights)))
        self._ring: list[int] = []
        self._place(weights)

    def reweigh(self, weights: Sequence[float]) -> None:
        """Use these weights from now on; the scale stays, so only nodes whose weight changed gain or lose keys."""
        self._keyless.reweigh(weights)
        self._place(weights)

    def _place(self, weights: Sequence[float]) -> None:
        ring: list[int] = []
        for index, (node, weight) in enumerate(zip(self._nodes, weights, strict=True)):
            # The low bits name the owner: one sorted list of integers is the whole ring.
            points = _ring_points(node, max(1, round(weight * self._scale)))
            ring += [point | index for point in points]
        ring.sort()
        self._ring = ring

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node:
        """The node that owns the key, or the next along the ring that is not excluded."""
        if key is None:
            return self._keyless.pick(None, excluded, now)
        ring = self._ring
        index = bisect_left(ring, stable_hash(key))
        if index == len(ring):
            index = 0
        node = self._nodes[ring[index] & _OWNER_MASK]
        if excluded and node in excluded:
            return self._walk(index, node, excluded)
        return node

    def _walk(self, index: int, owner: Node, excluded: Collection[Node]) -> Node:
        if all(node in excluded for node in self._nodes):
            return owner
        ring = self._ring
        node = owner
        while node in excluded:
            index = (index + 1) % len(ring)
            node = self._nodes[ring[index] & _OWNER_MASK]
        return node


def _ring_points(node: Node, count: int) -> tuple[int, ...]:
    """The node's first ``count`` points, with the owner's bits zero. The node keeps them for the next picker."""
    points = node.ring_points
    if len(points) < count:
        more = list(points)
        while len(more) < count:
            block = len(more) // _POINTS_PER_DIGEST
            digest = hashlib.blake2b(f"{node.endpoint.id}#{block}".encode()).digest()
            more += [
                int.from_bytes(digest[start : start + 8], "big") & ~_OWNER_MASK for start in range(0, len(digest), 8)
            ]
        points = node.ring_points = tuple(more)
    return points[:count]
