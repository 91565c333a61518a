"""A child process: a control plane, by default on the embedded registry in memory. Says its address."""

from __future__ import annotations

import asyncio
import sys

from benchmarks.processes import serve_parent
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane


async def _main(registry: str = "embedded") -> None:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, address="127.0.0.1:0", registry=registry))
    await plane.start()
    try:
        await serve_parent(plane.address)
    finally:
        await plane.stop(0)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
