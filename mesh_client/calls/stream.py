"""Calls with a stream of responses."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from grpc.aio import AioRpcError, UsageError

from mesh_client.calls.base import GrpcCall, MeshCall
from mesh_client.calls.requests import MIXED_STYLES, StreamingRequests
from mesh_client.multicallable import Request, Response


class _Style(enum.Enum):
    ITERATE = enum.auto()
    READ = enum.auto()


class StreamResponse(MeshCall[Request, Response]):
    """A call whose responses are read one by one. It is retried until the first one has been read, never after."""

    _got_response = False
    _responses: AsyncIterator[Response] | None = None
    _style: _Style | None = None

    def _committed(self) -> bool:
        return self._got_response

    def _got(self) -> None:
        self._got_response = True

    def __aiter__(self) -> AsyncIterator[Response]:
        """The responses. Raises as `read` does, and UsageError after `read`."""
        self._use(_Style.ITERATE)
        if self._responses is None:
            self._responses = self._iterate()
        return self._responses

    async def _iterate(self) -> AsyncIterator[Response]:
        call = None
        while True:
            call = await self._live_attempt(call)
            try:
                async for response in call:
                    if not self._got_response:
                        self._got()
                    yield response
            except AioRpcError:
                if await self._settled_well(call):
                    return
            except asyncio.CancelledError:
                self.cancel()
                raise
            else:
                return

    async def read(self) -> Any:
        """The next response, or `grpc.aio.EOF` after the last.

        Raises:
            MeshRpcError: the call failed.
            asyncio.CancelledError: it was cancelled.
            UsageError: its responses are being iterated over.
        """
        if self._code is None:
            self._use(_Style.READ)
        call = None
        while True:
            call = await self._live_attempt(call)
            try:
                # Not by `read`, which forgets the responses that have come when a write has crossed the call's end.
                response = await anext(aiter(call), grpc.aio.EOF)
            except AioRpcError:
                if await self._settled_well(call):
                    return grpc.aio.EOF
            except asyncio.CancelledError:
                self.cancel()
                raise
            else:
                if response is grpc.aio.EOF:
                    if self._error is not None:
                        raise self._error  # it was read before, and grpc tells it once
                elif not self._got_response:
                    self._got()
                return response

    def _use(self, style: _Style) -> None:
        if self._style is None:
            self._style = style
        elif self._style is not style:
            raise UsageError(MIXED_STYLES)

    async def _settled_well(self, failed: GrpcCall) -> bool:
        """Whether the call is a success all the same; False when there is another attempt.

        Raises:
            MeshRpcError, asyncio.CancelledError: it has failed for good.
        """
        try:
            if await self._ended_well(failed):
                return True
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._error is not None:
            raise self._error from None
        return False

    async def _live_attempt(self, failed: GrpcCall | None) -> GrpcCall:
        try:
            return await self._attempt_after(failed)
        except asyncio.CancelledError:
            self.cancel()
            raise


class UnaryStreamCall(StreamResponse[Request, Response], grpc.aio.UnaryStreamCall[Request, Response]):
    """One request, a stream of responses."""


class StreamStreamCall(
    StreamingRequests[Request, Response],
    StreamResponse[Request, Response],
    grpc.aio.StreamStreamCall[Request, Response],
):
    """Streams both ways."""

    def _got(self) -> None:
        super()._got()
        self._payload.commit()
