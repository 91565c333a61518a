"""How background tasks end: cancelled until they have, and not before the threads that work for them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
T = TypeVar("T")

AGAIN = 5.0
"""Seconds that a cancelled task has for its end before it is cancelled again."""


async def end_tasks(*tasks: asyncio.Future[Any] | None, again: float = AGAIN, limit: float = math.inf) -> bool:
    """Cancels tasks, and returns once they have ended. What they raised is not raised here; None is no task.

    Once may not be enough, for a cancellation can be lost. `asyncio.wait_for` drops one that comes while what it waits
    for ends (before Python 3.12, https://github.com/python/cpython/issues/86296), and so do libraries that bound their
    waits by it, and grpc.aio: the task goes on as if nothing had been, for ever.

    Args:
        tasks: that are to end.
        again: seconds after which those that are still there are cancelled again; more than they need for their end.
        limit: seconds after which those that are still there are left behind.

    Returns:
        Whether all have ended.
    """
    alive = {task for task in tasks if task is not None}
    give_up = time.monotonic() + limit
    while alive:
        for task in alive:
            task.cancel()
        ended, alive = await asyncio.wait(alive, timeout=min(again, max(0.0, give_up - time.monotonic())))
        for task in ended:
            if not task.cancelled():
                task.exception()  # or asyncio reports that nobody asked
        if alive and time.monotonic() >= give_up:
            return False
    return True


def obey_cancellation() -> None:
    """Raises CancelledError if the running task has been cancelled: to be called where a cancellation may be lost.

    Grpc.aio loses one that comes while a call is being set up and crosses the end of that call: the task that sets it
    up swallows it, and whoever reads is told the call's status. `end_tasks` makes up for it, but only after a while.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def in_thread(work: Callable[Parameters, T], *args: Parameters.args, **kwargs: Parameters.kwargs) -> T:
    """Calls something in a thread, and returns once that has ended, also when the running task is cancelled meanwhile.

    A thread cannot be cancelled: after `asyncio.to_thread` what it opens would be nobody's, and what it writes could
    overtake what is written next.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise
