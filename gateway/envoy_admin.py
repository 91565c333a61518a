"""A client of Envoy's own interface: what it has applied, what it has refused, and how it is asked to end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp

from gateway.envoy_routes import NAME
from gateway.envoy_settings import socket_path
from gateway.errors import PushFailedError

ANSWER_TIMEOUT = 5.0
"""Seconds for Envoy to answer."""
_MAX_ANSWER = 16 * 1024 * 1024
_APPLIED = "(version_text|update_rejected|warming_clusters|total_listeners_warming)$"
_ACTIVE = f"http.{NAME}.downstream_cx_active$"


@dataclass(frozen=True, slots=True)
class Applied:
    """What an Envoy says of the files that it follows."""

    versions: Mapping[str, str]
    """Versions that it has applied, by the names of its statistics."""
    rejected: Mapping[str, int]
    """How often it has refused each since its start, by the names of its statistics."""
    warming: int
    """Clusters and listeners that are not in use yet."""


class EnvoyAdmin:
    """Speaks to one Envoy. Use it as an async context manager.

    Args:
        address: ``unix:/path`` or ``ip:port``, as in `gateway.envoy_settings.EnvoySettings`.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket_path(address)
        self._base = "http://localhost" if self._socket is not None else f"http://{address}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # A connection each time: after a restart of Envoy the old ones are of no use.
        connector = (
            aiohttp.TCPConnector(force_close=True)
            if self._socket is None
            else aiohttp.UnixConnector(self._socket, force_close=True)
        )
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ready(self) -> bool:
        """Whether it has begun to serve, and does not drain."""
        try:
            status, _ = await self._ask("GET", "/ready")
        except PushFailedError:
            return False
        return status == 200

    async def applied(self) -> Applied:
        """What it has applied and refused.

        Raises:
            PushFailedError: it cannot be asked.
        """
        stats = await self._stats(_APPLIED)
        numbers = {name: value for name, value in stats.items() if isinstance(value, int)}
        return Applied(
            {name: value for name, value in stats.items() if isinstance(value, str)},
            {name: value for name, value in numbers.items() if name.endswith("update_rejected")},
            sum(value for name, value in numbers.items() if not name.endswith("update_rejected")),
        )

    async def connections(self) -> int:
        """How many callers are connected.

        Raises:
            PushFailedError: it cannot be asked.
        """
        return sum(value for value in (await self._stats(_ACTIVE)).values() if isinstance(value, int))

    async def listening(self) -> list[str]:
        """Where it takes requests, as ``ip:port``; the port is the real one where the settings ask for any.

        Raises:
            PushFailedError: it cannot be asked.
        """
        _, body = await self._ask("GET", "/listeners?format=json")
        try:
            found = [item["local_address"]["socket_address"] for item in json.loads(body).get("listener_statuses", ())]
            return [_address(str(item["address"]), int(item["port_value"])) for item in found]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._strange("/listeners") from None

    async def drain(self) -> None:
        """Has it tell callers to go elsewhere, and stop listening after its drain time.

        Raises:
            PushFailedError: it cannot be asked.
        """
        await self._ask("POST", "/drain_listeners?graceful")

    async def _stats(self, pattern: str) -> Mapping[str, object]:
        _, body = await self._ask("GET", "/stats", {"format": "json", "filter": pattern})
        try:
            return {str(item["name"]): item["value"] for item in json.loads(body)["stats"] if "name" in item}
        except (ValueError, KeyError, TypeError):
            raise self._strange("/stats") from None

    def _strange(self, path: str) -> PushFailedError:
        return PushFailedError(f"what is at {self.address} answers {path} as no Envoy does")

    async def _ask(self, method: str, path: str, query: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        if self._session is None:
            raise PushFailedError("the connection to Envoy is closed")
        try:
            async with (
                asyncio.timeout(ANSWER_TIMEOUT),
                self._session.request(method, self._base + path, params=query) as response,
            ):
                parts, size = [], 0
                async for part in response.content.iter_any():
                    size += len(part)
                    if size > _MAX_ANSWER:
                        raise self._strange(path)
                    parts.append(part)
                return response.status, b"".join(parts)
        except TimeoutError:
            raise PushFailedError(f"Envoy at {self.address} has not answered for {ANSWER_TIMEOUT:.0f} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise PushFailedError(f"Envoy at {self.address} cannot be asked: {error!s:.200}") from None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
