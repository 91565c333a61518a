from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh_client.addresses import parse_peer_ip
from mesh_client.admission import Admission
from mesh_client.context import InboundCall, inbound
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.retry import PUSHBACK_KEY, parse_pushback
from mesh_client.guard import Guard
from mesh_client.transport import open_channel
from tests.integration import methods
from tests.integration.methods import (
    EXPECTED,
    FORMS,
    KINDS,
    REQUESTS,
    SERVICE,
    Failure,
    call,
    failure,
    handler,
    serving,
    thread_pool,
)

UNLIMITED = ServicePolicy(service="orders")


def limited(**settings: Any) -> ServicePolicy:
    return ServicePolicy.parse({"service": "orders", **settings})


def admission(policy: ServicePolicy = UNLIMITED) -> Admission:
    result = Admission(Random(1), Guard("orders", secure=False))
    result.apply(policy)
    return result


def form_name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("kind", "behavior"), FORMS, ids=form_name)
async def test_every_form_of_handler_answers_as_without_the_mesh(kind: str, behavior: Callable[..., Any]) -> None:
    gate = admission()
    async with serving(("M", handler(kind, behavior)), wrap=gate) as target, open_channel(target) as channel:
        responses, rpc = await call(channel, kind, "M", REQUESTS)
        assert responses == EXPECTED[kind]
        assert await rpc.code() is grpc.StatusCode.OK
    assert gate.in_flight == 0


@pytest.mark.parametrize(("kind", "behavior"), FORMS, ids=form_name)
async def test_every_form_of_handler_is_refused_past_its_rate_and_told_when_to_come_back(
    kind: str, behavior: Callable[..., Any]
) -> None:
    gate = admission(limited(rate_limits=[{"requests_per_second": 0.01}]))
    async with serving(("M", handler(kind, behavior)), wrap=gate) as target, open_channel(target) as channel:
        await call(channel, kind, "M", REQUESTS)
        refused = await failure(channel, kind, "M")
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "127.0.0.1 exceeds 0.01 calls a second to *" in refused.details
    assert parse_pushback(str(refused.trailing[PUSHBACK_KEY])).delay == pytest.approx(100.0, abs=10.0)
    assert gate.in_flight == 0


async def test_callers_have_buckets_of_their_own_by_the_name_they_give_else_by_address() -> None:
    gate = admission(limited(rate_limits=[{"requests_per_second": 0.01}]))
    async with (
        serving(("M", handler("unary_unary", methods.echo_unary)), wrap=gate) as target,
        open_channel(target) as channel,
    ):
        for name in ("gateway", "billing"):
            await call(channel, "unary_unary", "M", [b""], metadata=(("mesh-caller", name),))
        await call(channel, "unary_unary", "M", [b""])
        with pytest.raises(grpc.aio.AioRpcError, match="gateway exceeds"):
            await call(channel, "unary_unary", "M", [b""], metadata=(("other", "x"), ("mesh-caller", "gateway")))


async def test_methods_are_limited_by_the_first_rule_that_matches() -> None:
    rules = [{"method": f"{SERVICE}/Slow", "requests_per_second": 0.01}, {"requests_per_second": 1_000.0}]
    gate = admission(limited(rate_limits=rules))
    echo = handler("unary_unary", methods.echo_unary)
    async with serving(("Slow", echo), ("Fast", echo), wrap=gate) as target, open_channel(target) as channel:
        await call(channel, "unary_unary", "Slow", [b""])
        with pytest.raises(grpc.aio.AioRpcError):
            await call(channel, "unary_unary", "Slow", [b""])
        for _ in range(10):
            await call(channel, "unary_unary", "Fast", [b""])


async def test_a_policy_that_keeps_the_rate_limits_keeps_the_buckets_and_one_without_lifts_them() -> None:
    rules = [{"requests_per_second": 0.01}]
    gate = admission(limited(rate_limits=rules))
    async with (
        serving(("M", handler("unary_unary", methods.echo_unary)), wrap=gate) as target,
        open_channel(target) as channel,
    ):
        await call(channel, "unary_unary", "M", [b""])
        gate.apply(limited(rate_limits=rules, timeout="1s"))
        with pytest.raises(grpc.aio.AioRpcError):
            await call(channel, "unary_unary", "M", [b""])
        gate.apply(UNLIMITED)
        await call(channel, "unary_unary", "M", [b""])


