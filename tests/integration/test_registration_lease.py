from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from mesh.v1 import endpoint_pb2, registry_pb2, registry_pb2_grpc

import mesh_client.registration
from mesh_client.core.model import Endpoint
from mesh_client.core.registration import RegistrationState, RegistrationStatus, Verdict
from mesh_client.registration import LeaseRegistrar, NoRegistrar, Registrar, drain_everywhere
from mesh_client.transport import PlaintextTransport
from tests.integration.orders import control_plane, published

ENDPOINT = Endpoint(id="orders-1", address="127.0.0.1", port=4711)

Requests = AsyncIterator[registry_pb2.RegisterRequest]
Context = grpc.aio.ServicerContext[Any, Any]
Lease = Callable[[Requests, Context], AsyncIterator[registry_pb2.RegisterResponse]]


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """A registry that does what each lease's script says, the last one again and again, and notes what it is told."""

    def __init__(
        self, *leases: Lease, drain: Callable[[Context], Awaitable[registry_pb2.DrainResponse]] | None = None
    ) -> None:
        self._leases = list(leases)
        self._drain = drain
        self.requests: list[registry_pb2.RegisterRequest] = []
        self.drains: list[registry_pb2.DrainRequest] = []
        self.leases = 0

    async def Register(
        self, request_iterator: Requests, context: Context
    ) -> AsyncIterator[registry_pb2.RegisterResponse]:
        self.leases += 1
        lease = self._leases.pop(0) if len(self._leases) > 1 else self._leases[0]
        async for response in lease(self._noted(request_iterator), context):
            yield response

    async def Drain(self, request: registry_pb2.DrainRequest, context: Context) -> registry_pb2.DrainResponse:
        self.drains.append(request)
        assert self._drain is not None
        return await self._drain(context)

    async def _noted(self, requests: Requests) -> Requests:
        async for request in requests:
            self.requests.append(request)
            yield request


