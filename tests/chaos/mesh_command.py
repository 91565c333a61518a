"""A `mesh` command as people run it, with all the processes that it starts."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mesh_cli.demo.rabbitmq import ROOT_VARIABLE

PATIENCE = 100.0
"""Seconds for what takes a quarter of them on a machine that has nothing else to do."""

# Coverage of the command itself is measured, if at all: those that it starts would be late.
_MAIN = "import os; os.environ.pop('COVERAGE_PROCESS_CONFIG', None); from mesh_cli.main import main; main()"

MARK = "GRPC_MESH_DEMO_TEST"


class Command:
    """A running `mesh` command whose processes can be told from all others by a variable in their environment."""

    def __init__(self, *arguments: str, broker: bool) -> None:
        # Not pytest's directory: the paths of sockets in it would be too long.
        self.temporary = Path(tempfile.mkdtemp(prefix="demo-"))
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *arguments],
            env={
                **os.environ,
                **({} if broker else {ROOT_VARIABLE: str(self.temporary / "nothing")}),
                name: value,
                "TMPDIR": str(self.temporary),
                "CI": "true",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    def close(self) -> None:
        """Kills it and reaps it."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def signal(self, number: signal.Signals) -> None:
        """To the command alone, as the kernel or an operator would; not to the processes that it started."""
        self._process.send_signal(number)

    def read_until(self, text: str, timeout: float) -> None:
        """Reads its output until the text has come."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while text not in self.output:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(descriptor, 65536) if readable else b""
            assert data, f"no {text!r} in the output:\n{self.output}"
            self.output += data.decode()

    def end(self, timeout: float) -> int:
        """Its exit code, with all of its output read."""
        rest, _ = self._process.communicate(timeout=timeout)
        self.output += rest.decode()
        return self._process.returncode

    def processes(self) -> dict[int, str]:
        """Every process that carries the mark, the command itself included: process id to command line.

        The broker's environment is all its own; it has its files in the temporary directory.
        """
        found = {}
        marks = (self._mark.encode(), str(self.temporary).encode())
        for directory in Path("/proc").iterdir():
            if not directory.name.isdecimal():
                continue
            try:
                environment = (directory / "environ").read_bytes()
                if any(mark in environment for mark in marks):
                    found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # It has ended meanwhile, or is somebody else's.
        return found

    def wait_gone(self) -> None:
        """Returns when no process is left, each of which the kernel tells of by a descriptor."""
        deadline = time.monotonic() + PATIENCE
        for process in self.processes():
            try:
                descriptor = os.pidfd_open(process)
            except ProcessLookupError:
                continue
            select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            os.close(descriptor)
        assert self.processes() == {}


@contextmanager
def running(*arguments: str, broker: bool = False) -> Iterator[Command]:
    """A `mesh` command, killed at the end if it has not ended. Without a broker it starts in half the time."""
    command = Command(*arguments, broker=broker)
    try:
        yield command
    finally:
        command.close()
