"""RegistryService over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import endpoint_pb2, registry_pb2, registry_pb2_grpc

from control_plane.events import EndpointDrained
from control_plane.registry import RegistryServicer
from control_plane.sources.database import Database
from control_plane.sources.embedded import EmbeddedSource
from mesh_client.core.model import Health
from tests.control_plane.recording import Recording, recorded

Call = grpc.aio.StreamStreamCall[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse]


@dataclass
class Outcome:
    acknowledged: int
    pending: list[str]


@dataclass
class Drains:
    """Takes drains as the streams of clients would, and answers as told."""

    outcome: Outcome = field(default_factory=lambda: Outcome(2, []))
    seen: list[tuple[object, ...]] = field(default_factory=list)

    def drain(self, service: str, endpoint_id: str) -> None:
        self.seen.append((service, endpoint_id))

    async def wait_drained(self, service: str, endpoint_id: str, timeout: float) -> Outcome:
        self.seen.append((service, endpoint_id, timeout))
        return self.outcome


@dataclass
class World:
    address: str
    stub: registry_pb2_grpc.RegistryServiceAsyncStub
    servicer: RegistryServicer
    source: EmbeddedSource
    drains: Drains
    recording: Recording

    async def register(self, endpoint_id: str = "a-1", token: str = "", **fields: object) -> tuple[Call, str]:
        call = self.stub.Register()
        await call.write(request(endpoint_id, token, **fields))
        response = await call.read()
        assert isinstance(response, registry_pb2.RegisterResponse)
        return call, response.lease_token


def endpoint(endpoint_id: str = "a-1", **fields: object) -> endpoint_pb2.Endpoint:
    message = endpoint_pb2.Endpoint(id=endpoint_id, address="10.0.0.1", port=80)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def request(endpoint_id: str = "a-1", token: str = "", **fields: object) -> registry_pb2.RegisterRequest:
    return registry_pb2.RegisterRequest(service="a", endpoint=endpoint(endpoint_id, **fields), lease_token=token)


@pytest.fixture
def lease_grace() -> float:
    """Longer than any test takes, but for tests of its end, which have one of their own."""
    return 60.0


@pytest.fixture
async def world(lease_grace: float) -> AsyncIterator[World]:
    database = Database(None)
    source = EmbeddedSource(database, lease_grace=lease_grace, max_leases=5)
    drains = Drains()
    servicer = RegistryServicer(source, drains)
    server = grpc.aio.server()
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address = f"127.0.0.1:{port}"
    try:
        async with recorded(source) as recording, grpc.aio.insecure_channel(address) as channel:
            yield World(address, registry_pb2_grpc.RegistryServiceStub(channel), servicer, source, drains, recording)
    finally:
        await server.stop(None)
        await database.close()


async def refusal(call: Call) -> tuple[grpc.StatusCode, str]:
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass
    return await call.code(), await call.details() or ""


async def test_a_stream_holds_its_endpoint_and_half_closing_ends_it(world: World) -> None:
    call, token = await world.register()
    assert len(token) >= 32
    assert world.recording.ids("a") == {"a-1"}
    await call.done_writing()
    assert isinstance(await call.read(), registry_pb2.RegisterResponse)
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert world.recording.ids("a") == set()
    assert EndpointDrained("a", "a-1") in world.recording.events


async def test_each_request_is_confirmed_with_the_grace_and_the_last_one_counts(world: World) -> None:
    call, token = await world.register()
    unhealthy = endpoint_pb2.HEALTH_STATUS_UNHEALTHY
    await call.write(registry_pb2.RegisterRequest(endpoint=endpoint(health=unhealthy, weight=7)))
    confirmation = await call.read()
    assert isinstance(confirmation, registry_pb2.RegisterResponse)
    assert (confirmation.lease_token, confirmation.grace.ToMilliseconds()) == (token, 60_000)
    held = world.recording.services["a"]["a-1"]
    assert (held.health, held.weight) == (Health.UNHEALTHY, 7)


@pytest.mark.parametrize("lease_grace", [0.2])
async def test_a_cancelled_stream_leaves_the_endpoint_for_the_grace(world: World) -> None:
    call, _ = await world.register()
    call.cancel()
    mark = world.recording.mark()
    await world.recording.until(lambda: "a" not in world.recording.services)
    assert not [event for event in world.recording.since(mark) if isinstance(event, EndpointDrained)]


KILLED = """
import sys, time, grpc
from mesh.v1 import endpoint_pb2, registry_pb2, registry_pb2_grpc
stub = registry_pb2_grpc.RegistryServiceStub(grpc.insecure_channel(sys.argv[1]))
endpoint = endpoint_pb2.Endpoint(id="a-1", address="10.0.0.1", port=80)
def requests():
    yield registry_pb2.RegisterRequest(service="a", endpoint=endpoint)
    time.sleep(60)
next(stub.Register(requests()))
print("registered", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("lease_grace", [0.2])
async def test_a_killed_process_breaks_its_stream_and_does_not_deregister(world: World) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, world.address], stdout=subprocess.PIPE)
    try:
        await world.recording.until(lambda: world.recording.ids("a"))
    finally:
        process.kill()
        process.communicate()
    await world.recording.until(lambda: "a" not in world.recording.services)
    assert EndpointDrained("a", "a-1") not in world.recording.events


async def test_the_holder_comes_back_and_keeps_its_token(world: World) -> None:
    call, token = await world.register()
    call.cancel()
    _, again = await world.register(token=token)
    assert again == token
    assert world.recording.ids("a") == {"a-1"}


