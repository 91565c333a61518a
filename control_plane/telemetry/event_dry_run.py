"""Which of the events that a service's groups handled a policy would have kept from their handlers. Pure.

The record says, for each group, for how many events of each publisher and type its handlers were called, and how long
they took. So publishers and pauses are reckoned exactly, and a shorter time ends at least the calls whose bucket of
durations lies beyond it. What a policy in force kept from handlers already is not in the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from control_plane.telemetry.timeline import FIRST_BUCKET, Counters, count_of
from control_plane.telemetry.window import EventKey
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.tally import BOUNDS

MAX_DETAILS = 100


@dataclass(frozen=True, slots=True)
class KeptEvents:
    """Events of one publisher and type: how many calls of a group's handler, and how many of them a policy forbids.

    Attributes:
        group: of the service.
        publisher: who published.
        type: full name of the message.
        handled: calls of the handler.
        paused: of them, those for which the group would have waited.
        unauthorized: of them, those whose event would have been a dead letter because of who published.
        timed_out: of them, those that would not have had the time that they took.
    """

    group: str
    publisher: str
    type: str
    handled: int
    paused: int = 0
    unauthorized: int = 0
    timed_out: int = 0

    @property
    def kept(self) -> int:
        """For whatever reason."""
        return self.paused + self.unauthorized + self.timed_out


@dataclass(frozen=True, slots=True)
class EventImpact:
    """What a policy does to events; ``details`` have those that it keeps most of, at most `MAX_DETAILS`."""

    handled: int
    paused: int
    unauthorized: int
    timed_out: int
    details: Sequence[KeptEvents]


def try_events(policy: ServicePolicy, handled: Iterable[tuple[EventKey, Counters]]) -> EventImpact:
    """What a policy of a service would have done to the events that its groups handled."""
    rows = sorted(
        (_kept(policy, key, counters) for key, counters in handled),
        key=lambda row: (-row.kept, row.group, row.publisher, row.type),
    )
    return EventImpact(
        sum(row.handled for row in rows),
        sum(row.paused for row in rows),
        sum(row.unauthorized for row in rows),
        sum(row.timed_out for row in rows),
        [row for row in rows if row.kept][:MAX_DETAILS],
    )


def _kept(policy: ServicePolicy, key: EventKey, counters: Mapping[int, int]) -> KeptEvents:
    group, count = policy.event_group(key.group), count_of(counters)
    what = (key.group, key.publisher, key.type, count)
    handling = group.handling(key.type)
    if group.paused:
        return KeptEvents(*what, paused=count)
    if handling.publishers and key.publisher not in handling.publishers:
        return KeptEvents(*what, unauthorized=count)
    if handling.timeout is not None:
        return KeptEvents(*what, timed_out=_longer_than(handling.timeout, counters))
    return KeptEvents(*what)


def _longer_than(seconds: float, counters: Mapping[int, int]) -> int:
    """How many calls took longer, at least."""
    return sum(counters.get(FIRST_BUCKET + 1 + bucket, 0) for bucket, bound in enumerate(BOUNDS) if bound >= seconds)
