"""Runs a control plane as a process, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys

from control_plane.operations.own_log import OwnLog
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane


async def serve(options: ControlPlaneOptions, log: OwnLog | None = None) -> None:
    """Runs a control plane until SIGTERM or SIGINT; says on standard output when it listens.

    Args:
        options: what the operator chose.
        log: of this process, for operators.

    Raises:
        ConfigError: it cannot start as asked.
    """
    # A collection of everything that thousands of streams hold takes longer than sending a change to them, and what a
    # stream leaves behind is freed without one.
    gc.set_threshold(100_000, 50, 100)
    plane = ControlPlane(options, log=log)
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await plane.start()
    try:
        if plane.enrolment_address:
            sys.stdout.write(f"mesh control-plane enrols on {plane.enrolment_address}\n")
        if plane.metrics_address:
            sys.stdout.write(f"mesh control-plane metrics at http://{plane.metrics_address}/metrics\n")
        if plane.dashboard_url:
            sys.stdout.write(f"mesh control-plane dashboard at {plane.dashboard_url}\n")
        sys.stdout.write(f"mesh control-plane listening on {plane.address}\n")
        sys.stdout.flush()
        failed = asyncio.create_task(plane.wait())
        signalled = asyncio.create_task(asked.wait())
        try:
            await asyncio.wait([failed, signalled], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
        finally:
            signalled.cancel()
            failed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await failed
    finally:
        await plane.stop()
