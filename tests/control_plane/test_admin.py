"""The admin service on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable

import grpc
import grpc.aio
import pytest
from mesh.v1 import admin_pb2, discovery_pb2, endpoint_pb2, registry_pb2

from control_plane.catalog import CatalogSettings
from control_plane.events import PolicyStored, ServiceObserved, ServiceVanished, SourceConnected, SourceLost
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.sources import EmitPolicy, StoredDocument, StoreUnavailableError
from mesh_client.core.model import Endpoint, Health
from mesh_client.core.policy import ServicePolicy
from tests.control_plane.worlds import BOUND, ENDPOINTS, POLICY, HandSource, Request, World, running

GOOD = "service: orders\ntimeout: 3s\n"
BETTER = "service: orders\ntimeout: 4s\n"
BAD = "service: orders\nretry:\n  max_attempts: 99\ntimeout: soon\n"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as world:
        yield world


async def status(world: World) -> admin_pb2.GetStatusResponse:
    return await world.admin.GetStatus(admin_pb2.GetStatusRequest())


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def apply(world: World, document: str, **fields: object) -> admin_pb2.ApplyPolicyResponse:
    request = admin_pb2.ApplyPolicyRequest(document=document)
    for name, value in fields.items():
        setattr(request, name, value)
    return await world.admin.ApplyPolicy(request)


class TestStatus:
    async def test_services_are_shown_with_their_health_and_source(self, world: World) -> None:
        members = (
            Endpoint("1", "127.0.0.1", 1),
            Endpoint("2", "127.0.0.1", 1, health=Health.UNHEALTHY),
            Endpoint("3", "127.0.0.1", 1, health=Health.DRAINING),
        )
        await world.source.emit(ServiceObserved("hand", "orders", members))
        async with world.client() as client:
            await client.subscribe("orders")
            await client.follow("orders", "1", "2")
            shown = await status(world)
        (service,) = shown.services
        assert (service.service, service.source, service.subscribers) == ("orders", "hand", 1)
        assert (service.healthy, service.unhealthy, service.draining) == (1, 1, 1)
        assert service.endpoints_version
        assert service.policy_version
        assert not service.has_policy
        assert shown.control_plane.startswith("control-plane-")
        assert shown.uptime.seconds + shown.uptime.nanos > 0
        assert not shown.HasField("removal_hold")

    async def test_clients_are_shown_with_what_they_acknowledged_and_rejected(self, world: World) -> None:
        await world.source.lists("orders", "1")
        async with world.client("web-1") as client:
            await client.send(
                Request(
                    node=discovery_pb2.Node(id="web-1", service="web"), type=ENDPOINTS, subscribe=["orders", "nobody"]
                )
            )
            response = await client.read()
            while not response.resources:
                await client.acknowledge(response)
                response = await client.read()
            await client.send(
                Request(
                    node=discovery_pb2.Node(id="web-1", service="web"),
                    type=ENDPOINTS,
                    response_nonce=response.nonce,
                    error=discovery_pb2.Rejection(message="no", resources={"orders": "not today"}),
                )
            )
            async with asyncio.timeout(BOUND):
                while not (await status(world)).clients[0].subscriptions[1].rejection:
                    await asyncio.sleep(0)
            (shown,) = (await status(world)).clients
        assert (shown.node_id, shown.service) == ("web-1", "web")
        assert shown.peer.startswith("ipv4:127.0.0.1:")
        unknown, rejected = shown.subscriptions
        assert (unknown.service, unknown.acknowledged_version, unknown.current_version) == ("nobody", "", "")
        assert unknown.HasField("acknowledged_ago")
        assert (rejected.service, rejected.rejection) == ("orders", "not today")
        assert rejected.current_version == response.resources[0].version
        assert rejected.type == ENDPOINTS

    async def test_a_client_that_has_said_nothing_yet_is_shown_by_its_address(self, world: World) -> None:
        async with world.client() as client:
            await client.call.wait_for_connection()
            async with asyncio.timeout(BOUND):
                while not (clients := (await status(world)).clients):
                    await asyncio.sleep(0)
        assert (clients[0].node_id, clients[0].peer[:5]) == ("", "ipv4:")

    async def test_sources_are_shown_with_what_is_wrong(self, world: World) -> None:
        await world.source.emit(SourceLost("hand", "no leader"))
        async with asyncio.timeout(BOUND):
            # The other one is connected as soon as it was read, which a busy machine may take a moment for.
            while len(sources := {source.name: source for source in (await status(world)).sources}) < 2:
                await asyncio.sleep(0)
        assert not sources["hand"].connected
        assert sources["hand"].detail == "no leader"
        assert sources["embedded-policies"].connected

    async def test_a_service_that_is_not_published_yet_is_shown_without_versions(self) -> None:
        source = HandSource(connected=False)
        async with running(source=source) as world:
            await source.lists("orders", "1")
            (service,) = (await status(world)).services
            assert (service.service, service.endpoints_version, service.policy_version) == ("orders", "", "")
            listed = await world.admin.ListEndpoints(admin_pb2.ListEndpointsRequest(service="orders"))
            assert listed.version == ""


class TestEndpoints:
    async def test_every_endpoint_is_listed_those_included_that_leave(self, world: World) -> None:
        await world.source.lists("orders", "1", "2")
        await world.plane._publisher.opened.wait()
        await world.registry.Drain(registry_pb2.DrainRequest(service="orders", endpoint_id="1"))
        listed = await world.admin.ListEndpoints(admin_pb2.ListEndpointsRequest(service="orders"))
        assert [(each.endpoint.id, each.endpoint.health, each.source, each.held) for each in listed.endpoints] == [
            ("1", endpoint_pb2.HEALTH_STATUS_DRAINING, "hand", False),
            ("2", endpoint_pb2.HEALTH_STATUS_HEALTHY, "hand", False),
        ]
        assert listed.version

    async def test_an_unknown_service_and_a_bad_name_are_different_errors(self, world: World) -> None:
        code, details = await refusal(world.admin.ListEndpoints(admin_pb2.ListEndpointsRequest(service="orders")))
        assert (code, "orders" in details) == (grpc.StatusCode.NOT_FOUND, True)
        code, details = await refusal(world.admin.ListEndpoints(admin_pb2.ListEndpointsRequest(service="Not Good")))
        assert (code, "DNS label" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


class TestRemovals:
    async def test_held_removals_are_shown_and_published_when_confirmed(self, world: World) -> None:
        async with world.client() as client:
            await world.source.lists("orders", "1", "2", "3", "4")
            await client.subscribe("orders")
            await client.follow("orders", "1", "2", "3", "4")
            await world.source.lists("orders", "1")
            shown = await status(world)
            assert (shown.removal_hold.endpoints, list(shown.removal_hold.services)) == (3, ["orders"])
            assert 290 <= shown.removal_hold.remaining.seconds < 300
            listed = await world.admin.ListEndpoints(admin_pb2.ListEndpointsRequest(service="orders"))
            assert [each.held for each in listed.endpoints] == [False, True, True, True]
            confirmed = await world.admin.ConfirmRemovals(admin_pb2.ConfirmRemovalsRequest())
            assert confirmed.endpoints == 3
            await client.follow("orders", "1")
            assert not (await status(world)).HasField("removal_hold")

    async def test_a_hold_that_runs_out_is_published_by_itself(self) -> None:
        options = ControlPlaneOptions(insecure=True, debounce_quiet=0.0, catalog=CatalogSettings(guard_hold=2.0))
        async with running(options) as world, world.client() as client:
            await world.source.lists("orders", "1", "2", "3", "4")
            await client.subscribe("orders")
            await client.follow("orders", "1", "2", "3", "4")
            await world.source.lists("orders")
            assert (await status(world)).removal_hold.endpoints == 4
            await client.follow("orders")

    async def test_a_service_that_is_forgotten_is_withdrawn_by_itself(self) -> None:
        options = ControlPlaneOptions(insecure=True, debounce_quiet=0.0, catalog=CatalogSettings(forget_after=1.0))
        async with running(options) as world, world.client() as client:
            await world.source.lists("orders", "1")
            await client.subscribe("orders")
            await client.follow("orders", "1")
            await world.source.emit(ServiceVanished("hand", "orders"))
            await client.follow("orders")
            assert list((await client.next()).removed) == ["orders"]


class TestPolicies:
    async def test_an_applied_policy_reaches_the_clients(self, world: World) -> None:
        await world.source.lists("orders", "1")
        async with world.client() as client:
            await client.subscribe("orders", types=(POLICY,))
            assert not (await client.next(POLICY)).resources[0].policy.HasField("timeout")
            applied = await apply(world, GOOD)
            assert applied.changed
            assert applied.before.service == "orders"
            assert not applied.before.HasField("policy")
            assert applied.after.policy.timeout.seconds == 3
            assert (await client.next(POLICY)).resources[0].policy.timeout.seconds == 3
            assert (await status(world)).services[0].has_policy
            await world.admin.DeletePolicy(admin_pb2.DeletePolicyRequest(service="orders"))
            assert not (await client.next(POLICY)).resources[0].policy.HasField("timeout")

    async def test_a_dry_run_compares_and_stores_nothing(self, world: World) -> None:
        stored = (await apply(world, GOOD)).after
        shown = await apply(world, BETTER, dry_run=True)
        assert (shown.changed, shown.before.policy.timeout.seconds, shown.after.policy.timeout.seconds) == (True, 3, 4)
        assert shown.after.stored_version == ""
        got = await world.admin.GetPolicy(admin_pb2.GetPolicyRequest(service="orders"))
        assert got.policy == stored

    async def test_applying_the_same_again_changes_nothing(self, world: World) -> None:
        first = (await apply(world, GOOD)).after
        again = await apply(world, GOOD)
        assert not again.changed
        assert again.after.stored_version == first.stored_version
        reworded = await apply(world, GOOD + "# a comment\n")
        assert not reworded.changed
        assert reworded.after.stored_version != first.stored_version

    async def test_writes_are_refused_when_another_version_is_stored(self, world: World) -> None:
        version = (await apply(world, GOOD, if_version="")).after.stored_version
        for call in (
            apply(world, BETTER, if_version=""),
            apply(world, BETTER, if_version="99"),
            apply(world, BETTER, if_version="99", dry_run=True),
            world.admin.DeletePolicy(admin_pb2.DeletePolicyRequest(service="orders", if_version="99")),
        ):
            code, details = await refusal(call)
            assert (code, f"version {version}" in details) == (grpc.StatusCode.ABORTED, True)
        await apply(world, BETTER, if_version=version)

    async def test_a_bad_policy_is_refused_with_the_path_of_every_bad_field(self, world: World) -> None:
        code, details = await refusal(apply(world, BAD))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "retry.max_attempts" in details
        assert "timeout" in details
        verdict = await world.admin.ValidatePolicy(admin_pb2.ValidatePolicyRequest(document=BAD))
        assert {error.path for error in verdict.errors} == {"retry.max_attempts", "timeout"}
        assert not verdict.HasField("policy")

    async def test_a_good_policy_is_shown_as_understood(self, world: World) -> None:
        verdict = await world.admin.ValidatePolicy(admin_pb2.ValidatePolicyRequest(document=GOOD))
        assert not verdict.errors
        assert verdict.policy.retry.max_attempts == 3

    async def test_stored_policies_are_listed(self, world: World) -> None:
        await apply(world, GOOD)
        await apply(world, "service: payments\n")
        listed = await world.admin.ListPolicies(admin_pb2.ListPoliciesRequest())
        assert [each.service for each in listed.policies] == ["orders", "payments"]

    async def test_what_is_not_stored_cannot_be_had_or_deleted(self, world: World) -> None:
        code, _ = await refusal(world.admin.GetPolicy(admin_pb2.GetPolicyRequest(service="orders")))
        assert code is grpc.StatusCode.NOT_FOUND
        code, _ = await refusal(world.admin.DeletePolicy(admin_pb2.DeletePolicyRequest(service="orders")))
        assert code is grpc.StatusCode.NOT_FOUND

    async def test_a_bad_name_is_refused(self, world: World) -> None:
        code, _ = await refusal(world.admin.GetPolicy(admin_pb2.GetPolicyRequest(service="Not Good")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


class BadStore:
    """A policy store with a bad document in it, that fails when it is asked to."""

    name = "bad-store"
    kind = ServicePolicy

    def __init__(self) -> None:
        self.broken = False

    async def run(self, emit: EmitPolicy) -> None:
        emit(PolicyStored("orders", BAD.encode(), "1"))
        emit(SourceConnected(self.name))
        await asyncio.Event().wait()

    async def get(self, service: str) -> StoredDocument | None:
        if self.broken:
            raise StoreUnavailableError("no leader")
        return StoredDocument(service, BAD.encode(), "1")

    async def list(self) -> list[StoredDocument]:
        return [StoredDocument("orders", BAD.encode(), "1")]

    async def put(self, service: str, document: bytes, if_version: str | None) -> StoredDocument:
        return StoredDocument(service, document, "2")

    async def delete(self, service: str, if_version: str | None) -> None:
        return None


class TestBadStoredPolicies:
    async def test_they_are_shown_with_their_errors_and_can_be_replaced(self) -> None:
        store = BadStore()
        plane = ControlPlane(ControlPlaneOptions(insecure=True), source=HandSource(), policies=store)
        await plane.start()
        async with grpc.aio.insecure_channel(plane.address) as channel:
            world = World(plane, HandSource(), channel)
            (problem,) = (await status(world)).policy_problems
            assert (problem.service, problem.obeyed_version) == ("orders", "")
            assert "retry.max_attempts" in {error.path for error in problem.errors}
            (listed,) = (await world.admin.ListPolicies(admin_pb2.ListPoliciesRequest())).policies
            assert listed.errors
            assert not listed.HasField("policy")
            applied = await apply(world, GOOD)
            assert applied.changed
            assert applied.before.errors
            store.broken = True
            code, details = await refusal(apply(world, GOOD))
            assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "no leader")
        await plane.stop()
