"""Where the broker is, who this process is there, and where its outbox is: arguments, environment, files."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from mesh_client.core.errors import ConfigError

BROKER = "MESH_BROKER"
CREDENTIALS = "MESH_BROKER_CREDENTIALS"
ROOTS = "MESH_BROKER_ROOTS"
OUTBOX = "MESH_OUTBOX"

_MAX_CREDENTIALS = 4_096
_FORM = "amqps://host:port/vhost, several separated by commas"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of the broker."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Credentials({self.user!r}, ...)"


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """How to reach the broker.

    Attributes:
        addresses: ``host``, port and virtual host of each node, tried in turn.
        secure: TLS.
        credentials_file: first line the user, second the password; mode 0600. Read at each connection.
        roots: PEM file of the roots that broker certificates are verified by; None for the system's.
    """

    addresses: tuple[tuple[str, int, str], ...]
    secure: bool
    credentials_file: Path
    roots: Path | None = None

    def credentials(self) -> Credentials:
        """The user, as the file says now.

        Raises:
            ConfigError: the file cannot be read, others may read it, or it holds something else.
        """
        return read_credentials(self.credentials_file)

    def context(self) -> ssl.SSLContext | None:
        """A TLS context that verifies the broker's certificate and name; None without TLS.

        Raises:
            ConfigError: the roots cannot be read.
        """
        if not self.secure:
            return None
        try:
            made = ssl.create_default_context(cafile=self.roots)
        except OSError as error:
            raise ConfigError(f"{ROOTS}: {self.roots} holds no certificates: {error}") from None
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        return made

    def url(self, index: int, credentials: Credentials) -> str:
        """AMQP URL of one of the addresses. Secret: it holds the password."""
        host, port, vhost = self.addresses[index]
        user, password = quote(credentials.user, safe=""), quote(credentials.password, safe="")
        host = f"[{host}]" if ":" in host else host
        return f"{'amqps' if self.secure else 'amqp'}://{user}:{password}@{host}:{port}/{quote(vhost, safe='')}"

    def __str__(self) -> str:
        return ",".join(f"{host}:{port}" for host, port, _ in self.addresses)


def broker_settings(
    broker: str | Sequence[str] | None, credentials: str | Path | None, roots: str | Path | None, *, insecure: bool
) -> BrokerSettings | None:
    """The broker's settings; None when there is no broker.

    Args:
        broker: as `mesh_client.mesh.Mesh.events` takes it; by default the environment's.
        credentials: likewise.
        roots: likewise.
        insecure: plaintext was asked for by name.

    Raises:
        ConfigError: an address is no AMQP URL, is plaintext where that was not asked for, or credentials are missing.
    """
    given = os.environ.get(BROKER, "") if broker is None else broker
    urls = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
    urls = [url for url in urls if url]
    if not urls:
        return None
    schemes, addresses = set(), []
    for url in urls:
        scheme, address = _address(url)
        schemes.add(scheme)
        addresses.append(address)
    if len(schemes) > 1:
        raise ConfigError(f"{BROKER}: amqp:// beside amqps://; expected TLS to all nodes or to none")
    secure = schemes == {"amqps"}
    if not secure and not insecure:
        raise ConfigError(
            f"{BROKER}: {urls[0]!r} is plaintext, in which everybody on the way can read and change events; use "
            "amqps://, or ask for plaintext by name (insecure=True, MESH_INSECURE=1)"
        )
    file = credentials if credentials is not None else os.environ.get(CREDENTIALS)
    if not file:
        raise ConfigError(f"{CREDENTIALS}: expected the file with this service's user and password at the broker")
    root_file = roots if roots is not None else os.environ.get(ROOTS)
    return BrokerSettings(tuple(addresses), secure, Path(file), Path(root_file) if root_file else None)


def read_credentials(file: Path) -> Credentials:
    """A user and its password, one a line.

    Raises:
        ConfigError: the file cannot be read, others may read it, or it holds something else.
    """
    try:
        with file.open("rb") as opened:
            found = os.fstat(opened.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
                raise ConfigError(f"{CREDENTIALS}: others may read {file}: chmod 600 {file}")
            text = opened.read(_MAX_CREDENTIALS).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{CREDENTIALS}: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = ""
    lines = text.splitlines()
    if len(lines) != 2 or not all(lines):
        raise ConfigError(f"{CREDENTIALS}: {file} is not as expected: two lines, the user and the password")
    if lines[0] == "guest":
        raise ConfigError(f"{CREDENTIALS}: {file} names guest; each service has a user of its own")
    return Credentials(*lines)


def _address(url: str) -> tuple[str, tuple[str, int, str]]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in {"amqp", "amqps"} or not parts.hostname or port == -1 or parts.query or parts.fragment:
        shown = url.rpartition("@")[2]
        raise ConfigError(f"{BROKER}: {shown[:80]!r} is not allowed; expected {_FORM}")
    if parts.username or parts.password:
        raise ConfigError(f"{BROKER}: it holds a user or password; put them into the file that {CREDENTIALS} names")
    default = 5671 if parts.scheme == "amqps" else 5672
    return parts.scheme, (parts.hostname, port or default, unquote(parts.path[1:]) or "/")
