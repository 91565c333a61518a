"""Call objects of mesh channels behave as those of raw channels do: each test runs through both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio import UsageError

from mesh_client.context import PREVIOUS_ATTEMPTS_KEY
from tests.integration.channels import KINDS, Reached, reach
from tests.integration.echo_service import EchoService

PATIENCE = 30.0
STREAM_METHODS = ("UnaryStream", "StreamStream")
REQUEST_STREAM_METHODS = ("StreamUnary", "StreamStream")
METHODS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")


class Echo:
    """The service reached by one kind of channel."""

    def __init__(self, reached: Reached, service: EchoService) -> None:
        self.reached = reached
        self.service = service
        self.channel = reached.channel

    def method(
        self,
        kind: str,
        serializer: Callable[[Any], bytes] | None = None,
        deserializer: Callable[[bytes], Any] | None = None,
        channel: grpc.aio.Channel | None = None,
    ) -> Any:
        """The multicallable of the method of this kind."""
        names = {
            "UnaryUnary": "unary_unary",
            "UnaryStream": "unary_stream",
            "StreamUnary": "stream_unary",
            "StreamStream": "stream_stream",
        }
        return getattr(channel or self.channel, names[kind])(f"/test.Echo/{kind}", serializer, deserializer)

    def call(self, kind: str, request: bytes, **options: Any) -> Any:
        """Calls the method of this kind with one request."""
        return self.method(kind)([request] if kind.startswith("Stream") else request, **options)


@pytest.fixture(params=KINDS)
async def echo(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Echo]:
    """The service, reached raw and through the mesh."""
    service = EchoService()
    async with reach(request.param, tmp_path, service.add_to, service.add_to) as reached:
        yield Echo(reached, service)


async def result(call: Any) -> Any:
    """The response of a call, or all of its responses."""
    return [response async for response in call] if hasattr(call, "__aiter__") else await call


def responses_to(kind: str, request: bytes) -> Any:
    """What `result` gives for a call with one request that is echoed."""
    if kind == "UnaryStream":
        return [b"%d" % number for number in range(int(request))]
    return [request] if kind == "StreamStream" else request


# -- what a call says of itself


@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_that_succeeds_says_so(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"2", timeout=30)
    assert not call.done()
    assert not call.cancelled()
    assert 0 < call.time_remaining() <= 30
    assert await result(call) == responses_to(kind, b"2")
    assert await call.code() is grpc.StatusCode.OK
    assert await call.details() == ""
    assert (await call.initial_metadata())["told"] == "first"
    assert (await call.trailing_metadata())["told"] == "last"
    assert await call.debug_error_string() == ""
    assert call.done()
    assert not call.cancelled()
    assert not call.cancel()
    assert "OK" in repr(call)


@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_that_fails_says_so_before_anyone_awaits_it(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"fail")
    # Of a stream that fails at once, grpc.aio may see the status first and then has no initial metadata to give.
    told = None if kind in STREAM_METHODS else "first"
    assert (await call.initial_metadata()).get("told") in {"first", told}
    assert await call.code() is grpc.StatusCode.NOT_FOUND
    assert await call.details() == "no such thing"
    assert (await call.trailing_metadata())["told"] == "last"
    assert call.done()
    assert not call.cancelled()
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call.read() if kind in STREAM_METHODS else call)
        error = caught.value
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert error.details() == "no such thing"
        assert error.initial_metadata().get("told") in {"first", told}
        assert error.trailing_metadata()["told"] == "last"
        assert "no such thing" in str(error.debug_error_string())
        assert "no such thing" in str(error)
    assert "NOT_FOUND" in repr(call)


async def test_a_call_in_flight_shows_itself(echo: Echo) -> None:
    call = echo.call("UnaryUnary", b"sleep")
    assert repr(call)
    assert str(call)
    assert call.time_remaining() is None
    call.cancel()


async def test_a_response_can_be_awaited_twice_and_by_several(echo: Echo) -> None:
    call = echo.call("UnaryUnary", b"x")
    assert await asyncio.gather(*(_await(call) for _ in range(3))) == [b"x"] * 3
    assert await call == b"x"
    assert echo.service.calls["UnaryUnary"] == 1


async def _await(call: Any) -> Any:
    return await call


@pytest.mark.parametrize("kind", METHODS)
async def test_done_callbacks_are_called_once_with_the_call(echo: Echo, kind: str) -> None:
    seen: list[Any] = []
    call = echo.call(kind, b"1")
    call.add_done_callback(seen.append)
    call.add_done_callback(seen.append)
    await result(call)
    await call.code()
    assert seen == [call, call]
    call.add_done_callback(seen.append)
    assert seen == [call, call, call]


async def test_done_callbacks_are_called_for_failures_and_cancellations(echo: Echo) -> None:
    seen: list[Any] = []
    failing = echo.call("UnaryUnary", b"fail")
    failing.add_done_callback(seen.append)
    await failing.code()
    assert seen == [failing]
    cancelled = echo.call("UnaryUnary", b"sleep")
    cancelled.add_done_callback(seen.append)
    cancelled.cancel()
    await cancelled.code()
    assert seen == [failing, cancelled]


@pytest.mark.parametrize("kind", METHODS)
async def test_wait_for_connection_returns_when_it_is_there(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"1")
    await call.wait_for_connection()
    assert await result(call) == responses_to(kind, b"1")


@pytest.mark.parametrize("kind", METHODS)
async def test_calls_end_at_their_deadline(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"sleep", timeout=0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await result(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "Deadline Exceeded" in str(caught.value.details())
    assert call.time_remaining() == 0
    assert not call.cancelled()
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    if echo.service.asleep.is_set():  # On a busy machine the deadline can pass before the server hears of the call.
        async with asyncio.timeout(PATIENCE):
            await echo.service.ended.wait()


# -- cancelling


@pytest.mark.parametrize("kind", METHODS)
async def test_cancelling_at_once_cancels(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"sleep")
    assert call.cancel()
    await _assert_cancelled(call)
    assert not call.cancel()


@pytest.mark.parametrize("kind", METHODS)
async def test_cancelling_in_flight_reaches_the_server(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"sleep")
    await echo.service.asleep.wait()
    assert call.cancel()
    await _assert_cancelled(call)
    async with asyncio.timeout(PATIENCE):
        await echo.service.ended.wait()


async def _has_ended(call: Any) -> None:
    """Returns once grpc knows the call's end, whoever has seen it."""
    async with asyncio.timeout(PATIENCE):
        while not getattr(call, "_call", call).done():
            await asyncio.sleep(0)


