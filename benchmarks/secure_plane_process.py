"""A child process: a secure control plane in memory. Says its addresses, and join tokens for its arguments.

Whatever it is asked, it takes for a policy of the edge named edge, and stores that.
"""

from __future__ import annotations

import asyncio
import json
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

        async def store(policy: object) -> str:
            return (await plane._edge_policies.put("edge", json.dumps(policy).encode(), None)).version

        await serve_parent({"address": plane.address, "enrolment": plane.enrolment_address, "tokens": tokens}, store)
    finally:
        await plane.stop(0)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
