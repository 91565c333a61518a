"""What grpc offers by coroutines only, read where nothing can wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that has nothing to wait for.

    Grpc offers the status of a finished call by coroutines only, and a done-callback cannot wait.

    Raises:
        asyncio.InvalidStateError: it would wait.
    """
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    coroutine.close()
    raise asyncio.InvalidStateError(f"{coroutine!r} would wait")