def _in_flight(echo: Echo) -> int:
    """Calls that the mesh client counts as not over."""
    services = () if echo.reached.mesh is None else echo.reached.mesh.state().services
    return sum(endpoint.outstanding for service in services for endpoint in service.endpoints)


@pytest.mark.parametrize("kind", ["UnaryUnary", "StreamUnary"])
@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_who_gives_up_awaiting_a_call_that_has_ended_does_not_change_its_end(
    echo: Echo, kind: str, how: str
) -> None:
    call = echo.call(kind, b"x", timeout=30)
    awaiting = call.__await__()
    awaiting.send(None)
    await _has_ended(call)
    if how == "closed":
        awaiting.close()
    else:
        with pytest.raises(asyncio.CancelledError):
            awaiting.throw(asyncio.CancelledError())
    assert call.done()
    assert await call.code() is grpc.StatusCode.OK
    assert not call.cancelled()
    assert _in_flight(echo) == 0


@pytest.mark.parametrize("kind", ["UnaryUnary", "StreamUnary"])
async def test_a_call_that_nobody_awaits_any_more_comes_to_its_end(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"x", timeout=30)
    awaiting = call.__await__()
    awaiting.send(None)
    awaiting.close()
    async with asyncio.timeout(PATIENCE):
        assert await call.code() is grpc.StatusCode.OK
    assert _in_flight(echo) == 0


@pytest.mark.parametrize("kind", ["UnaryUnary", "StreamUnary"])
async def test_several_may_await_one_call(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"x", timeout=30)
    assert await asyncio.gather(*(_await(call) for _ in range(3))) == [b"x"] * 3
    failing = echo.call(kind, b"fail", timeout=30)
    errors = await asyncio.gather(*(_await(failing) for _ in range(3)), return_exceptions=True)
    codes = {error.code() for error in errors if isinstance(error, grpc.aio.AioRpcError)}
    assert codes == {grpc.StatusCode.NOT_FOUND}
    assert _in_flight(echo) == 0


