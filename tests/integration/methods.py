"""A service of every kind of RPC in every form of handler, over raw bytes, for tests of what wraps handlers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

SERVICE = "test.v1.Methods"
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
MAKERS: dict[str, Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


def handler(kind: str, behavior: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """A method of bytes."""
    return MAKERS[kind](behavior)


def add_methods(
    server: grpc.aio.Server, methods: dict[str, grpc.RpcMethodHandler[Any, Any]], *, generated: bool = True
) -> None:
    """Adds methods as generated code does, or as code did before there were registered methods."""
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    if generated:
        server.add_registered_method_handlers(SERVICE, methods)


@asynccontextmanager
async def serving(
    *methods: tuple[str, grpc.RpcMethodHandler[Any, Any]],
    wrap: Any = None,
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[str]:
    """A plain grpc server with these methods, each wrapped if asked; its target."""
    server = grpc.aio.server()
    wrapped = dict(methods)
    if wrap is not None:
        wrapped = wrap.wrap_methods(SERVICE, wrapped)
    server.add_registered_method_handlers(SERVICE, wrapped)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def thread_pool(threads: int) -> AsyncIterator[ThreadPoolExecutor]:
    """Threads for plain handlers.

    What grpc does in them waits for the loop, even when the call is over: leaving the executor's own ``with`` would
    block the loop until they are done, and so for ever.
    """
    executor = ThreadPoolExecutor(threads)
    try:
        yield executor
    finally:
        await asyncio.to_thread(executor.shutdown)


async def call(
    channel: grpc.aio.Channel, kind: str, method: str, requests: list[bytes], **options: Any
) -> tuple[list[bytes], Any]:
    """The responses and the call object, whatever the kind."""
    multicallable = getattr(channel, kind)(f"/{SERVICE}/{method}")
    request = iter(requests) if kind.startswith("stream") else requests[0]
    rpc = multicallable(request, **options)
    if kind.endswith("stream"):
        return [response async for response in rpc], rpc
    return [await rpc], rpc


@dataclass(frozen=True)
class Failure:
    """How a call failed."""

    code: grpc.StatusCode
    details: str
    trailing: dict[str, str | bytes]


async def failure(channel: grpc.aio.Channel, kind: str, method: str, **options: Any) -> Failure:
    """How a call fails. It sends no message where it need not: writes to a call that is over fail in another way."""
    multicallable = getattr(channel, kind)(f"/{SERVICE}/{method}")
    rpc = multicallable(**options) if kind.startswith("stream") else multicallable(b"", **options)
    code = await rpc.code()
    assert code is not grpc.StatusCode.OK
    return Failure(code, await rpc.details(), dict(await rpc.trailing_metadata()))


async def echo_unary(request: bytes, _: object) -> bytes:
    return b"echo " + request


async def echo_unary_stream(request: bytes, _: object) -> AsyncIterator[bytes]:
    for number in range(3):
        yield b"%s %d" % (request, number)


async def echo_unary_writer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    for number in range(3):
        await context.write(b"%s %d" % (request, number))


async def join(requests: AsyncIterator[bytes], _: object) -> bytes:
    return b",".join([request async for request in requests])


async def echo_each(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield b"echo " + request


async def echo_each_writer(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
    while (request := await context.read()) is not grpc.aio.EOF:
        await context.write(b"echo " + request)


def plain_unary(request: bytes, _: object) -> bytes:
    return b"echo " + request


def plain_unary_stream(request: bytes, _: object) -> Iterator[bytes]:
    for number in range(3):
        yield b"%s %d" % (request, number)


def plain_join(requests: Iterator[bytes], _: object) -> bytes:
    return b",".join(requests)


def plain_echo_each(requests: Iterator[bytes], _: object) -> Iterator[bytes]:
    for request in requests:
        yield b"echo " + request


FORMS: list[tuple[str, Callable[..., Any]]] = [
    ("unary_unary", echo_unary),
    ("unary_stream", echo_unary_stream),
    ("unary_stream", echo_unary_writer),
    ("stream_unary", join),
    ("stream_stream", echo_each),
    ("stream_stream", echo_each_writer),
    ("unary_unary", plain_unary),
    ("unary_stream", plain_unary_stream),
    ("stream_unary", plain_join),
    ("stream_stream", plain_echo_each),
]
"""Every form of handler that grpc.aio takes."""

REQUESTS = [b"a", b"b", b"c"]
EXPECTED = {
    "unary_unary": [b"echo a"],
    "unary_stream": [b"a 0", b"a 1", b"a 2"],
    "stream_unary": [b"a,b,c"],
    "stream_stream": [b"echo a", b"echo b", b"echo c"],
}
