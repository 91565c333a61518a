"""What operators can ask of a process's log: its records, as they come, and other levels for a while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.log_entry import level_name
from mesh_client.core.log_queue import LogQueue
from mesh_client.core.log_ring import MAX_KEPT, Kept, LogFilter
from mesh_client.logs import Logs

BATCH = 100
BATCH_SIZE = 128 * 1024
PACE = 0.05
"""Records at most in a batch, their characters, about, and seconds at least between two: of a process that logs without
end, 2000 records a second are read."""

log = logging.getLogger(__name__)


class LogBatch(NamedTuple):
    """Some records, in the order in which they were written."""

    records: list[Kept]
    dropped: int
    """So many before them were lost, because they came faster than they were taken."""
    caught_up: bool
    """What was wanted of the past is complete with these. Of one batch alone."""


class LogService:
    """One process's log, for operators. Belongs to the event loop in which it is used.

    Args:
        logs: the log.
    """

    def __init__(self, logs: Logs) -> None:
        self._logs = logs
        self._expiry: asyncio.TimerHandle | None = None

    @property
    def logs(self) -> Logs:
        """The log."""
        return self._logs

    @property
    def process(self) -> str:
        """Tells this process from others that are called the same."""
        return self._logs.process

    async def read(
        self, last: int, wanted: LogFilter, *, after: int = 0, follow: bool = False
    ) -> AsyncGenerator[LogBatch, None]:
        """The newest records that are wanted and, if asked, every further one, for ever.

        Args:
            last: of the past, so many at most; at most 1000.
            wanted: which.
            after: none up to this sequence number.
            follow: whether to go on.
        """
        waiting = _Waiting(asyncio.get_running_loop())
        last = min(last, MAX_KEPT)
        end: Callable[[], None] | None = None
        if follow:
            end = self._logs.follow(waiting.put, last, wanted, after)
        else:
            for kept in self._logs.last(last, wanted, after):
                waiting.put(kept)
        try:
            past, caught_up = len(waiting), False
            while not (caught_up and end is None):
                records, dropped = waiting.take()
                past -= len(records) + dropped
                now_caught_up = past <= 0 and not caught_up
                caught_up |= now_caught_up
                yield LogBatch(records, dropped, now_caught_up)
                if end is not None:
                    await asyncio.sleep(PACE)
                    await waiting.some()
        finally:
            if end is not None:
                end()

    def change_level(self, logger: str, level: int, seconds: float) -> str:
        """Gives a logger another level for a while, after which it falls back by itself; why not, or nothing.

        Args:
            logger: its name; empty for the root logger.
            level: as a number of `logging`; 0: as configured, at once.
            seconds: for how long, at most 24 h.
        """
        shown = logger or "the root logger"
        try:
            if not level:
                if self._logs.reset_level(logger):
                    log.info("an operator resets the level of %s", shown)
            else:
                self._logs.set_level(logger, level, seconds, time.monotonic())
                log.info("an operator sets the level of %s to %s for %g s", shown, level_name(level), seconds)
        except InvalidValueError as error:
            return str(error)
        self._expire()
        return ""

    def close(self) -> None:
        """Levels that operators have changed are as configured again."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
            self._logs.expire(float("inf"))

    def _expire(self) -> None:
        """Lets levels fall back when they are due, and comes back for the next one."""
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        now = time.monotonic()
        following = self._logs.expire(now)
        if following is not None:
            self._expiry = asyncio.get_running_loop().call_later(max(0.0, following - now), self._expire)


class _Waiting:
    """Records that wait to be taken: put in by any thread, taken in the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue = LogQueue[Kept](MAX_KEPT)
        self._lock = threading.Lock()
        self._event = asyncio.Event()
        self._told = False

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, kept: Kept) -> None:
        with self._lock:
            self._queue.put(kept)
            told, self._told = self._told, True
        if not told:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._event.set)

    def take(self) -> tuple[list[Kept], int]:
        """As many as a batch may hold, and how many were lost before them."""
        taken: list[Kept] = []
        lost = size = 0
        with self._lock:
            while self._queue and len(taken) < BATCH and size < BATCH_SIZE:
                (kept,), dropped = self._queue.take(1)
                taken.append(kept)
                size += kept.size
                lost += dropped
        return taken, lost

    async def some(self) -> None:
        """Returns when there are some."""
        while True:
            with self._lock:
                if self._queue:
                    return
                self._told = False
                self._event.clear()
            await self._event.wait()
