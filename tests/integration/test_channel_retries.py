"""Calls that are made again, that wait, and that inherit: what a raw channel has nothing of."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh_client
from mesh_client.at_once import at_once
from mesh_client.calls.requests import REPLAY_BYTES
from mesh_client.context import PREVIOUS_ATTEMPTS_KEY, InboundCall, inbound
from mesh_client.errors import MeshRpcError, Reason
from tests.integration.echo_service import EchoService
from tests.integration.mesh_rig import Rig, open_rig, state_of

SERVICE = "echo"
PATIENCE = 30.0
METHODS = {
    "UnaryUnary": "unary_unary",
    "UnaryStream": "unary_stream",
    "StreamUnary": "stream_unary",
    "StreamStream": "stream_stream",
}


class FailingService(EchoService):
    """Answers UNAVAILABLE so many times, then as its base does."""

    def __init__(self, failures: int = 0) -> None:
        super().__init__()
        self.failures = failures

    async def _begin(self, kind: str, context: Any) -> None:
        if self.failures:
            self.failures -= 1
            self.calls[kind] += 1
            self.metadata.append(dict(context.invocation_metadata()))
            context.set_trailing_metadata((("told", "unavailable"),))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        await super()._begin(kind, context)


class HungryService(FailingService):
    """Answers UNAVAILABLE when it has read so many bytes."""

    def __init__(self, appetite: int) -> None:
        super().__init__()
        self.appetite = appetite

    async def _stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        self.calls["StreamUnary"] += 1
        read = 0
        while read < self.appetite:
            read += len(await anext(requests))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "cannot eat more")
        return b""


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


class Reached:
    """A service of one endpoint and a client that knows it."""

    def __init__(self, rig: Rig, service: FailingService) -> None:
        self.rig = rig
        self.service = service
        self.mesh: Any = None
        self.channel: Any = None

    @classmethod
    async def make(cls, rig: Rig, failures: int = 0, **policy: Any) -> Reached:
        """Serves, connects, and lets the client obey a policy."""
        made = cls(rig, FailingService(failures))
        await rig.serve(SERVICE, "a", made.service.add_to)
        made.mesh = await rig.mesh()
        made.channel = await rig.channel(made.mesh, SERVICE, ["a"])
        if policy:
            await rig.policy(made.mesh, {"service": SERVICE, **policy})
        return made

    def call(self, kind: str, request: bytes = b"1", **options: Any) -> Any:
        """Calls the method of this kind with one request."""
        return method_of(self.channel, kind)([request] if kind.startswith("Stream") else request, **options)


def method_of(channel: Any, kind: str) -> Any:
    """The multicallable of the method of this kind."""
    return getattr(channel, METHODS[kind])(f"/test.Echo/{kind}")


SLOWLY = {"retry": {"backoff": {"initial": "60s", "max": "60s"}}}
"""A policy whose retries wait long enough for whatever a test does meanwhile."""


async def result(call: Any) -> Any:
    """The response of a call, or all of its responses."""
    return [response async for response in call] if hasattr(call, "__aiter__") else await call


async def waiting_to_retry(reached: Reached) -> None:
    """Returns when an attempt has failed and the next one has not begun."""
    async with asyncio.timeout(PATIENCE):
        while state_of(reached.mesh, SERVICE).retries == 0:
            await asyncio.sleep(0)


# -- retries


@pytest.mark.parametrize("kind", METHODS)
async def test_the_server_of_a_retry_sees_how_many_attempts_came_before(rig: Rig, kind: str) -> None:
    reached = await Reached.make(rig, failures=2)
    call = reached.call(kind, metadata=(("key", "value"),))
    assert await result(call) in (b"1", [b"1"], [b"0"])
    assert [received.get(PREVIOUS_ATTEMPTS_KEY) for received in reached.service.metadata] == [None, "1", "2"]
    assert [received["key"] for received in reached.service.metadata] == ["value"] * 3
    state = state_of(reached.mesh, SERVICE)
    assert (state.calls, state.retries) == (1, 2)
    assert (await call.trailing_metadata())["told"] == "last"


@pytest.mark.parametrize("kind", METHODS)
async def test_after_the_last_attempt_the_call_carries_its_status(rig: Rig, kind: str) -> None:
    reached = await Reached.make(rig, failures=3)
    call = reached.call(kind)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE
    assert (await call.initial_metadata()).get("told") is None
    assert (await call.trailing_metadata())["told"] == "unavailable"
    assert await call.details() == "not now"
    assert "not now" in await call.debug_error_string()
    for _ in range(2):
        with pytest.raises(MeshRpcError) as caught:
            await (call.read() if hasattr(call, "read") else call)
        assert len(caught.value.mesh.attempts) == 3
    with pytest.raises(MeshRpcError):
        await call.wait_for_connection()


@pytest.mark.parametrize("kind", ["UnaryStream", "StreamStream"])
async def test_reading_goes_on_with_the_attempt_that_succeeds(rig: Rig, kind: str) -> None:
    reached = await Reached.make(rig, failures=1)
    call = reached.call(kind)
    assert await call.read() is not grpc.aio.EOF
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("kind", METHODS)
async def test_metadata_and_connection_are_those_of_the_attempt_that_answers(rig: Rig, kind: str) -> None:
    reached = await Reached.make(rig, failures=1)
    call = reached.call(kind)
    metadata, _ = await asyncio.gather(call.initial_metadata(), call.wait_for_connection())
    assert await result(call) in (b"1", [b"1"], [b"0"])
    assert metadata.get("told") in {"first", None}


@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_that_waits_to_be_retried_can_be_cancelled(rig: Rig, kind: str) -> None:
    reached = await Reached.make(rig, failures=1, **SLOWLY)
    call = reached.call(kind)
    waiters = [asyncio.ensure_future(waiter) for waiter in (call.code(), call.initial_metadata(), call.details())]
    await waiting_to_retry(reached)
    assert call.cancel()
    code, metadata, details = await asyncio.gather(*waiters)
    assert code is grpc.StatusCode.CANCELLED
    assert len(metadata) == 0
    assert details == "Locally cancelled by application!"
    assert await call.debug_error_string() == ""
    assert len(await call.initial_metadata()) == len(await call.trailing_metadata()) == 0
    assert call.cancelled()
    with pytest.raises(asyncio.CancelledError):
        await result(call)


@pytest.mark.parametrize("kind", METHODS)
async def test_cancelling_the_task_of_a_call_that_waits_to_be_retried_cancels_it(rig: Rig, kind: str) -> None:
    reached = await Reached.make(rig, failures=1, **SLOWLY)
    call = reached.call(kind)
    task = asyncio.ensure_future(result(call))
    await waiting_to_retry(reached)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.cancelled()
    assert reached.service.calls[kind] == 1


async def test_a_client_that_stops_ends_calls_that_wait_to_be_retried(rig: Rig) -> None:
    reached = await Reached.make(rig, failures=1, retry={"backoff": {"initial": "3s", "max": "3s"}})
    call = reached.call("UnaryUnary")
    await waiting_to_retry(reached)
    await reached.mesh.__aexit__()
    with pytest.raises((grpc.aio.UsageError, asyncio.CancelledError)):
        async with asyncio.timeout(PATIENCE):
            await call
    assert call.done()


async def test_a_client_that_stops_cancels_calls_in_flight(rig: Rig) -> None:
    reached = await Reached.make(rig)
    call = reached.call("UnaryUnary", b"sleep")
    await reached.service.asleep.wait()
    await reached.mesh.__aexit__()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()


@pytest.mark.parametrize(("sent", "attempts"), [(REPLAY_BYTES // 2, 3), (REPLAY_BYTES * 2, 1)])
async def test_a_call_is_repeated_while_its_requests_fit_the_buffer(rig: Rig, sent: int, attempts: int) -> None:
    service = HungryService(sent)
    await rig.serve(SERVICE, "a", service.add_to)
    channel = await rig.channel(await rig.mesh(), SERVICE, ["a"])
    call = method_of(channel, "StreamUnary")(b"x" * 16384 for _ in range(sent // 16384))
    with pytest.raises(MeshRpcError, match="cannot eat more"):
        await call
    assert service.calls["StreamUnary"] == attempts


@pytest.mark.parametrize("kind", METHODS)
async def test_a_policy_without_retries_has_none(rig: Rig, kind: str) -> None:
    reached = await Reached.make(rig, failures=1, retry={"max_attempts": 1})
    with pytest.raises(MeshRpcError, match="not now"):
        await result(reached.call(kind))
    assert reached.service.calls[kind] == 1
    assert await result(reached.call(kind)) in (b"1", [b"1"], [b"0"])


async def test_errors_can_be_passed_between_processes(rig: Rig) -> None:
    reached = await Reached.make(rig, failures=3)
    with pytest.raises(MeshRpcError) as caught:
        await reached.call("UnaryUnary")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.mesh == caught.value.mesh
    assert copy.trailing_metadata() == caught.value.trailing_metadata()


# -- waiting


async def test_a_write_waits_with_its_call_and_fails_with_it(rig: Rig) -> None:
    mesh = await rig.mesh()
    call = method_of(mesh.channel(SERVICE), "StreamStream")(wait_for_ready=True, timeout=0.05)
    with pytest.raises(MeshRpcError) as caught:
        await call.write(b"1")
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_cancelling_the_task_that_writes_cancels_the_call(rig: Rig) -> None:
    mesh = await rig.mesh()
    call = method_of(mesh.channel(SERVICE), "StreamStream")(wait_for_ready=True)
    task = asyncio.ensure_future(call.write(b"1"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert call.cancelled()


async def test_calls_that_wait_may_cancel_each_other_as_they_end(rig: Rig) -> None:
    mesh = await rig.mesh()
    first, second = (method_of(mesh.channel("nobody"), "UnaryUnary")(b"1") for _ in range(2))
    first.add_done_callback(lambda _: second.cancel())
    second.add_done_callback(lambda _: first.cancel())
    async with asyncio.timeout(PATIENCE):
        codes = {await first.code(), await second.code()}
    assert codes == {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_that_waits_for_ready_goes_on_when_an_endpoint_comes(rig: Rig, kind: str) -> None:
    service = FailingService()
    mesh = await rig.mesh()
    method = method_of(mesh.channel(SERVICE), kind)
    call = method([b"1"] if kind.startswith("Stream") else b"1", wait_for_ready=True, timeout=30)
    assert not call.done()
    assert 0 < call.time_remaining() <= 30
    responses = asyncio.ensure_future(result(call))
    await rig.serve(SERVICE, "a", service.add_to)
    async with asyncio.timeout(PATIENCE):
        assert await responses in (b"1", [b"1"], [b"0"])


async def test_a_call_that_waits_for_ready_ends_at_its_deadline(rig: Rig) -> None:
    mesh = await rig.mesh()
    call = method_of(mesh.channel(SERVICE), "UnaryUnary")(b"1", wait_for_ready=True, timeout=0.05)
    with pytest.raises(MeshRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(await call.initial_metadata()) == len(await call.trailing_metadata()) == 0
    assert "deadline" in await call.details()
    assert "deadline" in await call.debug_error_string()


async def test_a_call_that_waits_can_be_cancelled_before_it_was_ever_sent(rig: Rig) -> None:
    mesh = await rig.mesh()
    call = method_of(mesh.channel(SERVICE), "UnaryUnary")(b"1", wait_for_ready=True)
    connected = asyncio.ensure_future(call.wait_for_connection())
    await asyncio.sleep(0)
    assert call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connected
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize("kind", METHODS)
async def test_a_call_that_the_mesh_refuses_says_why_wherever_it_is_asked(rig: Rig, kind: str) -> None:
    mesh = await rig.mesh()
    method = method_of(mesh.channel(SERVICE), kind)
    async with asyncio.timeout(PATIENCE):
        await mesh.synced()
    call = method([b"1"] if kind.startswith("Stream") else b"1")
    assert call.done()
    assert not call.cancelled()
    with pytest.raises(MeshRpcError) as caught:
        await result(call)
    assert caught.value.mesh.reason is Reason.UNKNOWN_SERVICE
    with pytest.raises(MeshRpcError):
        await call.wait_for_connection()
    seen: list[Any] = []
    call.add_done_callback(seen.append)
    assert seen == [call]


async def test_an_endpoint_that_cannot_be_reached_is_explained(rig: Rig) -> None:
    await rig.register(SERVICE, "gone", 1)
    mesh = await rig.mesh()
    channel = await rig.channel(mesh, SERVICE, ["gone"])
    call = method_of(channel, "UnaryUnary")(b"1", timeout=30)
    with pytest.raises(MeshRpcError, match=r"mesh: .*gone"):
        await call.wait_for_connection()
    assert "gone" in await call.details()


async def test_a_server_that_refuses_ends_a_call_that_waits_for_ready_after_its_attempts(rig: Rig) -> None:
    reached = await Reached.make(rig, failures=100)
    with pytest.raises(MeshRpcError) as caught:
        await reached.call("UnaryUnary", wait_for_ready=True, timeout=30)
    assert caught.value.details() == "not now"
    assert reached.service.calls["UnaryUnary"] == 3


# -- what a call inherits


async def test_a_call_ends_at_the_inherited_deadline_or_its_own_whichever_is_earlier(rig: Rig) -> None:
    reached = await Reached.make(rig)
    now = asyncio.get_running_loop().time()
    for scope, own, expected in ((20.0, None, 20.0), (20.0, 10.0, 10.0), (20.0, 40.0, 20.0), (None, 10.0, 10.0)):
        served = InboundCall(None if scope is None else now + scope)
        token = inbound.set(served)
        call = reached.call("UnaryUnary", timeout=own)
        inbound.reset(token)
        assert served.scope == {call}
        assert expected - 5 < call.time_remaining() <= expected
        await call
        await call.code()
        assert served.scope == set()


async def test_a_call_is_cancelled_with_the_one_that_it_is_made_for(rig: Rig) -> None:
    reached = await Reached.make(rig)
    served = InboundCall()
    token = inbound.set(served)
    call = reached.call("UnaryUnary", b"sleep")
    inbound.reset(token)
    await reached.service.asleep.wait()
    served.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(PATIENCE):
        await reached.service.ended.wait()


async def test_a_call_with_bad_metadata_leaves_nothing_behind(rig: Rig) -> None:
    reached = await Reached.make(rig)
    served = InboundCall()
    token = inbound.set(served)
    with pytest.raises((TypeError, ValueError)):
        reached.call("UnaryUnary", metadata=(("key",),))
    inbound.reset(token)
    assert served.scope == set()
    assert state_of(reached.mesh, SERVICE).endpoints[0].outstanding == 0


# -- hashing


@pytest.mark.parametrize("source", ["EXPLICIT", "METADATA", "SOURCE_IP"])
async def test_calls_with_equal_keys_go_to_one_endpoint(rig: Rig, source: str) -> None:
    services = [FailingService() for _ in range(3)]
    for number, service in enumerate(services):
        await rig.serve(SERVICE, f"i{number}", service.add_to)
    mesh = await rig.mesh()
    channel = await rig.channel(mesh, SERVICE, ["i0", "i1", "i2"])
    key = {"source": source, **({"metadata_key": "user"} if source == "METADATA" else {})}
    await rig.policy(mesh, {"service": SERVICE, "load_balancer": {"algorithm": "RING_HASH", "hash_key": key}})
    method = method_of(channel, "UnaryUnary")
    for _ in range(10):
        await _keyed(method, source, "ann")
    assert sorted(service.calls["UnaryUnary"] for service in services) == [0, 0, 10]
    for number in range(30):
        await _keyed(method, source, f"user {number}")
    spread = [service.calls["UnaryUnary"] for service in services]
    assert all(spread)
    assert sum(spread) == 40


async def _keyed(method: Any, source: str, key: str) -> None:
    if source == "EXPLICIT":
        with mesh_client.hash_key(key):
            await method(b"1")
    elif source == "METADATA":
        await method(b"1", metadata=(("other", "x"), ("user", key)))
    else:
        token = inbound.set(InboundCall(peer=f"ipv4:10.0.0.{sum(key.encode())}:1"))
        await method(b"1")
        inbound.reset(token)


@pytest.mark.parametrize("source", ["EXPLICIT", "METADATA", "SOURCE_IP"])
async def test_calls_without_a_key_are_made_all_the_same(rig: Rig, source: str) -> None:
    key = {"source": source, **({"metadata_key": "user"} if source == "METADATA" else {})}
    reached = await Reached.make(rig, load_balancer={"algorithm": "RING_HASH", "hash_key": key})
    assert await reached.call("UnaryUnary") == b"1"


async def test_what_would_wait_is_not_taken_for_done() -> None:
    with pytest.raises(asyncio.InvalidStateError):
        at_once(asyncio.sleep(1))
