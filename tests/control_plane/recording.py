"""What a source emits, recorded so that a test can wait for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Protocol

from control_plane.events import (
    Event,
    PolicyDeleted,
    PolicyStored,
    ServiceObserved,
    ServiceVanished,
    SourceConnected,
    SourceLost,
)
from mesh_client.core.model import Endpoint

PATIENCE = 20.0
"""Seconds for anything to happen that must."""


class Runnable(Protocol):
    """A source or a policy store."""

    def run(self, emit: Callable[[Event], None], /) -> Coroutine[object, object, None]: ...


class Recording:
    """Events in order, and the state that they add up to."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.times: list[float] = []
        self.services: dict[str, dict[str, Endpoint]] = {}
        self.policies: dict[str, bytes] = {}
        self.connected = False
        self.detail = ""
        self._changed = asyncio.Event()

    def emit(self, event: Event) -> None:
        """Takes one event in."""
        self.events.append(event)
        self.times.append(asyncio.get_running_loop().time())
        match event:
            case ServiceObserved(_, service, endpoints):
                self.services[service] = {endpoint.id: endpoint for endpoint in endpoints}
            case ServiceVanished(_, service):
                self.services.pop(service, None)
            case SourceConnected():
                self.connected, self.detail = True, ""
            case SourceLost(_, detail):
                self.connected, self.detail = False, detail
            case PolicyStored(service, document):
                self.policies[service] = document
            case PolicyDeleted(service):
                self.policies.pop(service, None)
        self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Returns when the condition holds, which is looked at after each event.

        Raises:
            AssertionError: it does not within `PATIENCE`.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            last = "\n".join(map(str, self.events[-10:]))
            raise AssertionError(f"it did not happen; services {self.services}, last events:\n{last}") from None

    def ids(self, service: str) -> set[str]:
        """Ids of the service's endpoints; empty for one that is not there."""
        return set(self.services.get(service, ()))

    def mark(self) -> int:
        """A place in the record, for `since`."""
        return len(self.events)

    def since(self, mark: int) -> list[Event]:
        """What was emitted since."""
        return self.events[mark:]


@contextlib.asynccontextmanager
async def recorded(source: Runnable) -> AsyncIterator[Recording]:
    """Runs a source, and records it."""
    recording = Recording()
    task = asyncio.ensure_future(source.run(recording.emit))
    try:
        yield recording
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
