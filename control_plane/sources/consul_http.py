"""Reading from Consul's HTTP API: several agents, one at a time; a token that is never shown; bounded answers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from control_plane.files import read_given_secret
from control_plane.sources.blocking_query import Failure
from mesh_client.core.errors import ConfigError, InvalidValueError, MeshError
from mesh_client.core.model import check_address

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Larger answers are refused: some 50,000 instances of one service."""
DEFAULT_PORT = 8500

_logger = logging.getLogger(__name__)


class ConsulError(MeshError):
    """A question to Consul got no usable answer.

    Attributes:
        failure: what kind of trouble it is.
    """

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class ConsulAddress:
    """Where one agent listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ConsulAnswer:
    """What an agent answered: 200, or 404 where that means that there is nothing."""

    found: bool
    """False for 404."""
    index: int | None
    """For the next blocking query; None without one."""
    body: object
    """Decoded JSON; None when not found."""
    date: str = ""
    """The agent's clock, as HTTP has it; empty where it does not say."""


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    limit: float
    """Seconds."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    body: object = None


def parse_registry(registry: str) -> tuple[ConsulAddress, ...]:
    """The agents of ``consul://host:port,host:port``; the port is 8500 where none is given.

    Raises:
        ConfigError: the text has another form.
    """
    scheme, separator, rest = registry.partition("://")
    try:
        if scheme != "consul" or not separator:
            raise ValueError("it does not begin with consul://")
        return tuple(_address(part.strip()) for part in rest.rstrip("/").split(","))
    except ValueError as error:
        raise ConfigError(
            f"registry: {registry!r} is not allowed; expected consul://host:port, more hosts after commas ({error})"
        ) from None


def _address(text: str) -> ConsulAddress:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    if (":" in host) != (host.startswith("[") and host.endswith("]")):
        raise InvalidValueError("host", host, "an IPv6 address in brackets")
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise InvalidValueError("port", port, "1 to 65535")
    return ConsulAddress(check_address(host.removeprefix("[").removesuffix("]"), "host"), int(port))


class ConsulToken:
    """An ACL token, from a text or from a file that is read again when the agent does not accept what it held.

    Args:
        text: the token; empty for none.
        file: where it is read from, in place of ``text``.

    Raises:
        ConfigError: the file cannot be read, or its text cannot be a token.
    """

    def __init__(self, text: str = "", file: Path | None = None) -> None:
        self._file = file
        self._text = _checked_token(text)
        if file is not None:
            self._text = self._read(file)

    @classmethod
    def find(cls, text: str = "", environment: Mapping[str, str] | None = None) -> ConsulToken:
        """The given token, else that of ``CONSUL_HTTP_TOKEN``, else that in the file ``CONSUL_HTTP_TOKEN_FILE``."""
        variables = os.environ if environment is None else environment
        file = variables.get("CONSUL_HTTP_TOKEN_FILE")
        text = text or variables.get("CONSUL_HTTP_TOKEN", "")
        return cls(text) if text or not file else cls(file=Path(file))

    def __repr__(self) -> str:
        return f"ConsulToken({'set' if self._text else 'none'})"

    @property
    def secret(self) -> str:
        """The token; empty for none. Never to be logged."""
        return self._text

    def refresh(self) -> None:
        """Reads the file again; keeps the token when that fails."""
        if self._file is not None:
            try:
                self._text = self._read(self._file)
            except ConfigError as error:
                _logger.warning("%s; going on with the token that was read before", error)

    @staticmethod
    def _read(file: Path) -> str:
        try:
            return _checked_token(read_given_secret(file).decode().strip())
        except UnicodeDecodeError:
            raise ConfigError(f"Consul token file {file} holds no text") from None
        except ConfigError as error:
            raise ConfigError(f"Consul token file: {error}") from None


def _checked_token(text: str) -> str:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError("the Consul token has characters that no token has; expected the SecretID alone")
    return text


class ConsulReader:
    """Asks one agent at a time, and goes over to the next address when one cannot be reached.

    An agent that takes connections but never answers is noticed by `probe`, which breaks what waits for it.

    Args:
        addresses: the agents, tried in this order; at least one.
        token: for every request.
        max_questions: questions open at once. Consul's default limit is 200 connections per client address.
        grace: seconds that an answer may be late.
    """

    def __init__(
        self,
        addresses: Sequence[ConsulAddress],
        token: ConsulToken,
        *,
        max_questions: int = 150,
        grace: float = 5.0,
    ) -> None:
        self._addresses = tuple(addresses)
        self._current = 0
        self._token = token
        self._grace = grace
        self._places = asyncio.Semaphore(max_questions)
        self._open: set[asyncio.Timeout] = set()
        self._session: aiohttp.ClientSession | None = None
        self.losses = 0
        """Questions that ended because the agent could not be reached."""

    async def __aenter__(self) -> Self:
        # Every question has its own time limit; the number of connections is bounded by the number of questions.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._grace)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def address(self) -> ConsulAddress:
        """The agent that is asked now."""
        return self._addresses[self._current]

    async def get(
        self, path: str, parameters: Mapping[str, str] | None = None, *, index: int = 0, wait: float = 0.0
    ) -> ConsulAnswer:
        """Reads ``path``, such as ``/v1/catalog/services``.

        Args:
            path: of the API.
            parameters: of the query.
            index: answer once the index is above this; 0: at once.
            wait: longest time to wait for that, seconds.

        Raises:
            ConsulError: there is no usable answer.
        """
        query = dict(parameters or {})
        if index:
            query |= {"index": str(index), "wait": f"{int(wait * 1000)}ms"}
        # Consul adds up to a sixteenth to the wait, so that clients do not come back all at once.
        return await self._ask(_Request("GET", path, wait * 17 / 16 + self._grace, query))

    async def post(self, path: str, body: object) -> ConsulAnswer:
        """Posts JSON to an endpoint that only answers.

        Raises:
            ConsulError: there is no usable answer.
        """
        return await self._ask(_Request("POST", path, self._grace, body=body))

    async def probe(self, interval: float = 5.0) -> None:
        """Asks the agent every ``interval`` seconds whether it lives, until cancelled."""
        while True:
            await asyncio.sleep(interval)
            address = self.address
            try:
                # Without a place of its own: it must get through when all the places are taken.
                await self._fetch(_Request("GET", "/v1/status/leader", self._grace), address)
            except ConsulError as error:
                if error.failure is Failure.UNREACHABLE:
                    self._leave(address)
                    self._break_open()

    async def _ask(self, request: _Request) -> ConsulAnswer:
        async with self._places:
            address = self.address
            while True:
                used = self._token.secret
                try:
                    return await self._fetch(request, address)
                except ConsulError as error:
                    if error.failure is Failure.UNREACHABLE:
                        self.losses += 1
                        self._leave(address)
                    elif error.failure is Failure.FORBIDDEN:
                        self._token.refresh()
                        if self._token.secret != used:
                            continue  # it was rotated; whoever asks need not hear of that
                    raise

    async def _fetch(self, request: _Request, address: ConsulAddress) -> ConsulAnswer:
        if self._session is None:
            raise ConsulError(Failure.UNREACHABLE, "the connection to Consul is closed")
        headers = {"X-Consul-Token": self._token.secret} if self._token.secret else {}
        try:
            async with asyncio.timeout(request.limit) as timeout:
                self._open.add(timeout)
                try:
                    async with self._session.request(
                        request.method,
                        f"http://{address}{request.path}",
                        params=request.parameters,
                        headers=headers,
                        json=request.body,
                    ) as response:
                        return await self._read(response, address)
                finally:
                    self._open.discard(timeout)
        except TimeoutError:
            raise ConsulError(Failure.UNREACHABLE, f"Consul at {address} does not answer") from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise ConsulError(Failure.UNREACHABLE, f"Consul at {address} cannot be reached: {error}") from None
        except (aiohttp.ClientError, ValueError) as error:
            raise ConsulError(Failure.MALFORMED, f"Consul at {address} does not speak HTTP: {error}") from None

    async def _read(self, response: aiohttp.ClientResponse, address: ConsulAddress) -> ConsulAnswer:
        where = f"Consul at {address} answered {response.url.path} with"
        body = await _bounded(response)
        if body is None:
            raise ConsulError(Failure.MALFORMED, f"{where} more than {MAX_ANSWER_BYTES} bytes")
        if response.status in (401, 403):
            text = body[:200].decode(errors="replace")
            raise ConsulError(Failure.FORBIDDEN, f"{where} {response.status} {text!r}: the token is not accepted")
        if response.status not in (200, 404):
            text = body[:200].decode(errors="replace")
            kind = Failure.UNAVAILABLE if response.status >= 429 else Failure.MALFORMED
            raise ConsulError(kind, f"{where} {response.status} {text!r}")
        if response.headers.get("X-Consul-KnownLeader") == "false":
            raise ConsulError(Failure.UNAVAILABLE, f"{where} what it knew before it lost the leader")
        index = response.headers.get("X-Consul-Index", "")
        number = int(index) if index.isdecimal() and len(index) < 20 else None
        if response.status == 404:
            return ConsulAnswer(found=False, index=number, body=None, date=response.headers.get("Date", ""))
        try:
            # Large catalogs take tens of milliseconds; the event loop has streams to serve meanwhile.
            decoded: object = await asyncio.to_thread(json.loads, body) if len(body) > 500_000 else json.loads(body)
        except (ValueError, RecursionError):
            raise ConsulError(Failure.MALFORMED, f"{where} something that is not JSON: {body[:80]!r}") from None
        return ConsulAnswer(found=True, index=number, body=decoded, date=response.headers.get("Date", ""))

    def _leave(self, address: ConsulAddress) -> None:
        if address != self.address:
            return
        self._current = (self._current + 1) % len(self._addresses)
        if len(self._addresses) > 1:
            _logger.warning("Consul at %s cannot be reached; going over to %s", address, self.address)

    def _break_open(self) -> None:
        # What still waits for that agent would wait for its whole time. What began to wait for another one meanwhile
        # only asks again.
        for timeout in self._open:
            if not timeout.expired():
                timeout.reschedule(asyncio.get_running_loop().time())


async def _bounded(response: aiohttp.ClientResponse) -> bytes | None:
    parts = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            return None
        parts.append(part)
    return b"".join(parts)
