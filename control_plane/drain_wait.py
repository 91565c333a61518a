"""Waiting until nobody can hold an endpoint any more. Pure, but for the event that it sets."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

EDGES_BACK_WITHIN = 11.0
"""Seconds after a control plane's start in which a drain waits for edges that have not come back to it.

Gateways come back after 10 s at most, for so long is their longest pause between two attempts, and the time it takes to
connect. Clients of the mesh are not waited for: a call that reaches a server that is stopping is tried elsewhere.
"""


@dataclass(frozen=True, slots=True)
class DrainResult:
    """How a drain ended."""

    acknowledged: int
    """Subscribers that acknowledged a version without the endpoint, or never had it."""
    pending: tuple[str, ...]
    """Node ids of those that have not, and ``edge NAME`` of the edges that have not come back."""


class Subscriber(Protocol):
    """A stream, as far as a drain looks at it."""

    @property
    def node_id(self) -> str:
        """Whose it is."""

    def may_hold(self, service: str, endpoint_id: str) -> bool:
        """Whether it may have been sent a version with the endpoint, and has not acknowledged a later one."""


class DrainWait:
    """Somebody waits until no stream holds an endpoint.

    Args:
        service: the endpoint's service.
        endpoint_id: its id.
        streams: those that subscribe to the service's endpoints now.

    Attributes:
        done: set while nobody is waited for.
        edges: that are waited for.
    """

    __slots__ = ("_acknowledged", "_endpoint_id", "_pending", "done", "edges", "service")

    def __init__(self, service: str, endpoint_id: str, streams: Sequence[Subscriber]) -> None:
        self.service = service
        self.done = asyncio.Event()
        self._endpoint_id = endpoint_id
        self._pending = {stream for stream in streams if stream.may_hold(service, endpoint_id)}
        self._acknowledged = len(streams) - len(self._pending)
        self.edges: tuple[str, ...] = ()
        self._judge()

    def look(self, stream: Subscriber) -> None:
        """The stream's state changed. One that comes back with an old version held is waited for too."""
        if stream.may_hold(self.service, self._endpoint_id):
            self._pending.add(stream)
        elif stream in self._pending:
            self._acknowledged += 1
            self._pending.discard(stream)
        self._judge()

    def forget(self, stream: Subscriber) -> None:
        """The stream is no longer waited for."""
        self._pending.discard(stream)
        self._judge()

    def expect(self, edges: Collection[str]) -> None:
        """These edges are waited for until they have come back, and no others any more."""
        self.edges = tuple(edges)
        self._judge()

    def result(self) -> DrainResult:
        """How it stands."""
        pending = (*sorted(stream.node_id for stream in self._pending), *(f"edge {name}" for name in self.edges))
        return DrainResult(self._acknowledged, pending)

    def _judge(self) -> None:
        if self._pending or self.edges:
            self.done.clear()
        else:
            self.done.set()
