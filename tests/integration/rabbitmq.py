"""A real RabbitMQ as a child process.

    with RabbitMQ(tmp_path, users=["orders", "shipping"]) as broker:
        mesh.events(broker=broker.url, credentials=broker.credentials("orders"))
        broker.kill()
        broker.start()

It listens on 127.0.0.1, on ports that are its own over restarts, and dies with the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from mesh_cli.demo.rabbitmq import READY, BrokerPorts, Command, broker_command, epmd_command, find_rabbitmq
from mesh_client.events.definitions import definitions, new_credentials
from mesh_client.events.settings import Credentials
from tests import leaks
from tests.ports import hold_ports

REPOSITORY = Path(__file__).resolve().parents[2]
READY_TIMEOUT = 60.0
ADMIN = "admin"
"""A user with all rights in every virtual host."""
_GUARD = REPOSITORY / "gateway" / "guard.py"


class RabbitMQ:
    """One broker.

    Args:
        directory: for its state, its configuration and its log.
        users: of the broker, each with a credentials file and the rights of its name.
        vhosts: virtual hosts, all with the same users.
        tls: files with certificate, key and roots: it listens with TLS alone.
        settings: further lines of rabbitmq.conf.
        outlives_tests: a fixture of the whole session owns it, also after a test has restarted it.
    """

    def __init__(
        self,
        directory: Path,
        users: Iterable[str],
        *,
        vhosts: Iterable[str] = ("/",),
        tls: tuple[Path, Path, Path] | None = None,
        settings: Mapping[str, str] | None = None,
        outlives_tests: bool = False,
    ) -> None:
        self.directory = directory
        self.outlives_tests = outlives_tests
        self.tls = tls
        self.settings = dict(settings or {})
        self.root = find_rabbitmq(REPOSITORY)
        self._held = contextlib.ExitStack()
        self.ports = BrokerPorts(*hold_ports(self._held, 3))
        self._users = {name: new_credentials(name) for name in users}
        self.definitions = definitions(self._users.values(), vhosts)
        self._users[ADMIN] = new_credentials(ADMIN)
        everything = definitions([Credentials("admin", self._users[ADMIN].password)], vhosts)
        self.definitions["users"] += everything["users"]
        for right in everything["permissions"]:
            self.definitions["permissions"].append({**right, "configure": ".*", "write": ".*", "read": ".*"})
        self._epmd: subprocess.Popen[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        for credentials in self._users.values():
            self.write_credentials(credentials, self.credentials(credentials.user))
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
        self._held.close()

    @property
    def url(self) -> str:
        """Of the virtual host ``/``."""
        return self.url_of("/")

    def url_of(self, vhost: str) -> str:
        """AMQP URL of a virtual host, without user."""
        path = "" if vhost == "/" else f"/{vhost}"
        return f"{'amqp' if self.tls is None else 'amqps'}://localhost:{self.ports.amqp}{path}"

    def credentials(self, user: str) -> Path:
        """A user's credentials file."""
        return self.directory / f"{user.replace(':', '-')}.credentials"

    def password(self, user: str) -> str:
        """A user's password."""
        return self._users[user].password

    @staticmethod
    def write_credentials(credentials: Credentials, file: Path) -> None:
        """Writes a credentials file."""
        file.touch(mode=0o600)
        file.write_text(f"{credentials.user}\n{credentials.password}\n")

    def start(self) -> None:
        """Starts the broker, and returns when it takes connections."""
        self.begin()
        self.wait_ready()

    async def restart(self) -> None:
        """Starts one that was killed, while the loop goes on; returns when it takes connections."""
        self.begin()
        await asyncio.to_thread(self.wait_ready)

    def begin(self) -> None:
        """Starts the broker; it is not ready yet. In the main thread, for it dies with the thread that started it."""
        assert self.process is None, "it runs already"
        if self._epmd is None or self._epmd.poll() is not None:
            self._epmd = self._start(epmd_command(self.root, self.ports, self.directory), "epmd.log")
        command = broker_command(
            self.root, self.directory, self.ports, self.definitions, tls=self.tls, settings=self.settings
        )
        self.log.unlink(missing_ok=True)
        self.process = self._start(command, "log.txt")
        if self.outlives_tests:
            leaks.keep(self.process.pid)

    def wait_ready(self) -> None:
        """Returns when it takes connections."""
        deadline = time.monotonic() + READY_TIMEOUT
        while not READY.search(self.log.read_text(errors="replace")):
            assert self.process is not None
            assert self.process.poll() is None, f"RabbitMQ ended: {self.tail()}"
            assert time.monotonic() < deadline, f"RabbitMQ is not ready after {READY_TIMEOUT} s: {self.tail()}"
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends it as a crash would: SIGKILL."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        """Stops it where it is: connections stay open and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped for the length of the block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    @property
    def log(self) -> Path:
        """What it writes."""
        return self.directory / "log.txt"

    def tail(self) -> str:
        """Its last words."""
        return self.log.read_text(errors="replace")[-2000:]

    def control(self, *arguments: str) -> str:
        """Runs rabbitmqctl; its output."""
        command = broker_command(
            self.root, self.directory, self.ports, self.definitions, tls=self.tls, settings=self.settings
        )
        program = Path(command.command[0]).with_name("rabbitmqctl")
        done = subprocess.run(
            [program, "--quiet", *arguments], env=command.environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    def _start(self, command: Command, log: str) -> subprocess.Popen[bytes]:
        with (self.directory / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", _GUARD, str(os.getpid()), *command.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=command.environment,
                cwd=self.directory,
            )
