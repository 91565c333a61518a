"""What pages are sent as it changes: server-sent events, one stream a page.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from control_plane.dashboard.context import OwnContext
from control_plane.dashboard.views import Shown, View

INTERVAL = 1.0
"""Seconds between two looks, however many pages show the same."""
HEARTBEAT = 2.0
"""Seconds after which a page is told that nothing has changed."""
SHARE = 0.05
"""Of the event loop's time that looks at one view may take: a mesh of thousands of clients is looked at less often."""
RETRY = 1000
"""Milliseconds after which a browser comes back by itself."""
MAX_KEPT = 200
"""Views whose last look is kept."""

Show = Callable[[View, OwnContext], Awaitable[Shown]]


@dataclass(slots=True)
class _Look:
    """The last look at one view."""

    text: str = ""
    at: float = float("-inf")
    cost: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Feed:
    """Looks at views, and tells pages what is new.

    Args:
        show: what a view shows now.
    """

    def __init__(self, show: Show) -> None:
        self._show = show
        self._looks: dict[View, _Look] = {}
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Ends every stream."""
        self._closed.set()

    async def events(self, view: View, context: OwnContext, ended: asyncio.Event) -> AsyncGenerator[bytes, None]:
        """The events of one stream, until ``ended`` is set or the feed is closed.

        Raises:
            RefusedError: whoever is signed in may not see it any more.
        """
        yield f"retry: {RETRY}\n\n".encode()
        told, told_at = "", 0.0
        while not (self._closed.is_set() or ended.is_set()):
            text = await self._look(view, context)
            now = _now()
            if text != told:
                told, told_at = text, now
                yield f"event: state\ndata: {_clock()}\ndata: {text}\n\n".encode()
            elif now - told_at >= HEARTBEAT - INTERVAL / 2:
                told_at = now
                yield f"event: beat\ndata: {_clock()}\n\n".encode()
            await self._wait(ended)

    async def _wait(self, ended: asyncio.Event) -> None:
        waits = [asyncio.ensure_future(each.wait()) for each in (self._closed, ended)]
        try:
            await asyncio.wait(waits, timeout=INTERVAL, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    async def _look(self, view: View, context: OwnContext) -> str:
        if view not in self._looks and len(self._looks) >= MAX_KEPT:
            del self._looks[min(self._looks, key=lambda each: self._looks[each].at)]
        look = self._looks.setdefault(view, _Look())
        async with look.lock:
            began = _now()
            # A page that has just been opened must not wait; others look when it is time.
            if began - look.at >= max(INTERVAL * 0.9, look.cost / SHARE):
                look.text = json.dumps(await self._show(view, context), separators=(",", ":"), ensure_ascii=True)
                look.at = _now()
                look.cost = look.at - began
            return look.text


def _clock() -> int:
    return round(time.time() * 1000)


def _now() -> float:
    return asyncio.get_running_loop().time()
