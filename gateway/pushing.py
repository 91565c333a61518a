"""What every kind of edge has in common, as its gateway sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from gateway.sync_state import Push
from mesh_client.core.edge_policy import EdgePolicy


class Pusher(Protocol):
    """Tells one edge what to do, and knows what it does. All are called by one task, but for `watch`."""

    def check(self, policy: EdgePolicy) -> str:
        """What is wrong with a policy, in words, as far as that is known without endpoints; empty if nothing is."""

    async def push(self, push: Push) -> None:
        """Returns when the edge obeys it, and sends nothing any more to endpoints that have left.

        Raises:
            PushRejectedError: it is refused; the edge obeys what it did before.
            PushFailedError: the edge could not be told.
        """

    async def observe(self, gone: Mapping[str, frozenset[str]]) -> None:
        """Returns when another gateway has taken these endpoints from the edge, or it has been waited for long enough.

        Args:
            gone: services of the mesh, and their endpoints as ``host:port``.
        """

    async def watch(self, lost: Callable[[], None]) -> None:
        """Calls back whenever the edge is found not to have what it was told last. Runs until it is cancelled."""
