"""Interceptors of the application on mesh channels work as on raw channels: each test runs through both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio import ClientCallDetails, Metadata, UsageError

from tests.integration.channels import KINDS, Reached, reach
from tests.integration.echo_service import EchoService

METHODS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")


class Recorder:
    """What the interceptors saw, and how they change it."""

    def __init__(self) -> None:
        self.seen: list[ClientCallDetails] = []
        self.metadata: tuple[tuple[str, str], ...] = ()
        self.timeout: float | None = None

    def details(self, details: Any) -> ClientCallDetails:
        """The call as it goes on."""
        self.seen.append(details)
        metadata = Metadata(*(details.metadata or ()), *self.metadata)
        return ClientCallDetails(
            details.method,
            details.timeout if self.timeout is None else self.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
        )


class UnaryUnary(Recorder, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.details(client_call_details), request)


class UnaryStream(Recorder, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.details(client_call_details), request)


class StreamUnary(Recorder, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self.details(client_call_details), request_iterator)


class StreamStream(Recorder, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self.details(client_call_details), request_iterator)


INTERCEPTORS: dict[str, Any] = {
    "UnaryUnary": UnaryUnary,
    "UnaryStream": UnaryStream,
    "StreamUnary": StreamUnary,
    "StreamStream": StreamStream,
}


class Echo:
    """The service behind interceptors, reached by one kind of channel."""

    def __init__(self, reached: Reached, service: EchoService) -> None:
        self.service = service
        self.recorders = {kind: make() for kind, make in INTERCEPTORS.items()}
        self.channel: Any = reached.another(list(self.recorders.values()))
        self.reached = reached

    def call(self, kind: str, request: bytes, **options: Any) -> Any:
        """Calls the method of this kind with one request."""
        make = {
            "UnaryUnary": self.channel.unary_unary,
            "UnaryStream": self.channel.unary_stream,
            "StreamUnary": self.channel.stream_unary,
            "StreamStream": self.channel.stream_stream,
        }[kind]
        return make(f"/test.Echo/{kind}")([request] if kind.startswith("Stream") else request, **options)


@pytest.fixture(params=KINDS)
async def echo(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Echo]:
    """The service, reached raw and through the mesh."""
    service = EchoService()
    async with reach(request.param, tmp_path, service.add_to, service.add_to) as reached:
        echo = Echo(reached, service)
        async with echo.channel:
            yield echo


def open_channel(echo: Echo, interceptors: list[grpc.aio.ClientInterceptor]) -> Any:
    """A further channel with interceptors of its own."""
    return echo.reached.another(interceptors)


async def result(call: Any) -> Any:
    return [response async for response in call] if hasattr(call, "__aiter__") else await call


def responses_to(kind: str, request: bytes) -> Any:
    if kind == "UnaryStream":
        return [b"%d" % number for number in range(int(request))]
    return [request] if kind == "StreamStream" else request


@pytest.mark.parametrize("kind", METHODS)
async def test_an_interceptor_sees_each_call_of_its_kind_once(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"2", timeout=30, metadata=(("key", "value"),))
    assert await result(call) == responses_to(kind, b"2")
    (details,) = echo.recorders[kind].seen
    assert details.method in (f"/test.Echo/{kind}", f"/test.Echo/{kind}".encode())
    assert details.timeout == 30
    assert ("key", "value") in tuple(details.metadata)
    assert sum(len(recorder.seen) for recorder in echo.recorders.values()) == 1
    assert await call.code() is grpc.StatusCode.OK
    assert (await call.initial_metadata())["told"] == "first"
    assert (await call.trailing_metadata())["told"] == "last"


@pytest.mark.parametrize("kind", METHODS)
async def test_an_interceptor_changes_metadata_and_timeout(echo: Echo, kind: str) -> None:
    recorder = echo.recorders[kind]
    recorder.metadata, recorder.timeout = (("added", "by interceptor"),), 20.0
    assert await result(echo.call(kind, b"1", metadata=(("key", "value"),))) == responses_to(kind, b"1")
    (metadata,) = echo.service.metadata
    assert (metadata["key"], metadata["added"]) == ("value", "by interceptor")
    (remaining,) = echo.service.time_remaining
    assert remaining is not None
    assert 15 < remaining < 21


@pytest.mark.parametrize("kind", METHODS)
async def test_failures_pass_through(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"fail")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await result(call)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "no such thing"
    assert await call.code() is grpc.StatusCode.NOT_FOUND


async def test_a_call_is_cancelled_through_its_interceptors(echo: Echo) -> None:
    call = echo.call("UnaryUnary", b"sleep")
    await echo.service.asleep.wait()
    assert call.cancel()
    assert await call.code() is grpc.StatusCode.CANCELLED
    await echo.service.ended.wait()


async def test_writes_pass_through(echo: Echo) -> None:
    call = echo.channel.stream_stream("/test.Echo/StreamStream")()
    for request in (b"a", b"b"):
        await call.write(request)
        assert await call.read() == request
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    call = echo.channel.stream_unary("/test.Echo/StreamUnary")()
    await call.write(b"a")
    await call.done_writing()
    assert await call == b"a"


async def test_an_interceptor_answers_in_place_of_the_service(echo: Echo) -> None:
    class Answers(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            return b"cached"

    async with open_channel(echo, [Answers()]) as channel:
        call = channel.unary_unary("/test.Echo/UnaryUnary")(b"x")
        assert await call == b"cached"
        assert await call.code() is grpc.StatusCode.OK
    assert echo.service.calls["UnaryUnary"] == 0


async def test_an_interceptor_calls_again(echo: Echo) -> None:
    class CallsTwice(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            first = await continuation(client_call_details, request)
            await first
            return await continuation(client_call_details, request)

    async with open_channel(echo, [CallsTwice()]) as channel:
        assert await channel.unary_unary("/test.Echo/UnaryUnary")(b"x") == b"x"
    assert echo.service.calls["UnaryUnary"] == 2


async def test_interceptors_run_in_order(echo: Echo) -> None:
    order: list[str] = []

    class Notes(grpc.aio.UnaryUnaryClientInterceptor):
        def __init__(self, name: str) -> None:
            self.name = name

        async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
            order.append(self.name)
            return await continuation(client_call_details, request)

    async with open_channel(echo, [Notes("first"), Notes("second")]) as channel:
        await channel.unary_unary("/test.Echo/UnaryUnary")(b"x")
    assert order == ["first", "second"]


async def test_a_closed_channel_refuses_calls(echo: Echo) -> None:
    method = echo.channel.unary_unary("/test.Echo/UnaryUnary")
    await echo.channel.close()
    with pytest.raises(UsageError):
        await method(b"x")
