"""A child process: a secure control plane on one core, its state on disk. Says where it listens, a token, and roots.

Asked anything, it answers the seconds of CPU that it has used.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.processes import serve_parent
from control_plane.identity.options import IdentityOptions
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane

SERVICE = "inventory"


async def _main(core: str) -> None:
    os.sched_setaffinity(0, {int(core)})
    # The audit record is a part of issuance; where it goes to is not.
    logging.basicConfig(filename=os.devnull, level=logging.INFO)
    with tempfile.TemporaryDirectory() as directory:
        await _serve(Path(directory))


async def _serve(directory: Path) -> None:
    # All callers have one address here, and each asks at once.
    identity = IdentityOptions(enrolments_per_second=1e6, renewals_per_second=1e6)
    plane = ControlPlane(ControlPlaneOptions(address="127.0.0.1:0", data_dir=directory, identity=identity))
    await plane.start()
    authority = plane.authority
    if authority is None:
        raise RuntimeError("the control plane is not secure")

    async def cpu(_: object) -> float:
        return time.process_time()

    try:
        token = await authority.create_token(SERVICE, 3600.0, 100_000, "benchmark")
        roots = base64.b64encode(authority.roots_pem).decode()
        await serve_parent([plane.enrolment_address, plane.address, token.text, roots], cpu)
    finally:
        await plane.stop(0)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