@pytest.mark.parametrize("kind", ["UnaryUnary", "StreamUnary"])
async def test_cancelling_the_task_that_awaits_cancels_the_call(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"sleep")
    await echo.service.asleep.wait()
    task = asyncio.create_task(_await(call))
    await asyncio.sleep(0)
    await _cancel(task)
    await _assert_cancelled(call)
    async with asyncio.timeout(PATIENCE):
        await echo.service.ended.wait()


@pytest.mark.parametrize("kind", STREAM_METHODS)
@pytest.mark.parametrize("reading", [True, False])
async def test_cancelling_the_task_that_reads_cancels_the_call(echo: Echo, kind: str, reading: bool) -> None:
    call = echo.method(kind)([b"0", b"sleep"] if kind == "StreamStream" else b"1 sleep")
    # Before its first response a raw stream can miss the cancellation.
    assert await (call.read() if reading else anext(aiter(call))) == b"0"
    await echo.service.asleep.wait()
    task = asyncio.create_task(call.read() if reading else anext(aiter(call)))
    await asyncio.sleep(0)
    await _cancel(task)
    await _assert_cancelled(call)
    async with asyncio.timeout(PATIENCE):
        await echo.service.ended.wait()


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _assert_cancelled(call: Any) -> None:
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert await call.details() == "Locally cancelled by application!"
    assert call.cancelled()
    assert call.done()
    assert list(await call.trailing_metadata()) == []
    with pytest.raises(asyncio.CancelledError):
        await (call.read() if hasattr(call, "read") else call)


async def test_a_task_that_waits_sees_the_cancellation_of_its_call(echo: Echo) -> None:
    call = echo.call("UnaryUnary", b"sleep")
    await echo.service.asleep.wait()
    task = asyncio.create_task(_await(call))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# -- responses


@pytest.mark.parametrize("kind", STREAM_METHODS)
async def test_responses_are_read_one_by_one_until_the_end(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"1")
    assert await call.read() == responses_to(kind, b"1")[0]
    assert await call.read() is grpc.aio.EOF
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("kind", STREAM_METHODS)
async def test_iterating_and_reading_do_not_mix(echo: Echo, kind: str) -> None:
    call = echo.call(kind, b"sleep")
    iterator = aiter(call)
    with pytest.raises(UsageError):
        await call.read()
    assert aiter(call) is iterator
    call.cancel()

    call = echo.call(kind, b"5")
    await call.read()
    with pytest.raises(UsageError):
        aiter(call)
    call.cancel()


@pytest.mark.parametrize("kind", STREAM_METHODS)
async def test_iteration_goes_on_where_it_was_left(echo: Echo, kind: str) -> None:
    call = echo.method(kind)([b"0", b"1", b"2"] if kind == "StreamStream" else b"3")
    async for response in call:
        assert response == b"0"
        break
    assert [response async for response in call] == [b"1", b"2"]
    assert [response async for response in call] == []


async def test_an_error_in_mid_stream_comes_after_what_was_sent(echo: Echo) -> None:
    received: list[bytes] = []

    async def note() -> None:
        call = echo.call("UnaryStream", b"2 fail")
        while (response := await call.read()) is not grpc.aio.EOF:
            received.append(response)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await note()
    assert received == [b"0", b"1"]
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("kind", METHODS)
async def test_a_deserializer_that_raises_gives_none(echo: Echo, kind: str) -> None:
    def raises(data: bytes) -> Any:
        raise ValueError("cannot read this")

    method = echo.method(kind, deserializer=raises)
    call = method([b"1"] if kind.startswith("Stream") else b"1")
    assert await result(call) == ([None] if kind in STREAM_METHODS else None)
    assert await call.code() is grpc.StatusCode.OK


# -- requests


def _raises(request: Any) -> bytes:
    raise ValueError("cannot write this")


