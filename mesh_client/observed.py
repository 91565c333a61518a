"""The mesh clients and servers of this process, for whoever looks at them from outside of calls."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from mesh_client.core.metric import MetricSet


class ObservedClient(Protocol):
    """A mesh client."""

    def add_metrics(self, metrics: MetricSet, wall: float) -> None:
        """Adds what it knows; ``wall`` is the time of day, seconds since the epoch."""


class ObservedServer(Protocol):
    """A server."""

    def add_metrics(self, metrics: MetricSet) -> None:
        """Adds what it knows."""


CLIENTS: WeakSet[ObservedClient] = WeakSet()
"""Those that are entered."""
SERVERS: WeakSet[ObservedServer] = WeakSet()
"""Those that have started and not stopped."""
