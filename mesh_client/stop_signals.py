"""SIGTERM and SIGINT as a server wants them: the first asks it to stop, the second to stop at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Coroutine, Iterator
from typing import Any

from mesh_client.core.errors import ConfigError
from mesh_client.tasks import end_tasks

logger = logging.getLogger(__name__)


class StopSignals:
    """SIGTERM and SIGINT, counted."""

    def __init__(self) -> None:
        self.count = 0
        self._first = asyncio.Event()
        self._second = asyncio.Event()

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Takes the signals over for the ``with`` block.

        Raises:
            ConfigError: this is not the main thread.
        """
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.getsignal(number) for number in numbers}
        try:
            for number in numbers:
                loop.add_signal_handler(number, self._received, number)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                "serve() needs the main thread, for its signals; elsewhere use start() and stop()"
            ) from error
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)
                signal.signal(number, previous[number])

    def _received(self, number: int) -> None:
        self.count += 1
        logger.info("received %s%s", signal.Signals(number).name, " again" if self.count > 1 else "")
        (self._first if self.count == 1 else self._second).set()

    async def first_or(self, ended: asyncio.Future[Any]) -> None:
        """Returns at the first signal, or when ``ended`` is done."""
        await _first_of(self._first.wait(), ended)

    async def unless_again(self, work: Coroutine[Any, Any, None]) -> bool:
        """Does the work; False when a second signal cancelled it.

        Raises:
            BaseException: what the work raised.
        """
        task = asyncio.ensure_future(work)
        await _first_of(self._second.wait(), task)
        if not task.done():
            await end_tasks(task)
            return False
        await task
        return True


async def _first_of(waiting: Coroutine[Any, Any, object], other: asyncio.Future[Any]) -> None:
    """Returns when one of the two is done. Only the first is cancelled when it is not."""
    waiter = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait({waiter, other}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