@pytest.mark.parametrize("kind", METHODS)
async def test_what_cannot_be_serialised_is_refused_where_grpc_sends_an_empty_message(echo: Echo, kind: str) -> None:
    method = echo.method(kind, serializer=_raises)
    if echo.reached.kind == "raw":
        call = method([b"x"] if kind.startswith("Stream") else b"x")
        assert await result(call) == {"UnaryStream": [], "StreamStream": [b""]}.get(kind, b"")
    elif kind.startswith("Stream"):
        call = method()
        with pytest.raises(ValueError, match="cannot write this"):
            await call.write(b"x")
        call.cancel()
        call = method([b"x"])
        with pytest.raises(asyncio.CancelledError):
            await result(call)
        assert await call.code() is grpc.StatusCode.CANCELLED
    else:
        with pytest.raises(ValueError, match="cannot write this"):
            method(b"x")
        assert echo.service.calls[kind] == 0


@pytest.mark.parametrize("kind", REQUEST_STREAM_METHODS)
@pytest.mark.parametrize("source", ["list", "generator", "async generator", "async iterator"])
async def test_requests_come_from_any_iterable(echo: Echo, kind: str, source: str) -> None:
    call = echo.method(kind)(_requests(source))
    assert await result(call) == (b"a,b,c" if kind == "StreamUnary" else [b"a", b"b", b"c"])


def _requests(source: str) -> Any:
    messages = [b"a", b"b", b"c"]

    async def generate() -> AsyncIterator[bytes]:
        for message in messages:
            await asyncio.sleep(0)
            yield message

    class Iterating:
        def __init__(self) -> None:
            self.left = iter(messages)

        def __aiter__(self) -> Iterating:
            return self

        async def __anext__(self) -> bytes:
            for message in self.left:
                return message
            raise StopAsyncIteration

    return {
        "list": lambda: messages,
        "generator": lambda: (message for message in messages),
        "async generator": generate,
        "async iterator": Iterating,
    }[source]()


@pytest.mark.parametrize("kind", REQUEST_STREAM_METHODS)
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_iterator_that_raises_cancels_the_call(echo: Echo, kind: str, asynchronous: bool) -> None:
    def generate() -> Iterator[bytes]:
        yield b"a"
        raise ValueError("no more")

    async def generate_asynchronously() -> AsyncIterator[bytes]:
        yield b"a"
        raise ValueError("no more")

    call = echo.method(kind)(generate_asynchronously() if asynchronous else generate())
    with pytest.raises(asyncio.CancelledError):
        await result(call)
    assert await call.code() is grpc.StatusCode.CANCELLED
    assert call.cancelled()


@pytest.mark.parametrize("kind", REQUEST_STREAM_METHODS)
async def test_writing_is_refused_after_done_writing(echo: Echo, kind: str) -> None:
    call = echo.method(kind)()
    await call.write(b"x")
    await call.done_writing()
    await call.done_writing()
    with pytest.raises(asyncio.InvalidStateError):
        await call.write(b"y")
    assert await result(call) == responses_to(kind, b"x")
    with pytest.raises(asyncio.InvalidStateError):
        await call.write(b"z")
    await call.done_writing()


async def test_writing_is_refused_after_the_server_ended_the_call(echo: Echo) -> None:
    call = echo.method("StreamStream")()
    await call.write(b"end")
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    with pytest.raises(asyncio.InvalidStateError):
        await call.write(b"x")
    await call.done_writing()


async def test_writing_is_refused_after_the_server_failed_the_call(echo: Echo) -> None:
    call = echo.method("StreamStream")()
    await call.write(b"fail")
    assert await call.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(asyncio.InvalidStateError):
        await call.write(b"x")
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError):
        await call.read()


@pytest.mark.parametrize("kind", REQUEST_STREAM_METHODS)
async def test_writing_is_refused_after_cancelling(echo: Echo, kind: str) -> None:
    call = echo.method(kind)()
    await call.write(b"x")
    call.cancel()
    with pytest.raises(asyncio.InvalidStateError):
        await call.write(b"y")


