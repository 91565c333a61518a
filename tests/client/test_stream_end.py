"""How streams end."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from mesh_client.stream_end import obey_cancellation


async def test_a_cancellation_that_was_swallowed_is_obeyed() -> None:
    begun = asyncio.Event()

    async def swallows() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            begun.set()
            await asyncio.Event().wait()
        obey_cancellation()

    task = asyncio.create_task(swallows())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_who_was_not_cancelled_goes_on() -> None:
    obey_cancellation()
