"""How a handler of events is called: whatever it raises, it is an ordinary failure of this one event."""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import Any

from mesh_client.core.errors import ConfigError
from mesh_client.events.event import Event, Handler


class HandlerFailedError(Exception):
    """A handler raised what is no `Exception`."""


def check_handler(handler: Handler[Any]) -> None:
    """Whether it is a coroutine function, or an object that can be called as one.

    Raises:
        ConfigError: it is not. Called like one it would do its work, and then count as failed.
    """
    function = inspect.unwrap(handler)
    while isinstance(function, functools.partial):
        function = inspect.unwrap(function.func)
    if not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))):  # noqa: B004 - not whether, but what
        name = getattr(function, "__qualname__", repr(function))
        raise ConfigError(f"the handler {name} is no coroutine function: write `async def`")


async def call(handler: Handler[Any], event: Event[Any], limit: asyncio.Timeout) -> None:
    """Calls a handler.

    Args:
        handler: of the event.
        event: to handle.
        limit: how long it may take; not entered yet.

    Raises:
        TimeoutError: ``limit`` has expired, or the handler raised it.
        HandlerFailedError: the handler was cancelled from within, or raised another `BaseException`.
        Exception: anything else that the handler raised.
        asyncio.CancelledError: the running task was cancelled.
        KeyboardInterrupt, SystemExit: the process is asked to end.
    """
    try:
        async with limit:
            await handler(event)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # As when what it awaits was cancelled by somebody else: for instance by a channel that was closed.
        raise HandlerFailedError("it was cancelled from within: what it awaited was cancelled") from None
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise HandlerFailedError(f"it raised {type(error).__name__}: {error}") from error