@pytest.mark.parametrize("kind", REQUEST_STREAM_METHODS)
async def test_writing_is_refused_on_a_call_with_an_iterator(echo: Echo, kind: str) -> None:
    call = echo.method(kind)([b"x"])
    with pytest.raises(UsageError):
        await call.write(b"y")
    with pytest.raises(UsageError):
        await call.done_writing()
    assert await result(call) == responses_to(kind, b"x")


async def test_reading_and_writing_go_on_side_by_side(echo: Echo) -> None:
    call = echo.method("StreamStream")()

    async def write() -> None:
        for number in range(100):
            await call.write(b"%d" % number)
        await call.done_writing()

    _, received = await asyncio.gather(write(), result(call))
    assert received == [b"%d" % number for number in range(100)]


# -- options of a call


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("make", [tuple, list, lambda pairs: grpc.aio.Metadata(*pairs)])
async def test_metadata_arrives_whatever_holds_it(echo: Echo, kind: str, make: Callable[[Any], Any]) -> None:
    metadata = make([("key", "value"), ("key-bin", b"\0\1")])
    await result(echo.call(kind, b"1", metadata=metadata))
    (received,) = echo.service.metadata
    assert received["key"] == "value"
    assert received["key-bin"] == b"\0\1"
    assert PREVIOUS_ATTEMPTS_KEY not in received


async def test_bad_metadata_is_refused(echo: Echo) -> None:
    with pytest.raises((TypeError, ValueError)):
        await echo.call("UnaryUnary", b"x", metadata=(("key", 5),))
    with pytest.raises((TypeError, ValueError)):
        await echo.call("UnaryUnary", b"x", metadata=5)
    assert await echo.call("UnaryUnary", b"x") == b"x"


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_compressed_requests_are_understood(echo: Echo, kind: str, compression: grpc.Compression) -> None:
    assert await result(echo.call(kind, b"1", compression=compression)) == responses_to(kind, b"1")


@pytest.mark.parametrize("kind", METHODS)
async def test_call_credentials_need_a_secure_channel(echo: Echo, kind: str) -> None:
    with pytest.raises(UsageError):
        echo.call(kind, b"1", credentials=grpc.access_token_call_credentials("token"))


async def test_the_deadline_reaches_the_server(echo: Echo) -> None:
    await echo.call("UnaryUnary", b"x", timeout=30)
    await echo.call("UnaryUnary", b"x")
    with_deadline, without = echo.service.time_remaining
    assert with_deadline is not None
    assert 25 < with_deadline < 31
    assert without is None


@pytest.mark.parametrize("kind", METHODS)
async def test_wait_for_ready_is_accepted(echo: Echo, kind: str) -> None:
    assert await result(echo.call(kind, b"1", wait_for_ready=True)) == responses_to(kind, b"1")


# -- channels


async def test_a_channel_becomes_ready(echo: Echo) -> None:
    channel = echo.reached.another()
    assert channel.get_state() is grpc.ChannelConnectivity.IDLE
    async with asyncio.timeout(PATIENCE):
        await channel.channel_ready()
        assert channel.get_state() is grpc.ChannelConnectivity.READY
        await channel.wait_for_state_change(grpc.ChannelConnectivity.IDLE)
    await channel.close()


async def test_state_changes_are_told(echo: Echo) -> None:
    assert echo.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.IDLE
    state = grpc.ChannelConnectivity.IDLE
    async with asyncio.timeout(PATIENCE):
        while state is not grpc.ChannelConnectivity.READY:
            await echo.channel.wait_for_state_change(state)
            state = echo.channel.get_state()


async def test_a_closed_channel_refuses_calls(echo: Echo) -> None:
    channel = echo.reached.another()
    methods = [echo.method(kind, channel=channel) for kind in METHODS]
    async with channel:
        assert await methods[0](b"x") == b"x"
    assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    for method in methods:
        with pytest.raises(UsageError):
            method(b"x")
    with pytest.raises(UsageError):
        await channel.channel_ready()
    await channel.close()


async def test_a_channel_can_be_closed_with_grace(echo: Echo) -> None:
    channel = echo.reached.another()
    call = echo.method("UnaryUnary", channel=channel)(b"x")
    await channel.close(PATIENCE)
    assert await call == b"x"
