"""A client of Kong's admin API: gives a Kong without a database its configuration, and asks what it has."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlsplit

import aiohttp

from gateway import kong_answers
from gateway.errors import PushFailedError, PushRejectedError
from mesh_client.core.errors import ConfigError
from mesh_client.identity.store import read_secret_file

LOAD_TIMEOUT = 60.0
"""Seconds that Kong has to load a configuration."""
ANSWER_TIMEOUT = 5.0
"""Seconds for everything else."""
_MAX_ANSWER = 4 * 1024 * 1024
_MAX_REFUSAL = 64 * 1024
_MAX_PAGES = 100
_LONGEST_WAIT = 300.0
_SOCKET = "unix:"


@dataclass(frozen=True, slots=True)
class AdminAddress:
    """Where Kong's admin API is. Whoever reaches it can do everything with Kong, and sees the mesh's key.

    Attributes:
        url: ``http://`` or ``https://`` without a path; of a socket, the host means nothing.
        socket: path of a Unix domain socket; empty for none.
    """

    url: str
    socket: str = ""

    def __str__(self) -> str:
        return f"{_SOCKET}{self.socket}" if self.socket else self.url


def parse_admin_address(text: str, *, allow_plaintext: bool = False) -> AdminAddress:
    """The address that ``http://host:port``, ``https://host:port`` or ``unix:/path`` states.

    Args:
        text: the text.
        allow_plaintext: whether plaintext may leave this host: the configuration holds a private key.

    Raises:
        ConfigError: it has another form, or would go over a network in plaintext.
    """
    if text.startswith(_SOCKET):
        path = text.removeprefix(_SOCKET)
        if not path.startswith("/"):
            raise ConfigError(f"admin address {text!r} is not allowed; expected unix:/path with an absolute path")
        return AdminAddress("http://localhost", path)
    try:
        parts = urlsplit(text)
        host, has_port = parts.hostname or "", parts.port != 0
    except ValueError:
        host, has_port, parts = "", False, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not has_port or parts.path not in ("", "/"):
        raise ConfigError(f"admin address {text!r} is not allowed; expected http://host:port, https:// or unix:/path")
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError("the admin address has more than a host and a port; credentials go into --admin-header-file")
    if parts.scheme == "http" and not _is_loopback(host) and not allow_plaintext:
        raise ConfigError(
            f"admin address {text!r} is plaintext over a network, and Kong is told the mesh's private key: use "
            "https://, a loopback address or unix:/path, or allow it with --allow-plaintext-admin"
        )
    return AdminAddress(f"{parts.scheme}://{parts.netloc}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_header(file: Path) -> tuple[str, str]:
    """The header, such as ``Kong-Admin-Token: ...``, that a file holds, and that its owner alone may read.

    Raises:
        ConfigError: it cannot be read, others can read it, or it holds no header.
    """
    try:
        text = read_secret_file(file, "admin-header-file").decode("ascii").strip()
    except OSError as error:
        raise ConfigError(f"admin-header-file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"admin-header-file {file} holds no header") from None
    name, colon, value = text.partition(":")
    if not colon or not name.replace("-", "").isalnum() or not value.strip() or not text.isprintable():
        raise ConfigError(f"admin-header-file {file} holds no header; expected one line, as in Kong-Admin-Token: ...")
    return name, value.strip()


class KongAdmin:
    """Speaks to one Kong. Use it as an async context manager.

    Args:
        address: of its admin API.
        header_file: holds a header for each request, read each time; None for none.
        roots: PEM file of the roots for ``https``; None for the system's.

    Raises:
        ConfigError: a file is not as it must be.
    """

    def __init__(self, address: AdminAddress, *, header_file: Path | None = None, roots: Path | None = None) -> None:
        self.address = address
        self._header_file = header_file
        if header_file is not None:
            read_header(header_file)
        try:
            self._tls = ssl.create_default_context(cafile=roots)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the roots in {roots} cannot be used: {error}") from None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = (
            aiohttp.UnixConnector(self.address.socket, force_close=True)
            if self.address.socket
            else aiohttp.TCPConnector(ssl=self._tls, force_close=True)
        )
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def load(self, configuration: str, secrets: Iterable[str] = ()) -> bool:
        """Has Kong obey a declarative configuration; False when it does already.

        Args:
            configuration: YAML.
            secrets: what is in it that no error may repeat.

        Raises:
            PushRejectedError: Kong says that it is invalid, and obeys what it did before.
            PushFailedError: Kong cannot be reached, or cannot load it now; it may obey either.
        """
        # As a string, not as an object: Kong compares hashes of strings alone.
        status, headers, body = await self._ask(
            "POST", "/config?check_hash=1", LOAD_TIMEOUT, {"config": configuration}, limit=_MAX_REFUSAL
        )
        if status in (200, 201):
            return True
        if status == 304:
            return False
        words = kong_answers.refusal(body, secrets)
        if status == 400:
            raise PushRejectedError(f"Kong refuses it: {words}")
        raise self._failed(status, words, headers)

    async def configuration_hash(self) -> str:
        """The hash of the configuration that Kong obeys; `kong_answers.EMPTY_HASH` while it has none.

        Raises:
            PushFailedError: Kong cannot be asked.
        """
        status, headers, body = await self._ask("GET", "/status", ANSWER_TIMEOUT)
        if status != 200:
            raise self._failed(status, kong_answers.refusal(body), headers)
        return kong_answers.configuration_hash(body)

    async def targets(self, upstream: str) -> frozenset[str]:
        """The targets of an upstream, as `kong_answers.same_target` writes them; none of one that Kong has not got.

        Raises:
            PushFailedError: Kong cannot be asked.
        """
        path, found = f"/upstreams/{quote(upstream, safe='')}/targets?size=1000", frozenset[str]()
        for _ in range(_MAX_PAGES):
            status, headers, body = await self._ask("GET", path, ANSWER_TIMEOUT)
            if status == 404:
                return frozenset()
            if status != 200:
                raise self._failed(status, kong_answers.refusal(body), headers)
            try:
                some, path = kong_answers.targets(body)
            except ValueError as error:
                raise PushFailedError(f"Kong at {self.address}: {error}") from None
            found |= some
            if not path.startswith("/"):
                break
        return found

    async def _ask(
        self, method: str, path: str, timeout: float, body: object = None, *, limit: int = _MAX_ANSWER
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self._session is None:
            raise PushFailedError("the connection to Kong is closed")
        try:
            # Reading the file again lets credentials be replaced without a restart.
            header = {} if self._header_file is None else dict([read_header(self._header_file)])
            async with (
                asyncio.timeout(timeout),
                self._session.request(
                    method, self.address.url + path, json=body, headers=header, allow_redirects=False
                ) as response,
            ):
                # What Kong says of a success is what it was sent.
                content = b"" if response.status == 201 else await _bounded(response.content, limit)
                return response.status, response.headers, content
        except ConfigError as error:
            raise PushFailedError(str(error)) from None
        except TimeoutError:
            raise PushFailedError(f"Kong at {self.address} has not answered for {timeout:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise PushFailedError(f"Kong at {self.address} cannot be asked: {error!s:.200}") from None

    def _failed(self, status: int, words: str, headers: Mapping[str, str]) -> PushFailedError:
        try:
            after = float(headers.get("Retry-After", "0"))
        except ValueError:
            after = 0.0
        after = min(max(after, 0.0), _LONGEST_WAIT) if math.isfinite(after) else 0.0
        return PushFailedError(f"Kong at {self.address} answered {status}: {words}", after=after)


async def _bounded(content: aiohttp.StreamReader, limit: int) -> bytes:
    """The first bytes of an answer, at most so many."""
    parts, size = [], 0
    while size < limit and (part := await content.read(limit - size)):
        parts.append(part)
        size += len(part)
    return b"".join(parts)
