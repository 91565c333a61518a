"""From a service's endpoints to a picker: who may be called, in which zone, with what weight.

Pickers are made whole and swapped whole. Health and zone shares follow Envoy's documentation on panic threshold,
priority levels and locality (https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mesh_client.core.model import Health
from mesh_client.core.node import Node, Picker
from mesh_client.core.pickers import (
    EmptyPicker,
    LeastRequestPicker,
    PeakEwmaPicker,
    RandomPicker,
    RingHashPicker,
    RoundRobinPicker,
    SinglePicker,
    SmoothWeightedPicker,
    WeightedPicker,
    stable_hash,
)
from mesh_client.core.policy import Algorithm

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from random import Random

    from mesh_client.core.policy import LoadBalancer

__all__ = ["Node", "Picker", "build_picker", "next_rebuild"]

OVERPROVISIONING_FACTOR = 1.4
"""Envoy's: a zone keeps all of its own calls until fewer than 1/1.4 = 71% of its endpoints are usable."""

SLOW_START_MIN_WEIGHT = 0.1
"""Envoy's ``min_weight_percent``: the smallest share of its weight that a new endpoint has."""

SLOW_START_STEPS = 100
"""Weights are computed anew at most this many times in one slow start, not at every pick."""

_HASH_FRACTION_BITS = 20

_WEIGHTED: dict[Algorithm, type[LeastRequestPicker | PeakEwmaPicker | RandomPicker | RingHashPicker]] = {
    Algorithm.LEAST_REQUEST: LeastRequestPicker,
    Algorithm.PEAK_EWMA: PeakEwmaPicker,
    Algorithm.RANDOM: RandomPicker,
    Algorithm.RING_HASH: RingHashPicker,
}


def build_picker(settings: LoadBalancer, nodes: Sequence[Node], *, zone: str, rng: Random, now: float) -> Picker:
    """The picker over a service's nodes as they are now; build it anew when they change and at `next_rebuild`.

    Usable nodes are healthy and not ejected. When their share of all that are not draining is below the panic
    threshold, health says more about the observer than about them: all that are not draining are used, whatever their
    zone. Unlike in Envoy those that this client has ejected are still left out, if without them there are enough: what
    it has seen itself holds when what it is told does not. A threshold of 0 turns panic off; with no usable node the
    picker is then empty.

    Args:
        settings: the service's balancing policy.
        nodes: every node of the service.
        zone: the caller's own zone; empty for none.
        rng: the caller's random generator; the picker keeps it.
        now: seconds on the clock of ``Node.added_at``.
    """
    present = [node for node in nodes if node.endpoint.health is not Health.DRAINING]
    usable = [node for node in present if node.endpoint.health is Health.HEALTHY and not node.ejected]
    if _too_few(usable, present, settings):
        kept = [node for node in present if not node.ejected]
        return _build_group(settings, present if _too_few(kept, present, settings) else kept, rng, now)
    if not settings.prefer_same_zone or not zone:
        return _build_group(settings, usable, rng, now)
    local = [node for node in usable if node.endpoint.locality.zone == zone]
    remote = [node for node in usable if node.endpoint.locality.zone != zone]
    if not local or not remote:
        return _build_group(settings, usable, rng, now)
    local_present = sum(node.endpoint.locality.zone == zone for node in present)
    return _ZonePicker(
        _build_group(settings, local, rng, now),
        _build_group(settings, remote, rng, now),
        _local_share(len(local) / local_present, len(remote) / (len(present) - local_present)),
        rng,
        keyed=settings.algorithm is Algorithm.RING_HASH,
    )


def next_rebuild(settings: LoadBalancer, nodes: Sequence[Node], now: float) -> float | None:
    """When the last slow start under way ends, so that a plain picker can take over; None when none is under way.

    Pickers are right until then and after: this is about their cost only.
    """
    if not settings.slow_start:
        return None
    end = max((node.added_at for node in nodes), default=-math.inf) + settings.slow_start
    return end if end > now else None


