"""Whether handlers may be called, and waiting for that to change."""

from __future__ import annotations

import asyncio
from typing import Any


class Permission:
    """May be given and taken at any time. Belongs to one event loop.

    Attributes:
        given: whether it is given now.
    """

    __slots__ = ("_given", "_taken", "given")

    def __init__(self, *, given: bool) -> None:
        self._given, self._taken = asyncio.Event(), asyncio.Event()
        self.put(given)

    def put(self, given: bool) -> None:
        """Gives or takes it."""
        self.given = given
        for event, holds in ((self._given, given), (self._taken, not given)):
            if holds:
                event.set()
            else:
                event.clear()

    async def until_given(self) -> None:
        """Returns while it is given."""
        await self._given.wait()

    async def until_taken(self, broken: asyncio.Future[None]) -> None:
        """Returns while it is not given.

        Raises:
            Exception: what ``broken`` raises, when that is done first.
        """
        taken = asyncio.ensure_future(self._taken.wait())
        try:
            await first_of(broken, taken)
        finally:
            taken.cancel()


async def first_of(broken: asyncio.Future[None], *others: asyncio.Future[Any]) -> None:
    """Returns when one of the others is done.

    Raises:
        Exception: what ``broken`` raises, when that is done first.
    """
    await asyncio.wait({broken, *others}, return_when=asyncio.FIRST_COMPLETED)
    if broken.done():
        broken.result()
