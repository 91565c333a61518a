"""Orders by REST, through the edge, as somebody outside of the mesh places them."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Self

import aiohttp
from google.protobuf import json_format
from shop.v1.orders_pb2 import Order, PlaceOrderResponse

from mesh_client.core.errors import MeshError

ATTEMPT_TIMEOUT = 2.5
"""Seconds after which an answer is not waited for any more."""
_AGAIN = (502, 503, 504)
_PAUSE = 0.05


class RestError(MeshError):
    """An order could not be placed. The message has the edge's words."""


class RestOrders:
    """Places orders at one edge. Use it as an async context manager.

    An order that got no answer, or one that says that there is none, is placed again with the same key, as by everybody
    whose connection may break.

    Args:
        url: of the edge.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=ATTEMPT_TIMEOUT)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def place(self, key: str, sku: str, timeout: float) -> tuple[Order, int]:
        """The order, as the shop took it or rejected it, and how often it had to be placed again.

        Raises:
            RestError: it failed, or got no answer within ``timeout`` seconds.
        """
        trouble, repeated = "no answer", 0
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        return await self._attempt(key, sku), repeated
                    except (aiohttp.ClientError, TimeoutError, _NoAnswerError) as error:
                        trouble = str(error) or type(error).__name__
                    repeated += 1
                    await asyncio.sleep(_PAUSE)
        except TimeoutError:
            raise RestError(f"no answer for {timeout:g} s, at last: {trouble}") from None

    async def _attempt(self, key: str, sku: str) -> Order:
        if self._session is None:
            raise RestError("enter it first")
        order = {"idempotencyKey": key, "sku": sku, "quantity": 1}
        async with self._session.post(f"{self.url}/v1/orders", json=order) as response:
            body = await response.text()
            if response.status in _AGAIN:
                raise _NoAnswerError(f"{response.status}: {body[:200]}")
            if response.status != 200:
                raise RestError(f"{response.status}: {body[:200]}")
        try:
            return json_format.Parse(body, PlaceOrderResponse()).order
        except (json_format.ParseError, json.JSONDecodeError) as error:
            raise RestError(f"the answer is not an order: {error}") from None


class _NoAnswerError(Exception):
    """The edge says that the service gave no answer."""
