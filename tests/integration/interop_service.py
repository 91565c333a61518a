"""The server of the gRPC interop test description, and the stubs for it, compiled when first asked for.

https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc.aio
from grpc_tools import protoc

PROTO = Path(__file__).parent.parent / "protos" / "interop.proto"
ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"


@functools.cache
def stubs() -> tuple[ModuleType, ModuleType]:
    """Message and service modules, exactly as protoc generates them for everybody."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [
            "protoc",
            f"--proto_path={PROTO.parent}",
            f"--python_out={directory}",
            f"--grpc_python_out={directory}",
            PROTO.name,
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError("protoc failed; its messages are on standard error")
        sys.path.insert(0, directory)
        try:
            return importlib.import_module("interop_pb2"), importlib.import_module("interop_pb2_grpc")
        finally:
            sys.path.remove(directory)


class InteropService:
    """What the description demands of a server, and records of what it saw."""

    def __init__(self) -> None:
        self.metadata: list[tuple[tuple[str, str | bytes], ...]] = []
        self.ended = asyncio.Event()
        """A call that streams requests is over, however it ended."""
        self.received: list[int] = []

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        stubs()[1].add_TestServiceServicer_to_server(self, server)

    async def EmptyCall(self, request: Any, context: Any) -> Any:
        await self._echo_metadata(context)
        return request

    async def UnaryCall(self, request: Any, context: Any) -> Any:
        await self._echo_metadata(context)
        await self._echo_status(request, context)
        return stubs()[0].SimpleResponse(payload=_payload(request.response_size))

    async def StreamingOutputCall(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._echo_metadata(context)
        async for response in self._responses(request, context):
            yield response
        await self._echo_status(request, context)

    async def StreamingInputCall(self, requests: AsyncIterator[Any], context: Any) -> Any:
        await self._echo_metadata(context)
        try:
            async for request in requests:
                self.received.append(len(request.payload.body))
        finally:
            self.ended.set()
        return stubs()[0].StreamingInputCallResponse(aggregated_payload_size=sum(self.received))

    async def FullDuplexCall(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await self._echo_metadata(context)
        try:
            async for request in requests:
                self.received.append(len(request.payload.body))
                await self._echo_status(request, context)
                async for response in self._responses(request, context):
                    yield response
        finally:
            self.ended.set()

    async def UnimplementedCall(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not implemented!")

    async def _responses(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for parameters in request.response_parameters:
            await asyncio.sleep(parameters.interval_us / 1e6)
            yield stubs()[0].StreamingOutputCallResponse(payload=_payload(parameters.size))

    async def _echo_metadata(self, context: Any) -> None:
        received = tuple(context.invocation_metadata())
        self.metadata.append(received)
        sent = dict(received)
        if ECHO_INITIAL in sent:
            await context.send_initial_metadata(((ECHO_INITIAL, sent[ECHO_INITIAL]),))
        if ECHO_TRAILING in sent:
            context.set_trailing_metadata(((ECHO_TRAILING, sent[ECHO_TRAILING]),))

    async def _echo_status(self, request: Any, context: Any) -> None:
        if request.response_status.code:
            code = next(code for code in grpc.StatusCode if code.value[0] == request.response_status.code)
            await context.abort(code, request.response_status.message)


def _payload(size: int) -> Any:
    return stubs()[0].Payload(body=bytes(size))