def _too_few(nodes: Sequence[Node], present: Sequence[Node], settings: LoadBalancer) -> bool:
    return len(nodes) * 100.0 < settings.panic_threshold * len(present)


def _local_share(local_health: float, remote_health: float) -> float:
    """Share of the calls that stay in the zone, after Envoy's priority load: a shortage on both sides is scaled up."""
    local = min(1.0, OVERPROVISIONING_FACTOR * local_health)
    remote = min(1.0 - local, OVERPROVISIONING_FACTOR * remote_health)
    return local / (local + remote)


def _build_group(settings: LoadBalancer, nodes: Sequence[Node], rng: Random, now: float) -> Picker:
    if not nodes:
        return EmptyPicker()
    if len(nodes) == 1:
        return SinglePicker(nodes[0])
    algorithm = settings.algorithm
    weights = [float(node.endpoint.weight) for node in nodes]
    slow_starting = _slow_starting(settings.slow_start, nodes, now)
    if algorithm is Algorithm.ROUND_ROBIN:
        if not slow_starting:
            return RoundRobinPicker(nodes, rng)
        weights = [1.0] * len(nodes)
    picker: WeightedPicker
    if algorithm in (Algorithm.ROUND_ROBIN, Algorithm.WEIGHTED_ROUND_ROBIN):
        picker = SmoothWeightedPicker(nodes, weights, rng)
    else:
        picker = _WEIGHTED[algorithm](nodes, weights, rng)
    return _SlowStartPicker(picker, nodes, weights, settings.slow_start) if slow_starting else picker


def _slow_starting(window: float, nodes: Sequence[Node], now: float) -> bool:
    return window > 0.0 and any(node.added_at + window > now for node in nodes)


class _SlowStartPicker:
    """Gives new nodes a share that grows to full.

    Envoy's slow start with aggression 1.0: a node's weight is multiplied by ``max(0.1, age / window)``
    (https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/load_balancing/slow_start).
    """

    __slots__ = ("_nodes", "_picker", "_reweigh_at", "_weights", "_window")

    def __init__(self, picker: WeightedPicker, nodes: Sequence[Node], weights: Sequence[float], window: float) -> None:
        self._picker = picker
        self._nodes = tuple(nodes)
        self._weights = tuple(weights)
        self._window = window
        self._reweigh_at = -math.inf

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node | None:
        """As the picker within, with the weights of this moment."""
        if now >= self._reweigh_at:
            self._reweigh(now)
        return self._picker.pick(key, excluded, now)

    def _reweigh(self, now: float) -> None:
        factors = [max(SLOW_START_MIN_WEIGHT, min(1.0, (now - node.added_at) / self._window)) for node in self._nodes]
        self._picker.reweigh([weight * factor for weight, factor in zip(self._weights, factors, strict=True)])
        ended = min(factors) >= 1.0
        self._reweigh_at = math.inf if ended else now + self._window / SLOW_START_STEPS


class _ZonePicker:
    """Keeps a share of the calls in the caller's zone; the rest, and retries with nowhere else to go, leave it."""

    __slots__ = ("_keyed", "_local", "_random", "_remote", "_share")

    def __init__(self, local: Picker, remote: Picker, share: float, rng: Random, *, keyed: bool) -> None:
        self._local = local
        self._remote = remote
        self._share = share
        self._keyed = keyed
        self._random = rng.random

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node | None:
        """A node of the zone in its share of the picks, else one of the others; on a ring the key decides which."""
        share = self._share
        if share >= 1.0:
            first, second = self._local, self._remote
        else:
            # The ring goes by a hash's high bits, so the low ones are free to choose the side.
            point = self._random() if key is None or not self._keyed else _hash_fraction(key)
            first, second = (self._local, self._remote) if point < share else (self._remote, self._local)
        node = first.pick(key, excluded, now)
        if excluded and node in excluded:
            other = second.pick(key, excluded, now)
            return node if other in excluded else other
        return node


def _hash_fraction(key: str) -> float:
    bits: int = stable_hash(key) & ((1 << _HASH_FRACTION_BITS) - 1)
    return bits / (1 << _HASH_FRACTION_BITS)
