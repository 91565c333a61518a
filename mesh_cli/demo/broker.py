"""The demo's RabbitMQ: TLS, a user for each service, and a process that can be killed and started again."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mesh_cli.demo.rabbitmq import READY, BrokerPorts, broker_command, epmd_command, find_rabbitmq
from mesh_cli.demo.supervisor import Process, Supervisor
from mesh_client.core.errors import ConfigError

_READY_TIMEOUT = 60.0


class Broker:
    """One broker, below a directory of its own.

    Args:
        root: where RabbitMQ is installed, see `find_rabbitmq`.
        directory: for its data, credentials and certificate.
        ports: of the loopback address, that nobody else gets while it is restarted.
        users: services that have a user.
    """

    def __init__(self, root: Path, directory: Path, ports: BrokerPorts, users: Iterable[str]) -> None:
        self.directory = directory
        self._root = root
        self._ports = ports
        self._users = tuple(users)
        self._definitions: dict[str, Any] = {}
        self._process: Process | None = None

    @classmethod
    def find(cls, checkout: Path, directory: Path, ports: BrokerPorts, users: Iterable[str]) -> Broker | None:
        """A broker, if RabbitMQ is installed or was fetched, and the packages for events are."""
        try:
            return cls(find_rabbitmq(checkout), directory, ports, users)
        except ConfigError:
            return None

    async def set_up(self, supervisor: Supervisor) -> None:
        """Makes users and a certificate, and starts it.

        Raises:
            ProcessError: it does not start.
        """
        from mesh_client.events.definitions import definitions, new_credentials

        self.directory.mkdir(mode=0o700)
        users = [new_credentials(user) for user in self._users]
        for user in users:
            _write_secret(self.credentials(user.user), f"{user.user}\n{user.password}\n".encode())
        self._definitions = definitions(users)
        certificate, key = _self_signed()
        self.roots.write_bytes(certificate)
        _write_secret(self._key, key)
        epmd = epmd_command(self._root, self._ports, self.directory)
        await supervisor.start("epmd", epmd.command, epmd.environment, READY)
        await self.start(supervisor)

    async def start(self, supervisor: Supervisor) -> None:
        """Starts it, also after it was killed; returns when it takes connections.

        Raises:
            ProcessError: it does not start.
        """
        tls = (self.roots, self._key, self.roots)
        broker = broker_command(self._root, self.directory, self._ports, self._definitions, tls=tls)
        self._process = await supervisor.start("rabbitmq", broker.command, broker.environment, READY)
        await self._process.wait_ready(_READY_TIMEOUT)

    async def kill(self) -> None:
        """``kill -9``."""
        if self._process is not None:
            await self._process.kill()

    @property
    def pid(self) -> int:
        """Of its process; 0 before the start."""
        return 0 if self._process is None else self._process.pid

    @property
    def url(self) -> str:
        """For ``MESH_BROKER``."""
        return f"amqps://127.0.0.1:{self._ports.amqp}"

    @property
    def roots(self) -> Path:
        """For ``MESH_BROKER_ROOTS``: its own certificate, which it has signed itself."""
        return self.directory / "certificate.pem"

    @property
    def _key(self) -> Path:
        return self.directory / "key.pem"

    def credentials(self, user: str) -> Path:
        """For ``MESH_BROKER_CREDENTIALS``."""
        return self.directory / f"{user.replace(':', '-')}.credentials"

    def environment(self, user: str) -> Mapping[str, str]:
        """What a service needs to know; nothing for one that has no user."""
        if user not in self._users:
            return {}
        return {
            "MESH_BROKER": self.url,
            "MESH_BROKER_CREDENTIALS": str(self.credentials(user)),
            "MESH_BROKER_ROOTS": str(self.roots),
        }


def hold_broker_ports(stack: ExitStack, held: Any) -> BrokerPorts:
    """Three ports that are held as ``held`` does for one."""
    return BrokerPorts(*(int(stack.enter_context(held()).getsockname()[1]) for _ in range(3)))


def _self_signed() -> tuple[bytes, bytes]:
    """A certificate for the loopback address, and its key; both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "demo broker")])
    now = dt.datetime.now(dt.UTC)
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=7))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return certificate.public_bytes(encoding), key.private_bytes(encoding, form, serialization.NoEncryption())


def _write_secret(file: Path, content: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(content)
