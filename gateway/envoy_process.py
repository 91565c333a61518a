"""Starts an Envoy, starts it again when it ends, and ends it with this process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from gateway import guard
from gateway.envoy_admin import EnvoyAdmin
from gateway.errors import PushFailedError
from gateway.redaction import fit_for_logs
from mesh_client.core.policy import Backoff
from mesh_client.core.retry import backoff_delay

log = logging.getLogger(__name__)
envoy_log = logging.getLogger("envoy")

RESTART = Backoff(initial=0.5, max=10.0, multiplier=2.0)
STEADY = 30.0
"""Seconds for which it must have run for its next end to count as the first."""
QUIET = 1.0
"""Seconds without callers after which an Envoy that drains has none any more."""
STOP_TIMEOUT = 5.0
"""Seconds from SIGTERM to SIGKILL."""
_REMEMBERED = 50
_LEVELS = {"critical": logging.CRITICAL, "error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO}


class EnvoyProcess:
    """One Envoy. Its log goes on in this process's; its standard output, which holds access logs, is this process's.

    The kernel ends it when this process ends, however that happens. It is in a process group of its own, so that Ctrl-C
    in a terminal reaches this process alone, which lets it drain.

    Args:
        program: Envoy's binary.
        bootstrap: its configuration.
        admin: its own interface, entered.
        concurrency: worker threads; None for one a core.
        drain_time: seconds for which it goes on to serve when it is asked to stop.
        rng: draws the waits between restarts.
    """

    def __init__(
        self,
        program: Path,
        bootstrap: Path,
        admin: EnvoyAdmin,
        *,
        concurrency: int | None = None,
        drain_time: float = 10.0,
        rng: Random | None = None,
    ) -> None:
        self._program = program
        self._bootstrap = bootstrap
        self._admin = admin
        self._concurrency = concurrency
        self._drain_time = drain_time
        self._rng = rng or Random()
        self._process: asyncio.subprocess.Process | None = None
        self._said: deque[tuple[float, str]] = deque(maxlen=_REMEMBERED)
        self._wanted = asyncio.Event()
        self._stopping = False
        self._secrets: set[str] = set()

    @property
    def pid(self) -> int | None:
        """Of the process that runs; None when none does."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def begin(self) -> None:
        """There is something that it can be started on. Harmless when it runs."""
        self._wanted.set()

    def hide(self, secrets: Iterable[str]) -> None:
        """Keeps these out of the log, whatever Envoy says."""
        self._secrets.update(secrets)

    def said(self, since: float) -> list[str]:
        """What it has warned of since a time of ``time.monotonic()``, as far as that is remembered."""
        return [text for at, text in self._said if at >= since]

    async def run(self) -> None:
        """Keeps it running, from `begin` to `stop`; when it is cancelled, it ends at once.

        Must run in the thread that lives as long as Envoy should: the kernel ties it to that thread.
        """
        await self._wanted.wait()
        failures = 0
        try:
            while True:
                started = time.monotonic()
                await self._run_once()
                if self._stopping:
                    return
                failures = 1 if time.monotonic() - started > STEADY else failures + 1
                delay = backoff_delay(RESTART, min(failures, 32), self._rng)
                log.error("starting Envoy again in %.1f s", delay)
                await asyncio.sleep(delay)
        finally:
            self._signal(signal.SIGKILL)
            if self._process is not None:
                await self._process.wait()

    async def stop(self) -> None:
        """Has it send its callers elsewhere, waits until they have gone or its drain time is over, and ends it."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            await self._admin.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._drain_time):
                    await self._quiet()
        except PushFailedError as error:
            log.warning("Envoy ends without having drained: %s", error)
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            log.warning("Envoy does not end when asked to; killing it")
            self._signal(signal.SIGKILL)
            await process.wait()

    async def _quiet(self) -> None:
        """Returns once nobody has been connected for `QUIET`: who is told to go may come back once more."""
        since = time.monotonic()
        while time.monotonic() < since + QUIET:
            if await self._admin.connections():
                since = time.monotonic()
            await asyncio.sleep(0.05)

    async def _run_once(self) -> None:
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, str(os.getpid())),
                *self._command(),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                process_group=0,
                limit=1 << 20,
            )
        except OSError as error:
            log.error("Envoy cannot be started: %s", error)
            return
        log.info("Envoy runs as process %d", process.pid)
        if process.stderr is not None:
            await self._pass_on(process.stderr)
        code = await process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.log(
            logging.INFO if self._stopping else logging.ERROR, "Envoy, process %d, has ended with %s", process.pid, how
        )

    def _command(self) -> Sequence[str]:
        command = [str(self._program), "--config-path", str(self._bootstrap), "--disable-hot-restart"]
        command += ["--log-level", "warning", "--log-format", "%l %_", "--drain-strategy", "immediate"]
        command += ["--drain-time-s", str(max(1, round(self._drain_time)))]
        if self._concurrency is not None:
            command += ["--concurrency", str(self._concurrency)]
        return command

    async def _pass_on(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                continue  # too long to be of use; its end comes as a line of its own
            if not line:
                return
            level, _, text = line.decode(errors="replace").strip().partition(" ")
            if level not in _LEVELS:
                level, text = "error", f"{level} {text}"
            text = fit_for_logs(text, self._secrets)
            if text.strip():
                self._said.append((time.monotonic(), text))
                envoy_log.log(_LEVELS[level], "%s", text)

    def _signal(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
