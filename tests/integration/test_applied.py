"""Clients that hand endpoints on acknowledge them once they are in force elsewhere, and drains wait for that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import registry_pb2, registry_pb2_grpc

from mesh_client import connect
from mesh_client.core.model import Endpoint
from mesh_client.core.store import EndpointsResource
from mesh_client.mesh import Mesh
from mesh_client.testing import InMemoryControlPlane
from tests.integration.mesh_rig import PATIENCE, Rig, open_rig, until
from tests.ports import held_address


class Gate:
    """Something that endpoints are handed on to: slow as long as it is closed."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.waiting: list[frozenset[str]] = []
        self.seen: list[EndpointsResource | None] = []

    async def applied(self, services: frozenset[str]) -> None:
        self.waiting.append(services)
        await self.open.wait()

    def ids(self) -> list[str]:
        """Of the endpoints that it was told of last."""
        resource = self.seen[-1] if self.seen else None
        return [] if resource is None else [endpoint.id for endpoint in resource.endpoints]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as made:
        yield made


async def follower(rig: Rig, gate: Gate, *ids: str) -> Mesh:
    """A client with the gate, which is open until these endpoints have been acknowledged."""
    mesh = await rig.mesh(applied=gate.applied, node_id="edge-1")
    gate.open.set()
    mesh.watch_endpoints("orders", gate.seen.append)
    await until(mesh, lambda: gate.ids() == list(ids))
    await rig_until(lambda: acknowledged(rig) == {gate_version(gate)})
    gate.open.clear()
    gate.waiting.clear()
    return mesh


def gate_version(gate: Gate) -> str:
    resource = gate.seen[-1]
    assert resource is not None
    return resource.version


def acknowledged(rig: Rig) -> set[str]:
    """The versions of endpoints that clients have acknowledged."""
    return {
        state.acknowledged_version
        for client in rig.plane._hub.clients()
        for state in client.subscriptions
        if state.kind.value == "endpoints"
    }


async def rig_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def drain(rig: Rig, endpoint_id: str, timeout: float = PATIENCE) -> asyncio.Future[registry_pb2.DrainResponse]:
    duration = Duration()
    duration.FromMilliseconds(int(timeout * 1_000))
    request = registry_pb2.DrainRequest(service="orders", endpoint_id=endpoint_id, timeout=duration)

    async def call() -> registry_pb2.DrainResponse:
        return await registry_pb2_grpc.RegistryServiceStub(rig.control).Drain(request)

    return asyncio.ensure_future(call())


async def test_a_drain_returns_only_after_the_endpoints_are_in_force_elsewhere(rig: Rig) -> None:
    await rig.register("orders", "a", 1)
    await rig.register("orders", "b", 2)
    gate = Gate()
    mesh = await follower(rig, gate, "a", "b")
    draining = drain(rig, "a")
    await until(mesh, lambda: gate.ids() == ["b"])
    await rig_until(lambda: gate.waiting == [frozenset({"orders"})])
    # The round trip of another call: an acknowledgement sent too early would have arrived before it.
    await drain(rig, "never-there", timeout=0.0)
    assert not draining.done()
    gate.open.set()
    response = await draining
    assert (response.complete, response.acknowledged, list(response.pending)) == (True, 1, [])


async def test_a_drain_names_who_has_not_applied_it_at_its_deadline_and_further_changes_wait_and_join(rig: Rig) -> None:
    for number, name in enumerate("abc"):
        await rig.register("orders", name, number + 1)
    gate = Gate()
    mesh = await follower(rig, gate, "a", "b", "c")
    for name in "ab":
        response = await drain(rig, name, timeout=0.05)
        assert (response.complete, list(response.pending)) == (False, ["edge-1"])
        await until(mesh, lambda: gate.ids() == ["b", "c"])
    assert mesh.state().in_sync
    gate.open.set()
    await until(mesh, lambda: gate.ids() == ["c"])
    assert (await drain(rig, "a")).complete
    assert gate.waiting == [frozenset({"orders"})] * 2


async def test_a_drain_does_not_count_what_was_received_on_a_stream_before_and_is_not_in_force(rig: Rig) -> None:
    await rig.register("orders", "a", 1)
    await rig.register("orders", "b", 2)
    gate = Gate()
    mesh = await follower(rig, gate, "a", "b")
    await drain(rig, "a", timeout=0.0)
    await until(mesh, lambda: gate.ids() == ["b"])
    rig.plane._hub.close()  # as at the end of a connection's age
    await until(mesh, lambda: not mesh.state().in_sync)
    await until(mesh, lambda: mesh.state().in_sync)
    assert (await drain(rig, "a", timeout=0.05)).pending == ["edge-1"]
    gate.open.set()
    assert (await drain(rig, "a")).complete


async def test_a_drain_waits_for_whoever_has_just_started_and_may_go_by_what_an_earlier_process_has_applied(
    rig: Rig,
) -> None:
    await rig.register("orders", "a", 1)
    gate = Gate()
    await drain(rig, "a", timeout=0.0)
    mesh = await rig.mesh(applied=gate.applied, node_id="edge-1")
    mesh.watch_endpoints("orders", gate.seen.append)
    await until(mesh, lambda: bool(gate.seen))
    assert (await drain(rig, "a", timeout=0.05)).pending == ["edge-1"]
    gate.open.set()
    assert (await drain(rig, "a")).complete


async def test_what_fails_to_apply_is_not_acknowledged_and_nothing_else_suffers(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.register("orders", "a", 1)

    async def fails(services: frozenset[str]) -> None:
        raise OSError("the disk is full")

    mesh = await rig.mesh(applied=fails, node_id="edge-1")
    seen: list[EndpointsResource | None] = []
    mesh.watch_endpoints("orders", seen.append)
    await mesh.synced()
    await rig_until(lambda: "the endpoints of orders failed" in caplog.text)
    assert (await drain(rig, "a", timeout=0.0)).pending == ["edge-1"]
    assert mesh.state().in_sync


async def test_endpoints_are_watched_until_their_service_is_unknown() -> None:
    with held_address() as address:
        async with InMemoryControlPlane(address) as plane:
            a, b = Endpoint("a", "127.0.0.1", 1), Endpoint("b", "127.0.0.1", 2)
            plane.set_endpoints("orders", a)
            seen: list[tuple[Endpoint, ...] | None] = []

            def watch(resource: EndpointsResource | None) -> None:
                seen.append(None if resource is None else resource.endpoints)

            async with connect(plane.address, cache_dir="", insecure=True) as mesh:
                end = mesh.watch_endpoints("orders", watch)
                await until(mesh, lambda: seen == [(a,)])
                mesh.watch_endpoints("orders", watch)()
                assert seen == [(a,), (a,)]
                plane.set_endpoints("orders", a, b)
                await until(mesh, lambda: seen[2:] == [(a, b)])
                plane.remove("orders")
                await until(mesh, lambda: seen[3:] == [None])
                end()
                plane.set_endpoints("orders", b)
                await plane.acknowledged("orders")
                assert len(seen) == 4
