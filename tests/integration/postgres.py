"""A real PostgreSQL as a child process.

    with Postgres() as server:
        PostgresOutbox(server.database())

It listens on a port of 127.0.0.1 that is its own over restarts, and dies with the process that started it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self

import psycopg

from tests import leaks
from tests.ports import hold_ports
from tools.setup import POSTGRES, find_postgres, postgres_libraries

READY_TIMEOUT = 60.0
USER = "mesh"
_NOBODY = 65_534
"""PostgreSQL refuses to run as root."""


def missing() -> str:
    """Why there is no PostgreSQL to run; empty when there is one."""
    found = find_postgres()
    if found is None:
        return f"PostgreSQL is neither installed nor in {POSTGRES.name}; `make setup` fetches it where it can"
    if os.geteuid() == 0 and not all(each.stat().st_mode & 0o001 for each in found.parents):
        return f"PostgreSQL does not run as root, and others cannot get to {found}"
    return ""


class Postgres:
    """One server, with a superuser that needs no password."""

    def __init__(self) -> None:
        binaries = find_postgres()
        assert binaries is not None
        self._binaries = binaries
        self._held = contextlib.ExitStack()
        (self.port,) = hold_ports(self._held, 1)
        self._numbers = itertools.count()
        self.process: subprocess.Popen[bytes] | None = None
        self.directory = Path()

    def __enter__(self) -> Self:
        # Not below pytest's own directory: others may not get there.
        self.directory = Path(tempfile.mkdtemp(prefix="mesh-postgres-"))
        if os.geteuid() == 0:
            os.chown(self.directory, _NOBODY, _NOBODY)
        try:
            options = ["--no-sync", "--auth=trust", f"--username={USER}", "--encoding=UTF8", "--no-locale"]
            self._run("initdb", f"--pgdata={self.directory / 'data'}", *options).wait()
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._held.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def address(self, database: str = "postgres", user: str = USER) -> str:
        """Of a database."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """The address of a new database."""
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.address(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.address(name)

    def start(self) -> None:
        """Starts it, and returns when it takes connections."""
        self.begin()
        self.wait_ready()

    def begin(self) -> None:
        """Starts it; it is not ready yet. In the main thread, for it dies with the thread that started it."""
        assert self.process is None, "it runs already"
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "shared_buffers": "16MB",
            "max_connections": 50,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.process = self._run("postgres", "-D", str(self.directory / "data"), *options)
        leaks.keep(self.process.pid)

    def wait_ready(self) -> None:
        """Returns when it takes connections."""
        deadline = time.monotonic() + READY_TIMEOUT
        while True:
            try:
                psycopg.connect(self.address(), connect_timeout=5).close()
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                return
            assert self.process is not None
            assert self.process.poll() is None, f"PostgreSQL ended: {self.tail()}"
            assert time.monotonic() < deadline, f"PostgreSQL is not ready: {self.tail()}"

    def kill(self) -> None:
        """Ends it at once, without any farewell: what is not in its log is lost."""
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(3)  # SIGQUIT: SIGKILL would leave its children and its shared memory
            process.wait()

    def freeze(self) -> None:
        """Stops it and all that serve connections; the kernel goes on taking what they are sent."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        pid = self.process.pid
        for each in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
            os.kill(each, number)

    def tail(self) -> str:
        """Its last words."""
        return (self.directory / "log.txt").read_text(errors="replace")[-2000:]

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        other = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
        if self._binaries.is_relative_to(POSTGRES):
            environment["LD_LIBRARY_PATH"] = postgres_libraries()
        with (self.directory / "log.txt").open("ab") as output:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig=QUIT", *other, str(self._binaries / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=self.directory,
            )