async def test_a_second_live_stream_for_an_id_is_refused(world: World) -> None:
    await world.register()
    call = world.stub.Register()
    await call.write(request())
    code, details = await refusal(call)
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert "a-1 of a is registered by another live stream" in details


async def test_the_token_takes_over_and_the_old_stream_is_told(world: World) -> None:
    old, token = await world.register()
    await world.register(token=token, port=81)
    code, details = await refusal(old)
    assert code is grpc.StatusCode.ABORTED
    assert "taken over" in details
    assert world.recording.services["a"]["a-1"].port == 81


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (registry_pb2.RegisterRequest(service="No!", endpoint=endpoint()), "service:"),
        (registry_pb2.RegisterRequest(endpoint=endpoint()), "service:"),
        (registry_pb2.RegisterRequest(service="a"), "endpoint:"),
        (request("bad id"), "endpoint.id:"),
        (request(address="0.0.0.0"), "endpoint.address:"),
        (request(port=0), "endpoint.port:"),
        (request(port=70_000), "endpoint.port:"),
        (request(weight=5_000), "endpoint.weight:"),
        (request(health=99), "endpoint.health:"),
    ],
)
async def test_a_bad_first_request_is_refused_with_the_path(
    world: World, bad: registry_pb2.RegisterRequest, path: str
) -> None:
    call = world.stub.Register()
    await call.write(bad)
    code, details = await refusal(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(path)
    assert world.recording.services == {}


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (registry_pb2.RegisterRequest(service="b", endpoint=endpoint()), "service:"),
        (registry_pb2.RegisterRequest(service="a"), "endpoint:"),
        (request("a-2"), "endpoint.id:"),
        (request(port=0), "endpoint.port:"),
    ],
)
async def test_a_bad_later_request_breaks_the_stream_and_leaves_the_endpoint_for_the_grace(
    world: World, bad: registry_pb2.RegisterRequest, path: str
) -> None:
    call, _ = await world.register()
    await call.write(bad)
    code, details = await refusal(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith(path)
    assert world.recording.ids("a") == {"a-1"}


async def test_a_stream_that_says_nothing_is_refused(world: World) -> None:
    call = world.stub.Register()
    await call.done_writing()
    code, details = await refusal(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "first request" in details


async def test_past_the_limit_registrations_are_refused(world: World) -> None:
    calls = [await world.register(f"a-{number}") for number in range(5)]
    call = world.stub.Register()
    await call.write(request("a-9"))
    code, details = await refusal(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "its limit" in details
    assert len(world.recording.ids("a")) == len(calls)


async def test_with_another_registry_registration_is_refused_and_drains_work() -> None:
    drains = Drains()
    server = grpc.aio.server()
    servicer = RegistryServicer(None, drains, "consul://localhost:8500")
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: registry_pb2_grpc.RegistryServiceAsyncStub = registry_pb2_grpc.RegistryServiceStub(channel)
            # Again and again: a refusal that crosses the first request would now and then arrive as INTERNAL.
            for _ in range(40):
                call = stub.Register()
                await call.write(request())
                code, details = await refusal(call)
                assert code is grpc.StatusCode.FAILED_PRECONDITION
                assert "consul://localhost:8500" in details
            assert (await stub.Drain(registry_pb2.DrainRequest(service="a", endpoint_id="a-1"))).complete
    finally:
        await server.stop(None)
    assert drains.seen == [("a", "a-1"), ("a", "a-1", 10.0)]


async def test_a_stopping_control_plane_ends_streams_and_keeps_leases(world: World) -> None:
    call, _ = await world.register()
    world.servicer.close()
    code, details = await refusal(call)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "come back" in details
    assert world.recording.ids("a") == {"a-1"}
    late = world.stub.Register()
    await late.write(request("a-2"))
    assert (await refusal(late))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_drain_marks_the_lease_and_says_who_is_pending(world: World) -> None:
    await world.register()
    world.drains.outcome = Outcome(7, [f"node-{number}" for number in range(150)])
    response = await world.stub.Drain(
        registry_pb2.DrainRequest(service="a", endpoint_id="a-1", timeout=Duration(nanos=500_000_000))
    )
    assert (response.complete, response.acknowledged, len(response.pending)) == (False, 7, 100)
    assert world.drains.seen == [("a", "a-1"), ("a", "a-1", 0.5)]
    assert world.recording.services["a"]["a-1"].health is Health.DRAINING


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (registry_pb2.DrainRequest(endpoint_id="a-1"), "service:"),
        (registry_pb2.DrainRequest(service="a"), "endpoint_id:"),
        (registry_pb2.DrainRequest(service="a", endpoint_id="a-1", timeout=Duration(seconds=301)), "timeout:"),
        (registry_pb2.DrainRequest(service="a", endpoint_id="a-1", timeout=Duration(seconds=-1)), "timeout:"),
    ],
)
async def test_a_bad_drain_is_refused_with_the_path(world: World, bad: registry_pb2.DrainRequest, path: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await world.stub.Drain(bad)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith(path)
    assert world.drains.seen == []


async def test_registrations_at_once_do_not_disturb_one_another(world: World) -> None:
    made = await asyncio.gather(*(world.register(f"a-{number}") for number in range(5)))
    assert len({token for _, token in made}) == 5
    assert world.recording.ids("a") == {f"a-{number}" for number in range(5)}