async def holds(requests: Requests, _: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
    async for _request in requests:
        yield registry_pb2.RegisterResponse(lease_token="token-1")


async def ends(requests: Requests, _: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
    await anext(requests)
    yield registry_pb2.RegisterResponse(lease_token="token-0")


async def never_answers(requests: Requests, _: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
    async for _request in requests:
        pass
    if False:
        yield


async def drops_as_cancelled(requests: Requests, context: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
    await anext(requests)
    yield registry_pb2.RegisterResponse(lease_token="token-0")
    await context.abort(grpc.StatusCode.CANCELLED, "going")


async def refuses(requests: Requests, context: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
    await anext(requests)  # before, the abort could cross the client's write, which would then fail with INTERNAL
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "endpoint.port: 0 is not allowed")
    yield


@asynccontextmanager
async def serving(registry: Registry, *options: tuple[str, Any]) -> AsyncIterator[str]:
    server = grpc.aio.server(options=options)
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(registry, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def registering(*addresses: str) -> AsyncIterator[LeaseRegistrar]:
    registrar = LeaseRegistrar("orders", ENDPOINT, addresses, Random(1), PlaintextTransport())
    registrar.start()
    try:
        yield registrar
    finally:
        await registrar.close()


async def until(registrar: Registrar, condition: Callable[[RegistrationStatus], bool]) -> RegistrationStatus:
    async with asyncio.timeout(15.0):
        while not condition(registrar.status()):
            await registrar.changed()
    return registrar.status()


def is_registered(status: RegistrationStatus) -> bool:
    return status.state is RegistrationState.REGISTERED


async def until_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_lease_goes_on_when_its_connection_ends_for_its_age_which_is_no_trouble(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "mesh_client.registration")
    registry = Registry(holds)
    ages = (("grpc.max_connection_age_ms", 1_000), ("grpc.max_connection_age_grace_ms", 100))
    async with serving(registry, *ages) as address, registering(address) as registrar:
        await until_true(lambda: registry.leases > 1)
        await until(registrar, is_registered)
    assert registry.requests[1].lease_token == "token-1"
    assert "UNAVAILABLE: max connection age" in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_lease_is_held_and_given_back() -> None:
    async with control_plane() as plane:
        async with registering(plane.address) as registrar:
            await until(registrar, is_registered)
            await until_published(plane.address, 1)
            await registrar.announce_drain()
            assert registrar.status().state is RegistrationState.LEAVING
            await registrar.deregister()
            assert registrar.status().state is RegistrationState.GONE
            assert registrar.status().detail == ""
            await until_published(plane.address, 0)


async def until_published(address: str, count: int) -> None:
    async with asyncio.timeout(10.0):
        while len(await published(address)) != count:
            await asyncio.sleep(0.01)


async def test_a_control_plane_that_restarts_gets_its_lease_back(tmp_path: Path, nobody: str) -> None:
    address = nobody
    async with control_plane(data_dir=tmp_path, address=address):
        registrar = LeaseRegistrar("orders", ENDPOINT, [address], Random(1), PlaintextTransport())
        registrar.start()
        await until(registrar, is_registered)
    await until(registrar, lambda status: not is_registered(status))
    assert registrar.status().failures >= 1
    async with control_plane(data_dir=tmp_path, address=address):
        status = await until(registrar, is_registered)
        assert status.failures == 0
        assert [found.endpoint.id for found in await published(address)] == ["orders-1"]
        await registrar.deregister()


async def test_the_next_control_plane_is_tried_when_one_is_gone(nobody: str) -> None:
    async with control_plane() as plane, registering(nobody, plane.address) as registrar:
        status = await until(registrar, is_registered)
        assert status.registry == plane.address


async def test_coming_back_shows_the_lease_token() -> None:
    registry = Registry(ends, drops_as_cancelled, holds)
    async with serving(registry) as address, registering(address) as registrar:
        await until_true(lambda: registry.leases == 3 and is_registered(registrar.status()))
        await registrar.deregister()
    assert [request.lease_token for request in registry.requests] == ["", "token-0", "token-0"]


async def test_how_a_lease_ended_is_told(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(ends, drops_as_cancelled, holds)
    async with serving(registry) as address, registering(address) as registrar:
        await until_true(lambda: registry.leases == 3 and is_registered(registrar.status()))
    assert "the control plane ended the lease" in caplog.text
    assert "CANCELLED: going" in caplog.text


async def test_a_refusal_is_shown_and_not_repeated_soon() -> None:
    registry = Registry(refuses)
    async with serving(registry) as address, registering(address) as registrar:
        status = await until(registrar, lambda status: status.failures == 1)
        assert status.state is RegistrationState.WAITING
        assert status.detail == f"{address}: INVALID_ARGUMENT: endpoint.port: 0 is not allowed"
        assert registrar._machine.wait(status.since) >= 5.0


async def test_a_control_plane_that_hangs_is_given_up_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_client.registration, "ANSWER_TIMEOUT", 0.1)
    async with serving(Registry(never_answers)) as hung, serving(Registry(holds)) as well:
        async with registering(hung, well) as registrar:
            await until(registrar, lambda status: status.failures == 1)
            assert registrar.status().detail == f"{hung}: no answer within 0.1 s"
            await until(registrar, is_registered)
            assert registrar.status().registry == well
            await registrar.deregister()


async def test_health_is_told_when_it_changes_and_only_then() -> None:
    registry = Registry(holds)
    async with serving(registry) as address, registering(address) as registrar:
        registrar.report(Verdict(True, "fine"))
        await until(registrar, is_registered)
        for healthy in (True, False, False, True):
            registrar.report(Verdict(healthy, "said so"))
            await until_true(lambda: registry.requests[-1].endpoint.health == health_number(registrar))
        await registrar.deregister()
    assert [request.endpoint.health for request in registry.requests] == [
        endpoint_pb2.HEALTH_STATUS_HEALTHY,
        endpoint_pb2.HEALTH_STATUS_UNHEALTHY,
        endpoint_pb2.HEALTH_STATUS_HEALTHY,
    ]


def health_number(registrar: LeaseRegistrar) -> int:
    name = f"HEALTH_STATUS_{registrar._endpoint.health.name}"
    return int(endpoint_pb2.HealthStatus.Value(name))


async def test_a_lease_that_breaks_while_leaving_is_not_renewed() -> None:
    gone = asyncio.Event()

    async def breaks(requests: Requests, _: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
        await anext(requests)
        yield registry_pb2.RegisterResponse(lease_token="token-1")
        await gone.wait()

    registry = Registry(breaks)
    async with serving(registry) as address, registering(address) as registrar:
        await until(registrar, is_registered)
        await registrar.announce_drain()
        gone.set()
        await until(registrar, lambda status: status.state is RegistrationState.GONE)
        await registrar.deregister()
    assert registry.leases == 1


async def test_leaving_before_the_lease_was_confirmed_asks_nobody() -> None:
    registry = Registry(never_answers)
    async with serving(registry) as address, registering(address) as registrar:
        await until_true(lambda: len(registry.requests) == 1)
        await registrar.deregister()
        assert registrar.status().state is RegistrationState.GONE


async def test_a_confirmation_that_comes_too_late_is_ignored() -> None:
    confirm = asyncio.Event()

    async def late(requests: Requests, _: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
        await anext(requests)
        await confirm.wait()
        yield registry_pb2.RegisterResponse(lease_token="token-1")

    registry = Registry(late)
    async with serving(registry) as address, registering(address) as registrar:
        await until_true(lambda: len(registry.requests) == 1)
        await registrar.announce_drain()
        confirm.set()
        await until_true(lambda: registrar._task is not None and registrar._task.done())
        assert registrar.status().state is RegistrationState.GONE


async def test_a_control_plane_that_does_not_end_the_stream_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def holds_on(requests: Requests, _: Context) -> AsyncIterator[registry_pb2.RegisterResponse]:
        await anext(requests)
        yield registry_pb2.RegisterResponse(lease_token="token-1")
        await asyncio.Event().wait()

    async with serving(Registry(holds_on)) as address, registering(address) as registrar:
        await until(registrar, is_registered)
        monkeypatch.setattr(mesh_client.registration, "ANSWER_TIMEOUT", 0.1)
        await registrar.deregister()


async def test_a_drain_asks_every_control_plane_and_adds_up_what_they_say(nobody: str) -> None:
    async def complete(_: Context) -> registry_pb2.DrainResponse:
        return registry_pb2.DrainResponse(complete=True, acknowledged=3)

    async def pending(_: Context) -> registry_pb2.DrainResponse:
        return registry_pb2.DrainResponse(acknowledged=1, pending=["gateway-1"])

    first, second = Registry(holds, drain=complete), Registry(holds, drain=pending)
    async with serving(first) as one, serving(second) as two:
        report = await drain_everywhere([one, nobody, two], "orders", "orders-1", 15.0, PlaintextTransport())
    assert (report.answered, report.acknowledged, report.pending) == (2, 4, ("gateway-1",))
    assert [failure.startswith(f"{nobody}: UNAVAILABLE") for failure in report.failures] == [True]
    (request,) = first.drains
    assert (request.service, request.endpoint_id) == ("orders", "orders-1")
    assert request.timeout.ToMilliseconds() == 15_000


async def test_a_drain_is_bounded_though_the_control_plane_hangs() -> None:
    async def hang(_: Context) -> registry_pb2.DrainResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving(Registry(holds, drain=hang)) as address:
        report = await drain_everywhere([address], "orders", "orders-1", 0.1, PlaintextTransport())
    assert report.answered == 0
    assert "DEADLINE_EXCEEDED" in report.failures[0]


async def test_closing_what_never_started_is_harmless() -> None:
    registrar = LeaseRegistrar("orders", ENDPOINT, ["127.0.0.1:1"], Random(1), PlaintextTransport())
    await registrar.deregister()
    assert registrar.status().state is RegistrationState.GONE


async def test_a_server_that_registers_nowhere_says_so() -> None:
    registrar = NoRegistrar("by choice")
    registrar.start()
    registrar.report(Verdict(True, "fine"))
    await registrar.announce_drain()
    await registrar.deregister()
    await registrar.close()
    assert registrar.status().detail == "by choice"
    waiting = asyncio.create_task(registrar.changed())
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait({waiting})
