"""Whom a drain waits for: those who may hold the endpoint, and edges that have not come back since a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import admin_pb2, registry_pb2

from control_plane.drain_wait import EDGES_BACK_WITHIN, DrainResult, DrainWait
from gateway.edge_client import RECONNECT as OF_GATEWAYS
from mesh_client.discovery import RECONNECT as OF_CLIENTS
from tests.control_plane.test_edges import Gateway
from tests.control_plane.worlds import BOUND, ENDPOINTS, World, running

POLICY = """
edge: edge
services:
  shop.v1.OrderService: {upstream: orders}
"""


class Stream:
    """One that may hold the endpoint until it has acknowledged."""

    def __init__(self, node_id: str, *, holds: bool = True) -> None:
        self.node_id = node_id
        self.holds = holds

    def may_hold(self, service: str, endpoint_id: str) -> bool:
        assert (service, endpoint_id) == ("orders", "1")
        return self.holds


class TestDrainWait:
    def test_nobody_who_holds_it_is_nobody_to_wait_for(self) -> None:
        drain = DrainWait("orders", "1", [Stream("a", holds=False)])
        assert drain.done.is_set()
        assert drain.result() == DrainResult(1, ())

    def test_everybody_who_holds_it_is_waited_for_and_named(self) -> None:
        first, second = Stream("b"), Stream("a")
        drain = DrainWait("orders", "1", [first, second])
        first.holds = False
        drain.look(first)
        assert not drain.done.is_set()
        assert drain.result() == DrainResult(1, ("a",))
        drain.forget(second)
        assert drain.done.is_set()
        assert drain.result() == DrainResult(1, ())

    def test_one_that_comes_with_an_old_version_after_all_others_were_done_is_waited_for(self) -> None:
        drain = DrainWait("orders", "1", [])
        late = Stream("late")
        drain.look(late)
        assert not drain.done.is_set()
        late.holds = False
        drain.look(late)
        assert drain.done.is_set()
        assert drain.result() == DrainResult(1, ())

    def test_edges_are_waited_for_until_they_are_expected_no_more(self) -> None:
        drain = DrainWait("orders", "1", [])
        drain.expect(["edge", "other"])
        assert not drain.done.is_set()
        assert drain.result() == DrainResult(0, ("edge edge", "edge other"))
        drain.expect(())
        assert drain.done.is_set()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A control plane that has just started and knows an edge, and an endpoint of orders."""
    async with running() as world:
        request = admin_pb2.ApplyPolicyRequest(document=POLICY, kind=admin_pb2.POLICY_KIND_EDGE)
        await world.admin.ApplyPolicy(request, timeout=BOUND)
        await world.source.lists("orders", "1", "2")
        yield world


async def drain(world: World, timeout: float = BOUND) -> registry_pb2.DrainResponse:
    duration = Duration()
    duration.FromMilliseconds(int(timeout * 1000))
    return await world.registry.Drain(registry_pb2.DrainRequest(service="orders", endpoint_id="1", timeout=duration))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(BOUND):
        while not condition():
            await asyncio.sleep(0)


class TestEdgesThatHaveNotComeBack:
    async def test_a_drain_names_the_edge_that_did_not_come(self, world: World) -> None:
        response = await drain(world, timeout=0.05)
        assert (response.complete, list(response.pending)) == (False, ["edge edge"])

    async def test_a_drain_waits_until_the_edge_is_back_and_has_let_go(self, world: World) -> None:
        draining = asyncio.ensure_future(drain(world))
        async with world.client("gateway", "edge") as gateway, world.client("other", "shop") as other:
            await other.subscribe("orders", types=(ENDPOINTS,))
            await other.follow("orders", "2")
            assert not draining.done()
            await gateway.subscribe("orders", types=(ENDPOINTS,))
            await gateway.follow("orders", "2")
            response = await draining
        assert (response.complete, list(response.pending)) == (True, [])

    async def test_one_that_came_and_left_is_not_waited_for(self, world: World) -> None:
        async with world.client("gateway", "edge") as gateway:
            await gateway.subscribe("orders", types=(ENDPOINTS,))
            await gateway.follow("orders", "1", "2")
        await until(lambda: not world.plane._hub.clients())
        assert (await drain(world)).complete

    async def test_as_many_as_follow_the_policy_are_waited_for(self, world: World) -> None:
        async with (
            Gateway(world.channel, id="edge-1") as first,
            Gateway(world.channel, id="edge-2") as second,
            world.client("edge-1", "edge") as gateway,
            world.client("edge-2", "edge") as late,
        ):
            assert (await first.read()).stored
            assert (await second.read()).stored
            await gateway.subscribe("orders", types=(ENDPOINTS,))
            await gateway.follow("orders", "1", "2")
            draining = asyncio.ensure_future(drain(world))
            await gateway.follow("orders", "2")
            await until(lambda: [wait.result().pending for wait in world.plane._hub._drains] == [("edge edge",)])
            await late.subscribe("orders", types=(ENDPOINTS,))
            await late.follow("orders", "2")
            assert (await draining).complete

    async def test_services_that_no_edge_exposes_are_drained_at_once(self, world: World) -> None:
        request = registry_pb2.DrainRequest(service="payments", endpoint_id="1")
        assert (await world.registry.Drain(request, timeout=BOUND)).complete

    async def test_a_control_plane_that_is_no_longer_young_waits_for_nobody_who_is_not_there(
        self, world: World
    ) -> None:
        loop = asyncio.get_running_loop()
        world.plane._hub._edges_back_at = loop.time() + 0.05
        assert (await drain(world)).complete
        assert loop.time() >= world.plane._hub._edges_back_at
        # And it remembers nobody who comes.
        async with world.client("gateway", "edge") as gateway:
            await gateway.subscribe("orders", types=(ENDPOINTS,))
            await gateway.follow("orders", "2")
            assert not world.plane._hub._came
            assert (await drain(world)).complete

    def test_they_are_waited_for_longer_than_their_pauses_last(self) -> None:
        assert max(OF_GATEWAYS.max, OF_CLIENTS.max) < EDGES_BACK_WITHIN
