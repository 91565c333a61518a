"""A service of bytes whose methods behave as tests need it: the request says what to do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio


class EchoService(grpc.GenericRpcHandler):
    """Methods of the four kinds.

    Unary requests: ``sleep`` never answers, ``fail`` aborts with NOT_FOUND, ``N`` streams N messages where responses
    are streamed; others are echoed. Streamed requests are joined by commas, or echoed one by one.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.metadata: list[dict[str, str | bytes]] = []
        self.time_remaining: list[float | None] = []
        self.asleep = asyncio.Event()
        """A call sleeps. Before that, cancelling it may reach the server ahead of its request."""
        self.ended = asyncio.Event()
        """A call that slept is over."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        server.add_generic_rpc_handlers((self,))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handlers: dict[str, Callable[[], Any]] = {
            "UnaryUnary": lambda: grpc.unary_unary_rpc_method_handler(self._unary_unary),
            "UnaryStream": lambda: grpc.unary_stream_rpc_method_handler(self._unary_stream),
            "StreamUnary": lambda: grpc.stream_unary_rpc_method_handler(self._stream_unary),
            "StreamStream": lambda: grpc.stream_stream_rpc_method_handler(self._stream_stream),
        }
        kind = handler_call_details.method.rpartition("/")[2]
        return handlers[kind]() if kind in handlers else None

    async def _begin(self, kind: str, context: Any) -> None:
        self.calls[kind] += 1
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_remaining.append(context.time_remaining())
        context.set_trailing_metadata((("told", "last"),))
        await context.send_initial_metadata((("told", "first"),))

    async def _act(self, request: bytes, context: Any) -> None:
        if request == b"sleep":
            self.asleep.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.ended.set()
        if request == b"fail":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")

    async def _unary_unary(self, request: bytes, context: Any) -> bytes:
        await self._begin("UnaryUnary", context)
        await self._act(request, context)
        return request

    async def _unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        await self._begin("UnaryStream", context)
        for part in request.split(b" "):
            if part.isdigit():
                for number in range(int(part)):
                    yield b"%d" % number
            else:
                await self._act(part, context)

    async def _stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        await self._begin("StreamUnary", context)
        received = []
        async for request in requests:
            await self._act(request, context)
            received.append(request)
        return b",".join(received)

    async def _stream_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await self._begin("StreamStream", context)
        async for request in requests:
            if request == b"end":
                return
            await self._act(request, context)
            yield request
