"""The processes that attend: who they are, which of them an operator means, and which stream of one counts. Pure.

A process has one stream, but for a moment two of them, when its connection has been made anew: the last counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

CONTROL_PLANE = "control-plane"
"""In place of a service's name: the control plane itself. A service of this name cannot be asked for."""


@dataclass(frozen=True, slots=True)
class ProcessKey:
    """What tells processes apart.

    Attributes:
        workload_id: which workload it is, as its certificate proves; in plaintext empty.
        service: its service.
        process: the id that it has given itself.
    """

    workload_id: str
    service: str
    process: str


class Attendant(Protocol):
    """A process at the other end of a stream."""

    @property
    def key(self) -> ProcessKey:
        """Constant."""

    @property
    def instances(self) -> tuple[str, ...]:
        """Its names; may change."""


Member = TypeVar("Member", bound=Attendant)


class Roster(Generic[Member]):
    """Those that attend now."""

    def __init__(self) -> None:
        self._streams: dict[ProcessKey, list[Member]] = {}

    def __iter__(self) -> Iterator[Member]:
        """Each process once, by service and name."""
        return iter(sorted((streams[-1] for streams in self._streams.values()), key=_order))

    def __len__(self) -> int:
        return sum(map(len, self._streams.values()))

    def streams(self) -> list[Member]:
        """Every stream, those included that do not count any more."""
        return [member for streams in self._streams.values() for member in streams]

    def add(self, member: Member) -> None:
        """A stream has begun; it takes the place of an older one of the same process."""
        self._streams.setdefault(member.key, []).append(member)

    def remove(self, member: Member) -> None:
        """A stream has ended; nothing for one that is not there."""
        streams = self._streams.get(member.key, [])
        if member in streams:
            streams.remove(member)
            if not streams:
                del self._streams[member.key]

    def counts(self, member: Member) -> bool:
        """Whether this stream is the one of its process that is asked."""
        streams = self._streams.get(member.key)
        return streams is not None and streams[-1] is member


def means(member: Attendant, service: str, instance: str) -> bool:
    """Whether an operator who names these means the process."""
    if member.key.service != service:
        return False
    return not instance or instance == member.key.process or instance in member.instances


def _order(member: Attendant) -> tuple[str, tuple[str, ...], str]:
    return member.key.service, member.instances, member.key.process
