"""The discovery service on real sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import MappingProxyType

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import admin_pb2, discovery_pb2, endpoint_pb2, registry_pb2

from control_plane.discovery import StreamHub
from control_plane.events import EndpointDrained, EndpointUndrained, SourceConnected
from control_plane.options import ControlPlaneOptions
from control_plane.policies import PolicyBook
from control_plane.publisher import Debounce, Publisher
from control_plane.snapshot import build_snapshot
from mesh_client.core.model import Endpoint
from mesh_client.core.policy import ServicePolicy
from tests.control_plane.worlds import BOUND, ENDPOINTS, POLICY, Client, HandSource, Request, World, running


@asynccontextmanager
async def hub_alone(endpoint: Endpoint) -> AsyncIterator[tuple[StreamHub, grpc.aio.Server, str]]:
    """A hub without a control plane around it, its server and address."""
    book = PolicyBook(ServicePolicy)
    publisher = Publisher(
        lambda previous, now: (build_snapshot({"orders": (endpoint,)}, book.policy, previous), None), Debounce()
    )
    hub = StreamHub(publisher, lambda event: None, "alone")
    publisher.open()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((hub.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield hub, server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


class TestStreaming:
    async def test_a_service_arrives_policy_first_and_then_its_changes_as_deltas(self) -> None:
        async with running() as world, world.client() as client:
            ids = [f"{number:02}" for number in range(30)]
            await world.source.lists("orders", *ids)
            await client.subscribe("orders")
            policy, endpoints = await client.read(), await client.read()
            assert (policy.type, endpoints.type) == (POLICY, ENDPOINTS)
            assert policy.resources[0].policy.retry.max_attempts == 3
            assert [each.id for each in endpoints.resources[0].endpoints.endpoints] == ids
            assert endpoints.control_plane.startswith("control-plane-")
            await client.acknowledge(policy)
            await client.acknowledge(endpoints)
            await world.source.lists("orders", *ids[1:], "new")
            delta = (await client.next()).resources[0]
            assert delta.endpoints_delta.base_version == endpoints.resources[0].version
            assert list(delta.endpoints_delta.removed_ids) == ["00"]
            assert [each.id for each in delta.endpoints_delta.upserts] == ["new"]

    async def test_unknown_and_empty_are_different(self) -> None:
        async with running() as world, world.client() as client:
            await world.source.lists("empty")
            await client.subscribe("empty", "unknown", types=(ENDPOINTS,))
            response = await client.read()
            while not response.resources:
                await client.acknowledge(response)
                response = await client.read()
            assert response.resources[0].HasField("endpoints")
            assert response.resources[0].name == "empty"

    async def test_nobody_is_told_that_a_service_is_unknown_before_the_registry_was_read(self) -> None:
        source = HandSource(connected=False)
        async with running(source=source) as world, world.client() as client:
            await source.lists("orders", "1")
            await client.subscribe("orders", "payments")
            await world.registry.Drain(registry_pb2.DrainRequest(service="orders", endpoint_id="9"))
            read = asyncio.create_task(client.read())
            await source.lists("payments", "1")
            await source.emit(SourceConnected(source.name))
            response = await read
            assert {resource.name for resource in response.resources} == {"orders", "payments"}
            assert not response.removed

    async def test_a_burst_reaches_a_slow_client_as_its_latest_state(self) -> None:
        async with running() as world, world.client("slow") as slow, world.client("quick") as quick:
            await world.source.lists("orders", "0")
            await slow.subscribe("orders", types=(ENDPOINTS,))
            await quick.subscribe("orders", types=(ENDPOINTS,))
            unanswered = await slow.read()
            for number in range(1, 41):
                await world.source.lists("orders", str(number))
                await quick.follow("orders", str(number))
            await slow.acknowledge(unanswered)
            latest = await slow.read()
            assert [each.id for each in latest.resources[0].endpoints.endpoints] == ["40"]
            assert int(latest.nonce) == int(unanswered.nonce) + 1

    async def test_a_client_that_does_not_read_delays_nobody(self) -> None:
        async with running() as world, world.client("stuck") as stuck, world.client() as client:
            # More than the windows of the connection hold.
            filler = [f"{number:04}" for number in range(3_000)]
            await stuck.subscribe(*(f"large-{number}" for number in range(20)), types=(ENDPOINTS,))
            for number in range(20):
                await world.source.lists(f"large-{number}", *filler, metadata="x" * 250)
            await client.subscribe("orders", types=(ENDPOINTS,))
            for number in range(10):
                await world.source.lists("orders", str(number))
                await client.follow("orders", str(number))

    async def test_a_client_that_never_acknowledges_is_seen_in_the_status(self) -> None:
        async with running() as world, world.client("mute") as mute, world.client() as client:
            await world.source.lists("orders", "1")
            await mute.subscribe("orders", types=(ENDPOINTS,))
            await mute.read()
            await client.subscribe("orders", types=(ENDPOINTS,))
            for number in range(20):
                await world.source.lists("orders", str(number))
                await client.follow("orders", str(number))
            async with asyncio.timeout(BOUND):
                while True:  # what the other one has acknowledged last may be on its way
                    status = await world.admin.GetStatus(admin_pb2.GetStatusRequest())
                    seen = {each.node_id: each.subscriptions[0] for each in status.clients}
                    if seen["client"].acknowledged_version == seen["client"].current_version != "":
                        break
            assert seen["mute"].acknowledged_version == ""
            assert not seen["mute"].HasField("acknowledged_ago")

    async def test_a_client_that_goes_is_forgotten(self) -> None:
        async with running() as world:
            async with world.client() as client:
                await client.subscribe("orders")
                await client.read()
            async with asyncio.timeout(BOUND):
                while (await world.admin.GetStatus(admin_pb2.GetStatusRequest())).clients:
                    await asyncio.sleep(0)

    async def test_a_client_that_half_closes_ends_its_stream(self) -> None:
        async with running() as world, world.client() as client:
            await client.subscribe("orders")
            await client.call.done_writing()
            assert await client.status() == (grpc.StatusCode.OK, "")

    async def test_unsubscribing_stops_the_changes(self) -> None:
        async with running() as world, world.client() as client:
            await world.source.lists("orders", "1")
            await client.subscribe("orders", types=(ENDPOINTS,))
            await client.follow("orders", "1")
            await client.send(Request(type=ENDPOINTS, unsubscribe=["orders"], subscribe=["payments"]))
            assert list((await client.next()).removed) == ["payments"]
            await world.source.lists("orders", "2")
            await world.source.lists("payments", "1")
            await client.follow("payments", "1")
            assert client.held["orders"].keys() == {"1"}

    async def test_a_stopping_control_plane_sends_its_clients_elsewhere(self) -> None:
        async with running() as world, world.client() as client:
            await client.subscribe("orders")
            await client.read()
            await world.plane.stop()
            code, details = await client.status()
            assert code is grpc.StatusCode.UNAVAILABLE
            assert "use another" in details


class TestRefusals:
    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (Request(type=ENDPOINTS, subscribe=["orders"]), "node"),
            (Request(node=discovery_pb2.Node(id="x")), "type"),
            (Request(node=discovery_pb2.Node(id="x"), type=POLICY, subscribe=["Not Good"]), "subscribe[0]"),
            (
                Request(node=discovery_pb2.Node(id="x", locality=endpoint_pb2.Locality(zone="not good")), type=POLICY),
                "node.locality.zone",
            ),
            (
                Request(node=discovery_pb2.Node(id="x"), type=POLICY, error=discovery_pb2.Rejection(message="no")),
                "error",
            ),
        ],
    )
    async def test_an_illegal_request_ends_its_own_stream_and_names_the_field(
        self, request_: Request, field: str
    ) -> None:
        async with running() as world, world.client() as good, world.client() as bad:
            await good.subscribe("orders")
            await good.next()
            await bad.call.write(request_)
            code, details = await bad.status()
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details.startswith(f"{field}: ")
            await world.source.lists("orders", "1")
            await good.follow("orders", "1")

    async def test_bytes_that_are_no_message_are_refused(self) -> None:
        async with running() as world:
            method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = world.channel.stream_stream(
                "/mesh.v1.DiscoveryService/DeltaResources"
            )
            call = method()
            await call.write(b"\xff\xff\xff")
            async with asyncio.timeout(BOUND):
                assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "request: is not a DeltaResourcesRequest" in await call.details()

    async def test_a_flood_of_subscriptions_is_refused_and_disturbs_nobody(self) -> None:
        async with running() as world, world.client() as good, world.client() as bad:
            await good.subscribe("orders")
            await good.next()
            await bad.subscribe(*(f"service-{number}" for number in range(10_001)), types=(POLICY,))
            code, details = await bad.status()
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "10001 subscriptions are more than the 10000" in details
            await world.source.lists("orders", "1")
            await good.follow("orders", "1")

    async def test_streams_past_the_limit_are_refused_by_its_name_until_one_ends(self) -> None:
        options = ControlPlaneOptions(insecure=True, max_streams=1)
        async with running(options) as world:
            async with world.client() as first:
                await first.subscribe("orders")
                await first.read()
                async with world.client() as second:
                    code, details = await second.status()
                    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                    assert "max_streams" in details
                assert len((await world.admin.GetStatus(admin_pb2.GetStatusRequest())).clients) == 1
            async with asyncio.timeout(BOUND):
                while (await world.admin.GetStatus(admin_pb2.GetStatusRequest())).clients:
                    await asyncio.sleep(0)
            async with world.client() as third:
                await third.subscribe("orders")
                await third.read()

    async def test_a_stream_whose_response_cannot_be_made_ends(self, caplog: pytest.LogCaptureFixture) -> None:
        """A defect of the control plane must not leave a stream open and silent."""
        broken = Endpoint("1", "127.0.0.1", 1)
        object.__setattr__(broken, "metadata", MappingProxyType({"half a pair": "\ud800"}))
        async with hub_alone(broken) as (hub, _, address):
            async with Client(address, "client") as client:
                with caplog.at_level(logging.CRITICAL + 1, "control_plane"):
                    await client.subscribe("orders", types=(ENDPOINTS,))
                    code, _ = await client.status()
                assert code is grpc.StatusCode.INTERNAL
            # The status may reach the client before the hub's task has run to its end.
            async with asyncio.timeout(BOUND):
                while hub.clients():
                    await asyncio.sleep(0)

    async def test_a_server_that_stops_at_once_takes_its_streams_along(self) -> None:
        async with hub_alone(Endpoint("1", "127.0.0.1", 1)) as (hub, server, address), Client(address, "c") as client:
            await client.subscribe("orders", types=(ENDPOINTS,))
            await client.follow("orders", "1")
            await server.stop(None)
            code, _ = await client.status()
            assert code is not grpc.StatusCode.OK
            async with asyncio.timeout(BOUND):
                while hub.clients():
                    await asyncio.sleep(0)


class TestDrains:
    @staticmethod
    async def subscriber(world: World, client: Client) -> None:
        await client.subscribe("orders", types=(ENDPOINTS,))
        await client.follow("orders", "1", "2")

    @staticmethod
    def drain(world: World, timeout: float = BOUND) -> asyncio.Future[registry_pb2.DrainResponse]:
        duration = Duration()
        duration.FromMilliseconds(int(timeout * 1000))
        request = registry_pb2.DrainRequest(service="orders", endpoint_id="1", timeout=duration)

        async def call() -> registry_pb2.DrainResponse:
            return await world.registry.Drain(request)

        return asyncio.ensure_future(call())

    async def test_a_drain_returns_when_every_subscriber_has_acknowledged(self) -> None:
        async with (
            running() as world,
            world.client("a") as first,
            world.client("b") as second,
            world.client("other") as other,
        ):
            await world.source.lists("orders", "1", "2")
            await self.subscriber(world, first)
            await self.subscriber(world, second)
            await other.subscribe("payments", types=(ENDPOINTS,))
            await other.next()
            drain = self.drain(world)
            await first.follow("orders", "2")
            late = await second.read()
            await world.source.lists("payments")
            await other.follow("payments")
            assert not drain.done()
            await second.acknowledge(late)
            response = await drain
            assert (response.complete, response.acknowledged, list(response.pending)) == (True, 2, [])

    async def test_a_drain_names_those_who_have_not_acknowledged_in_time(self) -> None:
        async with running() as world, world.client("a") as first, world.client("hung") as hung:
            await world.source.lists("orders", "1", "2")
            await self.subscriber(world, first)
            await self.subscriber(world, hung)
            response = await self.drain(world, timeout=0.0)
            assert (response.complete, response.acknowledged, set(response.pending)) == (False, 0, {"a", "hung"})
            await first.follow("orders", "2")
            while response.pending != ["hung"]:
                response = await self.drain(world, timeout=0.05)
            assert (response.complete, response.acknowledged) == (False, 1)

    async def test_a_subscriber_that_disconnects_is_not_waited_for(self) -> None:
        async with running() as world:
            await world.source.lists("orders", "1", "2")
            async with world.client("a") as client:
                await self.subscriber(world, client)
                drain = self.drain(world)
                await client.read()
            response = await drain
            assert (response.complete, response.acknowledged) == (True, 0)

    async def test_who_comes_back_during_the_drain_with_an_old_version_is_waited_for(self) -> None:
        async with running() as world, world.client("a") as first, world.client("back") as back:
            await world.source.lists("orders", "1", "2")
            await self.subscriber(world, first)
            drain = self.drain(world)
            await first.read()
            await back.send(Request(type=ENDPOINTS, subscribe=["orders"], held_versions={"orders": "old"}))
            unanswered = await back.read()
            await first.__aexit__(None, None, None)
            await world.source.lists("payments")
            assert not drain.done()
            await back.acknowledge(unanswered)
            response = await drain
            assert (response.complete, response.acknowledged) == (True, 1)

    async def test_who_comes_back_with_the_current_version_is_not_waited_for(self) -> None:
        async with running() as world, world.client("a") as first, world.client("hung") as hung:
            await world.source.lists("orders", "1", "2")
            await self.subscriber(world, first)
            await self.subscriber(world, hung)
            drain = self.drain(world)
            version = (await first.next()).resources[0].version
            async with world.client("back") as back:
                await back.send(Request(type=ENDPOINTS, subscribe=["orders"], held_versions={"orders": version}))
                await back.next()
                await hung.follow("orders", "2")
                response = await drain
                assert (response.complete, response.acknowledged) == (True, 3)

    async def test_a_drain_without_subscribers_returns_at_once_and_lasts(self) -> None:
        async with running() as world, world.client() as client:
            await world.source.lists("orders", "1", "2")
            response = await self.drain(world)
            assert (response.complete, response.acknowledged) == (True, 0)
            await client.subscribe("orders", types=(ENDPOINTS,))
            await client.follow("orders", "2")
            await world.source.lists("orders", "1", "2", "3")
            await client.follow("orders", "2", "3")

    async def test_a_drain_of_what_nobody_knows_is_complete(self) -> None:
        async with running() as world:
            response = await self.drain(world)
            assert response.complete

    async def test_the_hub_tells_who_was_drained_also_in_process(self) -> None:
        events: list[EndpointDrained | EndpointUndrained] = []
        publisher = Publisher(lambda previous, now: (previous, None), Debounce())
        publisher.open()
        hub = StreamHub(publisher, events.append, "test")
        hub.drain("orders", "1")
        assert events == [EndpointDrained("orders", "1")]
        assert await hub.wait_drained("orders", "1", timeout=0.0) == (await hub.wait_drained("orders", "1", BOUND))
