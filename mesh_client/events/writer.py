"""Stores published events: those that come at the same time share a transaction, and the wait for the disk."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.errors import OutboxFullError, PublishTimeoutError
from mesh_client.events.outbox import OutboxStore
from mesh_client.events.prepared import PreparedEvent
from mesh_client.tasks import end_tasks

BATCH = 512
"""Events that are stored in one transaction at most."""
_BUSY_WAIT = 0.01
_SILENT = "somebody else holds its database, or it does not answer"


Add = Callable[[list[PreparedEvent]], Awaitable[list[OutboxFullError | None]]]


class OutboxWriter:
    """Writes to one outbox.

    Args:
        store: the table.
        add: the store's method, in the thread that uses it.
    """

    def __init__(self, store: OutboxStore, add: Add) -> None:
        self._store = store
        self._add = add
        self._waiting: deque[tuple[PreparedEvent, asyncio.Future[None]]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._trouble = ""
        """Why nothing can be stored now, in the database's words."""

    async def add(self, event: PreparedEvent, timeout: float) -> None:
        """Returns once the event is stored.

        Raises:
            OutboxFullError: there is no room for it.
            PublishTimeoutError: it took more than ``timeout`` seconds.
            ConfigError: the outbox cannot be used.
        """
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((event, stored))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._store_all(), name="outbox writes")
        try:
            async with asyncio.timeout(max(timeout, 0.0)):
                await stored
        except TimeoutError:
            raise PublishTimeoutError(
                f"the outbox at {self._store.name} did not store the event in time: {self._trouble or _SILENT}"
            ) from None

    async def close(self) -> None:
        """Returns when everything is stored whose publishers still wait."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def abandon(self) -> None:
        """Stores nothing more; publishers that still wait are told at their deadlines."""
        await end_tasks(self._task)

    async def _store_all(self) -> None:
        while self._waiting:
            batch: list[tuple[PreparedEvent, asyncio.Future[None]]] = []
            while self._waiting and len(batch) < BATCH:
                event, stored = self._waiting.popleft()
                if not stored.done():  # otherwise its publisher has given up
                    batch.append((event, stored))
            if batch:
                await self._store_batch(batch)

    async def _store_batch(self, batch: list[tuple[PreparedEvent, asyncio.Future[None]]]) -> None:
        try:
            results = await self._add([event for event, _ in batch])
        except Exception as error:
            if self._store.busy(error):
                self._trouble = " ".join(str(error).split())
                self._waiting.extendleft(reversed(batch))
                await asyncio.sleep(_BUSY_WAIT)
                return
            for _, stored in batch:
                if not stored.done():
                    stored.set_exception(ConfigError(f"the outbox at {self._store.name} cannot be used: {error}"))
            return
        self._trouble = ""
        for (_, stored), result in zip(batch, results, strict=True):
            if stored.done():
                continue
            if result is None:
                stored.set_result(None)
            else:
                stored.set_exception(result)
