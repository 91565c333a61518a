"""A child process: a control plane whose one service changes when it is asked to. Says its address.

Asked for ``[first, count, spacing]`` it makes ``count`` changes, ``spacing`` seconds apart, numbered from ``first``,
and answers when it made the last one, on the clock that all processes of this machine share (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

from benchmarks.processes import serve_parent
from control_plane.events import Event, ServiceObserved, SourceConnected
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.core.model import Endpoint

SERVICE = "inventory"
ENDPOINTS = 20


class Changing:
    """A source whose first endpoint carries the number of the last change."""

    name = "benchmark"

    def __init__(self) -> None:
        self._emit: Callable[[Event], None] | None = None

    async def run(self, emit: Callable[[Event], None]) -> None:
        """Until cancelled."""
        self._emit = emit
        self.change(0)
        emit(SourceConnected(self.name))
        await asyncio.get_running_loop().create_future()

    def change(self, number: int) -> float:
        """Makes one change; when."""
        endpoints = tuple(
            Endpoint(f"i-{index:03}", "127.0.0.1", 1 + index, metadata={"change": str(number if index == 0 else 0)})
            for index in range(ENDPOINTS)
        )
        if self._emit is None:
            raise RuntimeError("the control plane has not started")
        at = time.monotonic()
        self._emit(ServiceObserved(self.name, SERVICE, endpoints))
        return at


async def _main() -> None:
    gc.set_threshold(100_000, 50, 100)  # As `mesh control-plane` does.
    source = Changing()
    plane = ControlPlane(ControlPlaneOptions(insecure=True, address="127.0.0.1:0"), source=source)
    await plane.start()

    async def change(question: Any) -> float:
        first, count, spacing = question
        at = 0.0
        for number in range(first, first + count):
            if number > first:
                await asyncio.sleep(spacing)
            at = source.change(number)
        return at

    try:
        await serve_parent(plane.address, change)
    finally:
        await plane.stop(0)


if __name__ == "__main__":
    asyncio.run(_main())
