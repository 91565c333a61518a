"""A child process: a secure control plane in memory. Says its addresses, and join tokens for its arguments."""

from __future__ import annotations

import asyncio
import sys

from benchmarks.processes import serve_parent
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane


async def _main(*services: str) -> None:
    plane = ControlPlane(ControlPlaneOptions(address="127.0.0.1:0", enrolment_address="127.0.0.1:0"))
    await plane.start()
    try:
        authority = plane.authority
        assert authority is not None
        tokens = {
            service: (await authority.create_token(service, 3600.0, 100, "benchmark")).text for service in services
        }
        await serve_parent({"address": plane.address, "enrolment": plane.enrolment_address, "tokens": tokens})
    finally:
        await plane.stop(0)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