class Held:
    """Handlers that wait to be let go, in each kind."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)
        self.release = asyncio.Event()
        self.seen: list[InboundCall | None] = []
        self.cancelled = asyncio.Event()

    async def wait(self) -> None:
        self.seen.append(inbound.get())
        self.entered.release()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def unary_unary(self, request: bytes, _: object) -> bytes:
        await self.wait()
        return request

    async def unary_stream(self, request: bytes, _: object) -> AsyncIterator[bytes]:
        await self.wait()
        yield request

    async def stream_unary(self, requests: AsyncIterator[bytes], _: object) -> bytes:
        await self.wait()
        return b",".join([request async for request in requests])

    async def stream_stream(self, requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        await self.wait()
        async for request in requests:
            yield request


@pytest.mark.parametrize("kind", KINDS)
async def test_calls_past_the_concurrency_limit_are_shed_and_places_are_given_back(kind: str) -> None:
    gate = admission(limited(server_concurrency_limit={"max_in_flight": 2}))
    held = Held()
    async with serving(("M", handler(kind, getattr(held, kind))), wrap=gate) as target, open_channel(target) as channel:
        first = [asyncio.create_task(call(channel, kind, "M", REQUESTS)) for _ in range(2)]
        for _ in first:
            await held.entered.acquire()
        assert gate.in_flight == 2
        refused = await failure(channel, kind, "M")
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "2 calls are in flight" in refused.details
        assert 50 <= int(refused.trailing[PUSHBACK_KEY]) <= 151
        held.release.set()
        await asyncio.gather(*first)
        assert gate.in_flight == 0
        await call(channel, kind, "M", REQUESTS)


async def test_a_limit_that_comes_later_counts_the_calls_in_flight() -> None:
    gate = admission()
    held = Held()
    async with (
        serving(("M", handler("unary_unary", held.unary_unary)), wrap=gate) as target,
        open_channel(target) as channel,
    ):
        first = asyncio.create_task(call(channel, "unary_unary", "M", [b""]))
        await held.entered.acquire()
        gate.apply(limited(server_concurrency_limit={"max_in_flight": 1}))
        with pytest.raises(grpc.aio.AioRpcError):
            await call(channel, "unary_unary", "M", [b""])
        held.release.set()
        await first


async def test_a_shed_call_takes_no_token() -> None:
    gate = admission(
        limited(server_concurrency_limit={"max_in_flight": 1}, rate_limits=[{"requests_per_second": 0.01, "burst": 2}])
    )
    held = Held()
    async with (
        serving(("M", handler("unary_unary", held.unary_unary)), wrap=gate) as target,
        open_channel(target) as channel,
    ):
        first = asyncio.create_task(call(channel, "unary_unary", "M", [b""]))
        await held.entered.acquire()
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError, match="in flight"):
                await call(channel, "unary_unary", "M", [b""])
        held.release.set()
        await first
        await call(channel, "unary_unary", "M", [b""])
        with pytest.raises(grpc.aio.AioRpcError, match="exceeds"):
            await call(channel, "unary_unary", "M", [b""])


class Outbound:
    """An outbound call as its scope sees it."""

    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    def cancel(self) -> None:
        self.cancelled.set()


@pytest.mark.parametrize("kind", KINDS)
async def test_outbound_calls_see_deadline_and_address_of_the_inbound_call_and_are_cancelled_with_it(kind: str) -> None:
    gate = admission()
    held = Held()
    async with serving(("M", handler(kind, getattr(held, kind))), wrap=gate) as target, open_channel(target) as channel:
        earliest = time.monotonic() + 60.0
        rpc = asyncio.create_task(call(channel, kind, "M", REQUESTS, timeout=60.0))
        await held.entered.acquire()
        (seen,) = held.seen
        assert seen is not None
        assert seen.peer_ip == "127.0.0.1"
        assert seen.deadline is not None
        assert earliest - 1.0 < seen.deadline <= time.monotonic() + 61.0  # grpc rounds it up
        outbound = Outbound()
        seen.scope.add(outbound)
        rpc.cancel()
        await asyncio.wait_for(outbound.cancelled.wait(), 5.0)
        assert held.cancelled.is_set()
        assert not seen.scope
        await asyncio.wait({rpc})
    assert gate.in_flight == 0


async def test_a_call_cancelled_while_it_writes_gives_its_place_back_and_cancels_its_outbound_calls() -> None:
    gate = admission()
    outbound = Outbound()
    ended = asyncio.Event()

    async def flood(_: bytes, __: object) -> AsyncIterator[bytes]:
        seen = inbound.get()
        assert seen is not None
        seen.scope.add(outbound)
        try:
            while True:
                yield bytes(1 << 20)
        finally:
            ended.set()

    async with serving(("M", handler("unary_stream", flood)), wrap=gate) as target, open_channel(target) as channel:
        flooding: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{SERVICE}/M")
        rpc = flooding(b"")
        await rpc.read()
        rpc.cancel()
        await asyncio.wait_for(outbound.cancelled.wait(), 5.0)
        await asyncio.wait_for(ended.wait(), 5.0)
    assert gate.in_flight == 0


async def test_without_a_deadline_there_is_none_and_outside_of_calls_there_is_no_inbound_call() -> None:
    held = Held()
    held.release.set()
    async with serving(("M", handler("unary_unary", held.unary_unary)), wrap=admission()) as target:
        async with open_channel(target) as channel:
            await call(channel, "unary_unary", "M", [b""])
    assert held.seen[0] is not None
    assert held.seen[0].deadline is None
    assert inbound.get() is None


async def test_handlers_in_threads_have_the_inbound_call_while_they_run_and_leave_none_behind() -> None:
    seen: list[InboundCall | None] = []

    def unary(request: bytes, _: object) -> bytes:
        seen.append(inbound.get())
        return request

    def stream(request: bytes, _: object) -> Any:
        seen.append(inbound.get())
        yield request

    async with thread_pool(1) as threads:
        server = grpc.aio.server(migration_thread_pool=threads)
        handlers = {"U": handler("unary_unary", unary), "S": handler("unary_stream", stream)}
        server.add_registered_method_handlers(SERVICE, admission().wrap_methods(SERVICE, handlers))
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with open_channel(target) as channel:
            await call(channel, "unary_unary", "U", [b""])
            await call(channel, "unary_stream", "S", [b""], timeout=30.0)
        await server.stop(None)
        assert await asyncio.wrap_future(threads.submit(inbound.get)) is None
    assert [inbound_call is not None and inbound_call.peer_ip for inbound_call in seen] == ["127.0.0.1"] * 2


@pytest.mark.parametrize("wrapped", [True, False], ids=["mesh", "plain"])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_handler_raises_is_what_plain_grpc_makes_of_it(kind: str, wrapped: bool) -> None:
    async def fails_once_called(*_: object) -> Any:
        raise ValueError("no such thing")

    async def aborts(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "not here", (("why", "gone"),))

    async with serving(
        ("Fails", handler(kind, fails_once_called)),
        ("Aborts", handler(kind, aborts)),
        wrap=admission() if wrapped else None,
    ) as target:
        async with open_channel(target) as channel:
            failed = await failure(channel, kind, "Fails")
            aborted = await failure(channel, kind, "Aborts")
    assert failed == Failure(grpc.StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: no such thing", {})
    assert aborted == Failure(grpc.StatusCode.NOT_FOUND, "not here", {"why": "gone"})


class AnyMethod(grpc.GenericRpcHandler):
    """A proxy: serves whatever method it is asked for."""

    def __init__(self, *, same: bool) -> None:
        self.found = handler("unary_unary", methods.echo_unary)
        self.same = same

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if "Unknown" in handler_call_details.method:
            return None
        return self.found if self.same else handler("unary_unary", methods.echo_unary)


class Details(grpc.HandlerCallDetails):
    invocation_metadata = ()

    def __init__(self, method: str) -> None:
        self.method = method


def test_a_generic_handler_is_wrapped_once_for_each_method_it_finds_again() -> None:
    wrapped = admission().wrap_generic(AnyMethod(same=True))
    first = wrapped.service(Details("/a/A"))
    assert wrapped.service(Details("/a/A")) is first
    assert wrapped.service(Details("/a/B")) is not first
    assert wrapped.service(Details("/a/Unknown")) is None


def test_a_generic_handler_with_a_new_handler_for_every_call_takes_bounded_memory() -> None:
    wrapped = admission().wrap_generic(AnyMethod(same=False))
    assert wrapped.service(Details("/a/A")) is not wrapped.service(Details("/a/A"))
    for number in range(2_500):
        wrapped.service(Details(f"/a/M{number}"))
    assert len(wrapped._wrapped) <= 1_000  # type: ignore[attr-defined]  # the memory is its own


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:5123", "10.0.0.7"),
        ("ipv6:%5B::1%5D:5123", "::1"),
        ("ipv6:[fe80::1%25eth0]:5123", "fe80::1"),
        ("unix:/tmp/socket", ""),
        ("", ""),
    ],
)
def test_the_peers_address_is_read_from_grpcs_form(peer: str, address: str) -> None:
    assert parse_peer_ip(peer) == address
