"""Starts, watches, stops and hurts processes. None of them outlives the supervisor, however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway import guard
from mesh_client.core.errors import MeshError

READY_TIMEOUT = 30.0
"""Seconds in which a process must print its ready line; a machine under load may need many."""

STOP_GRACE = 15.0
"""Seconds from SIGTERM to SIGKILL."""

_GUARD = Path(guard.__file__)
_REMEMBERED_LINES = 20


class ProcessError(MeshError):
    """A process did not start or end as it should. The message ends with the last lines of its output."""


class Process:
    """One process in a process group of its own. Standard output and error go to its log file.

    Attributes:
        name: for people and for the log file.
        pid: process id.
        ready_line: what ``ready`` matched.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, ready: re.Pattern[str]) -> None:
        self.name = name
        self.pid = process.pid
        self.log = log
        self.ready_line: re.Match[str] | None = None
        self._process = process
        self._ready = ready
        self._heard_ready = asyncio.Event()
        self._lines: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        self._reader = asyncio.create_task(self._read(), name=f"output of {name}")

    @property
    def running(self) -> bool:
        """Whether it has not ended; a stopped process runs."""
        return self._process.returncode is None

    async def wait_ready(self, timeout: float = READY_TIMEOUT) -> re.Match[str]:
        """The match of its ready line, once it is printed.

        Raises:
            ProcessError: it ended before, or did not print it in time.
        """
        heard = asyncio.create_task(self._heard_ready.wait())
        try:
            await asyncio.wait({heard, self._reader}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            heard.cancel()
        if self.ready_line is None:
            problem = f"ended with {await self.wait()}" if self._reader.done() else f"took more than {timeout:g} s"
            raise ProcessError(f"{self.name} did not become ready: it {problem}; its last output:\n{self.tail()}")
        return self.ready_line

    def tail(self) -> str:
        """Its last lines of output."""
        return "\n".join(self._lines)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process's whole group; nothing happens when it has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def freeze(self) -> None:
        """Stops it from running at all, with SIGSTOP: it hangs."""
        self.signal(signal.SIGSTOP)

    @property
    def frozen(self) -> bool:
        """Whether all of its threads have stopped, which takes a moment after `freeze`."""
        return all(
            stat.read_text().rpartition(")")[2].split()[0] in "Tt"
            for stat in Path(f"/proc/{self.pid}/task").glob("*/stat")
        )

    def thaw(self) -> None:
        """Lets it run on."""
        self.signal(signal.SIGCONT)

    async def wait(self) -> int:
        """Its exit code once it has ended: negative for a signal."""
        code = await self._process.wait()
        await self._reader
        return code

    async def kill(self) -> None:
        """``kill -9``; returns when it is gone."""
        self.signal(signal.SIGKILL)
        await self.wait()

    async def stop(self, grace: float = STOP_GRACE) -> int:
        """Asks it to end with SIGTERM, and kills it after ``grace`` seconds; returns its exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                return await self._process.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            return await self._process.wait()
        finally:
            await self._reader

    async def _read(self) -> None:
        output = self._process.stdout or asyncio.StreamReader()
        with self.log.open("ab", buffering=0) as log:
            async for line in output:
                log.write(line)
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                if self.ready_line is None and (match := self._ready.search(text)):
                    self.ready_line = match
                    self._heard_ready.set()


class Supervisor:
    """Owns processes for the length of an ``async with``, which ends all of them.

    Args:
        directory: where log files go, one a name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._processes: list[Process] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.kill_all()

    async def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], ready: re.Pattern[str]
    ) -> Process:
        """Starts a process; `Process.wait_ready` says when it is of use.

        Must be called in the thread that lives as long as the process should: the kernel ties it to that thread.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(_GUARD),
            str(os.getpid()),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(environment),
            process_group=0,
            limit=1 << 20,
        )
        started = Process(name, process, self.directory / f"{name}.log", ready)
        self._processes.append(started)
        return started

    async def stop(self, processes: Sequence[Process], grace: float = STOP_GRACE) -> None:
        """Stops processes at once, each with `Process.stop`."""
        await asyncio.gather(*(process.stop(grace) for process in processes))

    async def kill_all(self) -> None:
        """Kills whatever runs."""
        await asyncio.gather(*(process.kill() for process in self._processes))
        self._processes.clear()
