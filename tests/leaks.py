"""Finds what a test left running: processes, threads, asyncio tasks, gRPC channels and servers.

After grpc-go's `grpctest.Tester`. What is already ending is waited for, at most `PATIENCE` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

PATIENCE = 10.0
"""Seconds that something may take to end after its test."""

_PR_SET_CHILD_SUBREAPER = 36
# grpc.aio's poller serves all loops of the process and ends with its last channel.
_OF_THE_PROCESS = ("(_poll_wrapper)",)

_kept: set[int] = set()

_channels: weakref.WeakSet[Any] = weakref.WeakSet()
_servers: weakref.WeakSet[Any] = weakref.WeakSet()


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parents die (prctl(2), PR_SET_CHILD_SUBREAPER).

    Raises:
        OSError: this kernel cannot say who the children of a process are.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")
    Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()


def remember_channels_and_servers() -> None:
    """Notes each `grpc.aio` channel and server that is made from now on, for the checks below."""
    _note_each(importlib.import_module("grpc.aio._channel").Channel, _channels)
    _note_each(importlib.import_module("grpc.aio._server").Server, _servers)


def _note_each(kind: Any, made: weakref.WeakSet[Any]) -> None:
    initialise = kind.__init__

    def noting(self: Any, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        made.add(self)

    kind.__init__ = noting


def keep(process: int) -> None:
    """Has a process that a session-wide fixture owns outlive the test that restarted it, with all below it."""
    _kept.add(process)


def living_descendants() -> dict[int, str]:
    """Command lines of the processes below this one, by process id, without those that have ended (zombies)."""
    found: dict[int, str] = {}
    waiting = [os.getpid()]
    while waiting:
        for child in _children(waiting.pop()):
            with contextlib.suppress(OSError):  # it ended meanwhile
                state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                if state not in "ZX" and child not in _kept:
                    found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ").strip()
                    waiting.append(child)
    return found


def _children(process: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread ended meanwhile
            found += map(int, children.read_text().split())
    return found


def leaked_processes(before: Collection[int]) -> list[str]:
    """Descendants that are not in ``before`` and do not end by themselves; they are killed."""
    deadline = time.monotonic() + PATIENCE
    leaked = []
    for process, command in living_descendants().items():
        if process not in before and not _ends(process, deadline):
            leaked.append(f"process {process} ({command})")
    return leaked


def _ends(process: int, deadline: float) -> bool:
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        ended, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ended:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    finally:
        os.close(descriptor)
    return bool(ended)


def leaked_threads(before: Collection[threading.Thread]) -> list[str]:
    """Threads that are not in ``before`` and do not end by themselves."""
    suspects = [
        thread
        for thread in threading.enumerate()
        if thread not in before and not thread.name.endswith(_OF_THE_PROCESS) and thread.is_alive()
    ]
    if suspects:
        gc.collect()  # an executor's threads end with it
    deadline = time.monotonic() + PATIENCE
    for thread in suspects:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [f"thread {thread.name}" for thread in suspects if thread.is_alive()]


async def leaked_tasks() -> list[str]:
    """Tasks of the running loop, but for the one that asks, that do not end by themselves."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if not others:
        return []
    _, pending = await asyncio.wait(others, timeout=PATIENCE)
    return [f"task {task.get_name()} ({task.get_coro()!r})" for task in pending]


def open_channels() -> weakref.WeakSet[Any]:
    """The `grpc.aio` channels that are open now and held by someone."""
    return weakref.WeakSet(channel for channel in _channels if not channel._channel.closed())


def leaked_channels(before: Collection[Any]) -> list[str]:
    """Open `grpc.aio` channels that are not in ``before``."""
    if len(open_channels()) > len(before):
        gc.collect()  # one in a cycle that nobody holds closes itself
    return [
        f"open channel to {channel._channel.target.decode()}" for channel in open_channels() if channel not in before
    ]


async def leaked_servers() -> list[str]:
    """`grpc.aio` servers of the running loop that still serve; they are stopped.

    One that is collected while it serves, after its loop has closed, leaves a coroutine that was never awaited: a
    warning that would hit whichever test runs then.
    """
    loop = asyncio.get_running_loop()
    found = [server for server in list(_servers) if server._loop is loop and server._server.is_running()]
    for server in found:
        await server.stop(None)
    return ["a grpc server that serves"] * len(found)
