"""Clients and control planes: loss, return, several addresses, cold start, answers that make no sense."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import grpc
import grpc.aio
import pytest
from mesh.v1 import discovery_pb2, discovery_pb2_grpc, resource_pb2

import mesh_client
from mesh_client import discovery
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.model import Endpoint
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.store import Resolution
from mesh_client.mesh import Mesh
from mesh_client.testing import InMemoryControlPlane
from tests.ports import held_address

A = Endpoint("a", "127.0.0.1", 1)


@pytest.fixture
async def control_plane() -> AsyncIterator[InMemoryControlPlane]:
    with held_address() as address:  # a test stops it and starts it again
        async with InMemoryControlPlane(address) as made:
            yield made


async def until(mesh: Mesh, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await mesh.changed()


def resolution(mesh: Mesh) -> Resolution:
    return mesh.state().services[0].resolution


async def echo(mesh: Mesh, wait_for_ready: bool | None = None, timeout: float | None = None) -> bytes:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = mesh.channel("orders").unary_unary("/test.Echo/Echo")
    return await call(b"hello", wait_for_ready=wait_for_ready, timeout=timeout)


@pytest.fixture
async def orders(control_plane: InMemoryControlPlane) -> AsyncIterator[Endpoint]:
    """A plain gRPC server that echoes, published as the one endpoint of orders."""

    class Echo(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            async def answer(request: bytes, context: object) -> bytes:
                return request

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    endpoint = Endpoint("a", "127.0.0.1", port)
    control_plane.set_endpoints("orders", endpoint)
    yield endpoint
    await server.stop(None)


async def test_calls_go_on_while_the_control_plane_is_away_and_its_news_arrive_when_it_is_back(
    control_plane: InMemoryControlPlane, orders: Endpoint
) -> None:
    async with mesh_client.connect(control_plane.address, cache_dir="") as mesh:
        assert await echo(mesh) == b"hello"
        assert mesh.state().age == 0.0
        await control_plane.stop()
        await until(mesh, lambda: not mesh.state().in_sync)
        age = mesh.state().age
        assert age is not None
        assert age > 0.0
        assert await echo(mesh) == b"hello"
        control_plane.set_policy(ServicePolicy(service="orders", timeout=7.0))
        version = mesh.state().services[0].policy_version
        await control_plane.start()
        await until(mesh, lambda: mesh.state().services[0].policy_version != version)
        await mesh.synced()


async def test_the_next_address_is_used_when_one_does_not_answer(
    control_plane: InMemoryControlPlane, orders: Endpoint, nobody: str
) -> None:
    for seed in range(4):
        async with mesh_client.connect([nobody, control_plane.address], cache_dir="", rng=Random(seed)) as mesh:
            assert await echo(mesh) == b"hello"
            assert control_plane.address in mesh.state().control_plane


async def test_a_cold_start_works_from_disk_and_what_is_current_wins_later(
    control_plane: InMemoryControlPlane, orders: Endpoint, tmp_path: Path
) -> None:
    async with mesh_client.connect(control_plane.address, cache_dir=tmp_path) as mesh:
        assert await echo(mesh) == b"hello"
    await control_plane.stop()
    async with mesh_client.connect(control_plane.address, cache_dir=tmp_path) as mesh:
        assert await echo(mesh) == b"hello"
        assert mesh.state().age is None
        assert not mesh.state().in_sync
        control_plane.set_endpoints("orders", orders, Endpoint("b", "127.0.0.1", orders.port))
        await control_plane.start()
        await until(mesh, lambda: len(mesh.state().services[0].endpoints) == 2)


async def test_what_is_on_disk_does_not_count_while_a_control_plane_answers(
    control_plane: InMemoryControlPlane, tmp_path: Path
) -> None:
    control_plane.set_endpoints("orders", A)
    async with mesh_client.connect(control_plane.address, cache_dir=tmp_path) as mesh:
        mesh.channel("orders")
        await mesh.synced()
    control_plane.remove("orders")
    async with mesh_client.connect(control_plane.address, cache_dir=tmp_path) as mesh:
        with pytest.raises(mesh_client.MeshRpcError, match="does not know"):
            await echo(mesh)
    await control_plane.stop()
    async with mesh_client.connect(control_plane.address, cache_dir=tmp_path) as mesh:
        with pytest.raises(mesh_client.MeshRpcError, match="never reached"):
            await echo(mesh)


async def test_a_control_plane_that_was_never_reached_is_named_with_the_reason(nobody: str) -> None:
    async with mesh_client.connect(nobody, cache_dir="") as mesh:
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await echo(mesh)
    assert caught.value.mesh.reason is mesh_client.Reason.CONTROL_PLANE_NEVER_REACHED
    assert nobody in str(caught.value)
    assert "MESH_CONTROL_PLANE" in str(caught.value)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_call_that_waits_for_ready_waits_for_the_control_plane(
    control_plane: InMemoryControlPlane, orders: Endpoint
) -> None:
    await control_plane.stop()
    async with mesh_client.connect(control_plane.address, cache_dir="") as mesh:
        waiting = asyncio.ensure_future(echo(mesh, wait_for_ready=True))
        await until(mesh, lambda: "unreachable" in mesh.state().control_plane)
        assert not waiting.done()
        await control_plane.start()
        assert await waiting == b"hello"
        control_plane.remove("orders")
        await control_plane.acknowledged("orders")
        with pytest.raises(mesh_client.MeshRpcError, match="DEADLINE_EXCEEDED"):
            await echo(mesh, wait_for_ready=True, timeout=0.05)


class Scripted(discovery_pb2_grpc.DiscoveryServiceServicer):
    """A control plane that says odd things: each stream gets the next list of responses, then silence."""

    def __init__(self, *scripts: list[discovery_pb2.DeltaResourcesResponse] | None) -> None:
        self.scripts = iter(scripts)
        self.requests: list[discovery_pb2.DeltaResourcesRequest] = []

    async def DeltaResources(
        self, request_iterator: AsyncIterator[discovery_pb2.DeltaResourcesRequest], context: object
    ) -> AsyncIterator[discovery_pb2.DeltaResourcesResponse]:
        script = next(self.scripts, [])
        if script is None:
            return
        for response in script:
            yield response
        async for request in request_iterator:
            self.requests.append(request)


async def serve(servicer: Scripted) -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server()
    discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def test_a_control_plane_that_accepts_and_says_nothing_is_left(
    control_plane: InMemoryControlPlane,
    orders: Endpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(discovery, "FIRST_RESPONSE_TIMEOUT", 0.2)
    server, address = await serve(Scripted())
    for seed in range(3):
        async with mesh_client.connect([address, control_plane.address], cache_dir="", rng=Random(seed)) as mesh:
            assert await echo(mesh) == b"hello"
    assert "no response within" in caplog.text
    await server.stop(None)


async def test_calls_fail_in_time_when_the_only_control_plane_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_client.resolver.RESOLUTION_TIMEOUT", 0.2)
    server, address = await serve(Scripted())
    async with mesh_client.connect(address, cache_dir="") as mesh:
        with pytest.raises(mesh_client.MeshRpcError, match="never reached"):
            await echo(mesh)
    await server.stop(None)


async def test_a_stream_that_ends_at_once_and_one_of_another_protocol_are_lost_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policies = discovery_pb2.DeltaResourcesResponse(type=resource_pb2.RESOURCE_TYPE_SERVICE_POLICY, nonce="1")
    endpoints = discovery_pb2.DeltaResourcesResponse(
        type=resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS, nonce="2", removed=["orders"]
    )
    server, address = await serve(
        Scripted(None, [discovery_pb2.DeltaResourcesResponse(nonce="x")], [policies, endpoints])
    )
    async with mesh_client.connect(address, cache_dir="") as mesh:
        mesh.channel("orders")
        await mesh.synced()
        assert resolution(mesh) is Resolution.UNKNOWN
    assert "it speaks another protocol" in caplog.text
    await server.stop(None)


async def test_a_bad_resource_is_rejected_by_name_and_nobody_else_suffers(caplog: pytest.LogCaptureFixture) -> None:
    bad = resource_pb2.Resource(name="orders", version="p1")
    bad.policy.service = "orders"
    bad.policy.retry.max_attempts = 1000
    servicer = Scripted(
        [
            discovery_pb2.DeltaResourcesResponse(
                type=resource_pb2.RESOURCE_TYPE_SERVICE_POLICY, nonce="1", resources=[bad]
            ),
            discovery_pb2.DeltaResourcesResponse(type=resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS, nonce="2"),
        ]
    )
    server, address = await serve(servicer)
    with caplog.at_level(logging.WARNING):
        async with mesh_client.connect(address, cache_dir="") as mesh:
            mesh.channel("orders")
            await until(mesh, lambda: mesh.state().in_sync)
            async with asyncio.timeout(10):
                while not any(request.response_nonce == "2" for request in servicer.requests):
                    mesh.channel(f"s{len(servicer.requests)}")
                    await asyncio.sleep(0)
    await server.stop(None)
    (rejection,) = [request for request in servicer.requests if request.response_nonce == "1"]
    assert "retry.max_attempts" in rejection.error.resources["orders"]
    assert "rejected what" in caplog.text


async def test_policies_are_watched(control_plane: InMemoryControlPlane) -> None:
    control_plane.set_policy(ServicePolicy(service="orders", timeout=1.0))
    seen: list[float | None] = []
    async with mesh_client.connect(control_plane.address, cache_dir="") as mesh:
        end = mesh.watch_policy("orders", lambda policy: seen.append(policy.timeout))
        await until(mesh, lambda: bool(seen))
        mesh.watch_policy("orders", lambda policy: seen.append(policy.timeout))()
        assert seen == [1.0, 1.0]
        control_plane.set_policy(ServicePolicy(service="orders", timeout=2.0))
        await until(mesh, lambda: len(seen) == 3)
        end()
        control_plane.set_policy(ServicePolicy(service="orders", timeout=3.0))
        await control_plane.acknowledged("orders")
        assert seen == [1.0, 1.0, 2.0]


async def test_misuse_is_refused_in_words(control_plane: InMemoryControlPlane) -> None:
    mesh = mesh_client.connect(control_plane.address, cache_dir="")
    with pytest.raises(ConfigError, match="enter the mesh client first"):
        mesh.channel("orders")
    async with mesh:
        with pytest.raises(InvalidValueError, match="DNS label"):
            mesh.channel("Orders")
        with pytest.raises(ConfigError, match="entered already"):
            await mesh.__aenter__()


@pytest.mark.parametrize("address", ["nowhere", "host:0", "host:99999", ":1"])
def test_a_bad_address_is_refused_in_words(address: str) -> None:
    with pytest.raises(ConfigError, match="control_plane"):
        mesh_client.connect(address)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MESH_SERVICE", "orders")
    monkeypatch.setenv("MESH_ZONE", "eu-1")
    monkeypatch.setenv("MESH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MESH_CONTROL_PLANE", "127.0.0.1:1,127.0.0.1:2")
    mesh = mesh_client.connect()
    assert mesh.service == "orders"
    assert mesh.node_id.startswith("orders-")
    monkeypatch.setenv("MESH_ZONE", "no zone!")
    with pytest.raises(InvalidValueError, match="locality.zone"):
        mesh_client.connect()
    monkeypatch.setenv("MESH_SERVICE", "No Service")
    with pytest.raises(InvalidValueError, match="service"):
        mesh_client.connect()


async def test_a_connection_that_the_control_plane_ends_for_its_age_is_no_trouble(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ages = (("grpc.max_connection_age_ms", 1_000), ("grpc.max_connection_age_grace_ms", 100))
    plane, server = InMemoryControlPlane(), grpc.aio.server(options=ages)
    plane.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    plane.set_endpoints("orders", A)
    async with mesh_client.connect(f"127.0.0.1:{port}", cache_dir="", insecure=True) as mesh:
        mesh.channel("orders")
        await mesh.synced()
        caplog.clear()
        for _ in range(2):
            await until(mesh, lambda: "reconnecting: UNAVAILABLE: max connection age" in mesh.state().control_plane)
            await mesh.synced()
        assert mesh.state().services[0].endpoints
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
    await server.stop(None)
