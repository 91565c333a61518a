"""When a trust bundle may be acknowledged: once it is in force wherever this process hands its credentials on to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)

Applied = Callable[[], Awaitable[None]]
"""Returns when the credentials of now are in force. It may take any time, and is cancelled when there are others."""


class Confirmation:
    """The version of the trust bundle that is in force everywhere. Bound to one event loop.

    Args:
        on_confirmed: called when it is another one.
    """

    def __init__(self, on_confirmed: Callable[[], None]) -> None:
        self._on_confirmed = on_confirmed
        self._waits: list[Applied] = []
        self._task: asyncio.Task[None] | None = None
        self.version = ""
        """Empty while there is none."""

    def after(self, applied: Applied) -> Callable[[], None]:
        """Nothing is confirmed from now on before this has returned. Returns what ends that."""
        self._waits.append(applied)
        return lambda: self._waits.remove(applied)

    def begin(self, version: str) -> None:
        """A bundle is in force in this process."""
        self.stop()
        if version == self.version:
            return
        if self._waits:
            self._task = asyncio.create_task(self._confirm(version), name="confirmation of a trust bundle")
        else:
            self._confirmed(version)

    def stop(self) -> None:
        """What is waited for is not any more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _confirm(self, version: str) -> None:
        try:
            for applied in tuple(self._waits):
                await applied()
        except Exception:
            log.exception("handing on credentials failed; trust bundle %s is not confirmed", version)
        else:
            self._confirmed(version)

    def _confirmed(self, version: str) -> None:
        self.version = version
        self._on_confirmed()
