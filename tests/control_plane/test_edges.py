"""Gateways that follow the policies of edges: what they are sent, what they say, and who may."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
import pytest
from mesh.v1 import admin_pb2, admin_pb2_grpc, authority_pb2, authority_pb2_grpc
from mesh.v1 import edge_service_pb2 as pb
from mesh.v1 import edge_service_pb2_grpc as pb_grpc

from control_plane import edges
from control_plane.access import Access
from control_plane.edges import EdgeHub
from control_plane.events import PolicyDeleted, PolicyStored
from mesh_client.core.edge_policy import EdgePolicy
from tests.control_plane.test_secure_server import running as running_securely
from tests.control_plane.worlds import BOUND, World, running

EXPOSES_NOTHING = EdgePolicy()
EDGE = admin_pb2.POLICY_KIND_EDGE
DENIED = grpc.StatusCode.PERMISSION_DENIED
INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Gateway:
    """One raw stream."""

    def __init__(self, channel: grpc.aio.Channel, edge: str = "edge", *, held: str = "", id: str = "edge-1") -> None:
        self.call = pb_grpc.EdgeServiceStub(channel).Follow(timeout=BOUND)
        self.first = pb.FollowRequest(
            gateway=pb.EdgeGateway(edge=edge, id=id, kind=pb.EDGE_KIND_ENVOY, held_version=held)
        )

    async def __aenter__(self) -> Self:
        await self.call.write(self.first)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.call.cancel()

    async def read(self) -> pb.FollowResponse:
        response = await self.call.read()
        assert isinstance(response, pb.FollowResponse)
        return response

    async def report(self, version: str = "v", outcome: int = pb.EDGE_OUTCOME_APPLIED, **fields: object) -> None:
        message = pb.EdgeReport(policy_version=version, outcome=outcome, **fields)  # type: ignore[arg-type]  # a test's
        await self.call.write(pb.FollowRequest(report=message))

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends, whatever is sent before."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError:
            pass
        return await self.call.code(), await self.call.details() or ""


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as world:
        yield world


async def apply(admin: admin_pb2_grpc.AdminServiceAsyncStub, document: str) -> admin_pb2.ApplyPolicyResponse:
    return await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=document, kind=EDGE), timeout=BOUND)


async def edge_status(admin: admin_pb2_grpc.AdminServiceAsyncStub, edge: str = "edge") -> admin_pb2.EdgeStatus:
    """The status of an edge, once it has one."""
    async with asyncio.timeout(BOUND):
        while True:
            status = await admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=BOUND)
            for item in status.edges:
                if item.edge == edge:
                    return item


async def reported(admin: admin_pb2_grpc.AdminServiceAsyncStub, version: str) -> pb.EdgeReport:
    """The report about this version, once it is shown."""
    async with asyncio.timeout(BOUND):
        while True:
            for gateway in (await edge_status(admin)).gateways:
                if gateway.report.policy_version == version:
                    return gateway.report


class TestPolicies:
    async def test_an_edge_without_a_policy_exposes_nothing(self, world: World) -> None:
        async with Gateway(world.channel) as gateway:
            response = await gateway.read()
            if not response.version:  # it came before the store of policies had been read
                response = await gateway.read()
        assert (response.version, response.stored) == (EXPOSES_NOTHING.version, False)
        assert response.policy.edge == "edge"
        assert not response.policy.services

    async def test_a_policy_and_each_change_are_sent(self, world: World) -> None:
        await apply(world.admin, "services: {a.B: {upstream: b, timeout: 3s}}")
        async with Gateway(world.channel) as gateway, Gateway(world.channel, "other") as other:
            first = await gateway.read()
            assert (first.stored, first.policy.services["a.B"].upstream) == (True, "b")
            assert first.policy.services["a.B"].timeout.seconds == 3
            await other.read()
            await apply(world.admin, "services: {a.B: {upstream: b, timeout: 3000ms}}")
            await apply(world.admin, "services: {a.B: {upstream: c}}")
            assert (await gateway.read()).policy.services["a.B"].upstream == "c"
            await world.admin.DeletePolicy(admin_pb2.DeletePolicyRequest(service="edge", kind=EDGE))
            last = await gateway.read()
            assert (last.version, last.stored) == (EXPOSES_NOTHING.version, False)
            await apply(world.admin, "{edge: other, access_log: true}")
            assert (await other.read()).policy.access_log

    async def test_what_a_gateway_has_is_not_sent_to_it_again(self, world: World) -> None:
        await apply(world.admin, "access_log: true")
        async with Gateway(world.channel, held=EdgePolicy(access_log=True).version) as gateway:
            response = await gateway.read()
            assert (response.stored, response.HasField("policy")) == (True, False)
            await apply(world.admin, "access_log: false")
            assert (await gateway.read()).HasField("policy")
            await apply(world.admin, "access_log: true")
            assert (await gateway.read()).policy.access_log

    async def test_a_stop_sends_gateways_elsewhere(self, world: World) -> None:
        async with Gateway(world.channel) as gateway:
            await gateway.read()
            await world.plane.stop(1.0)
            assert await gateway.end() == (
                grpc.StatusCode.UNAVAILABLE,
                "this control plane is stopping; use another",
            )

    async def test_a_gateway_that_ends_its_stream_is_gone(self, world: World) -> None:
        async with Gateway(world.channel) as gateway:
            await gateway.read()
            assert len((await edge_status(world.admin)).gateways) == 1
            await gateway.call.done_writing()
            assert (await gateway.end())[0] is grpc.StatusCode.OK
        assert not (await world.admin.GetStatus(admin_pb2.GetStatusRequest())).edges


@asynccontextmanager
async def alone() -> AsyncIterator[tuple[EdgeHub, grpc.aio.Channel]]:
    """A hub without a control plane around it."""
    hub, server = EdgeHub(Access(None)), grpc.aio.server()
    server.add_generic_rpc_handlers((hub.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield hub, channel
    finally:
        await server.stop(None)


class TestUnknownPolicies:
    async def test_nothing_is_sent_before_the_store_was_read_but_what_was_good_before(self) -> None:
        async with alone() as (hub, channel), Gateway(channel) as gateway, Gateway(channel, "new") as new:
            assert await gateway.read() == await new.read() == pb.FollowResponse()
            hub.apply(PolicyStored("edge", b"access_log: true", ""))
            assert (await gateway.read()).policy.access_log
            assert {state.edge: bool(state.policy_version) for state in hub.states()} == {"edge": True, "new": False}
            hub.read()
            assert (await new.read()).version == EdgePolicy(edge="new").version

    async def test_a_bad_policy_is_not_sent_and_the_good_one_stays(self) -> None:
        async with alone() as (hub, channel):
            hub.read()
            hub.apply(PolicyStored("edge", b"edge: [", "1"))
            async with Gateway(channel) as gateway:
                assert await gateway.read() == pb.FollowResponse()
                hub.apply(PolicyStored("edge", b"access_log: true", "2"))
                assert (await gateway.read()).policy.access_log
                hub.apply(PolicyStored("edge", b"access_log: never", "3"))
                assert [problem.obeyed_version for problem in hub.book.problems] == [
                    EdgePolicy(access_log=True).version
                ]
                hub.apply(PolicyDeleted("edge"))
                assert (await gateway.read()).version == EXPOSES_NOTHING.version

    async def test_who_comes_while_the_hub_closes_is_sent_away(self) -> None:
        async with alone() as (hub, channel):
            hub.close()
            async with Gateway(channel) as gateway:
                assert (await gateway.end())[0] is grpc.StatusCode.UNAVAILABLE


class TestReports:
    async def test_what_a_gateway_says_is_shown_with_its_age(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "control_plane.edges")
        await apply(world.admin, "services: {a.B: {upstream: b}, a.C: {upstream: c}}")
        await world.source.lists("b", "1")
        async with Gateway(world.channel) as gateway:
            version = (await gateway.read()).version
            status = await edge_status(world.admin)
            assert (status.policy_version, status.has_policy) == (version, True)
            assert status.unknown_upstreams == ["c"]
            (shown,) = status.gateways
            assert (shown.id, shown.kind, shown.service, shown.HasField("report")) == (
                "edge-1",
                pb.EDGE_KIND_ENVOY,
                "",
                False,
            )
            await gateway.report(
                version,
                pb.EDGE_OUTCOME_REJECTED,
                detail="no such method" + "!" * 2000,
                applied_version="old",
                endpoints_versions={"b": "e1"},
            )
            report = await reported(world.admin, version)
            assert (report.applied_version, report.detail[:14], len(report.detail)) == ("old", "no such method", 1024)
            assert report.endpoints_versions == {"b": "e1"}
            assert f"gateway edge-1 of edge edge, policy {version}: rejected: no such method" in caplog.text

            message = pb.EdgeReport(policy_version="x", outcome=pb.EDGE_OUTCOME_APPLIED)
            message.ago.seconds = 60
            await gateway.call.write(pb.FollowRequest(report=message))
            assert (await reported(world.admin, "x")).ago.seconds >= 60

    async def test_a_report_may_come_with_the_first_request(self, world: World) -> None:
        gateway = Gateway(world.channel)
        gateway.first.report.policy_version = "before"
        gateway.first.report.outcome = pb.EDGE_OUTCOME_FAILED
        async with gateway:
            assert (await reported(world.admin, "before")).outcome == pb.EDGE_OUTCOME_FAILED

    async def test_reports_that_come_too_fast_are_taken_late(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(edges, "REPORTS_PER_SECOND", 10.0)
        monkeypatch.setattr(edges, "REPORTS_AT_ONCE", 2)
        async with Gateway(world.channel) as gateway:
            began = asyncio.get_running_loop().time()
            for number in range(7):
                await gateway.report(str(number))
            await reported(world.admin, "6")
            assert asyncio.get_running_loop().time() - began > 0.4

    @pytest.mark.parametrize(
        ("request_", "reason"),
        [
            (pb.FollowRequest(report=pb.EdgeReport()), "report.outcome: expected an EdgeOutcome"),
            (pb.FollowRequest(report=pb.EdgeReport(outcome=9)), "report.outcome: expected an EdgeOutcome"),  # type: ignore[arg-type]  # on purpose
            (
                pb.FollowRequest(report=pb.EdgeReport(outcome=pb.EDGE_OUTCOME_APPLIED, policy_version=65 * "v")),
                "report: a version has at most 64 characters",
            ),
            (
                pb.FollowRequest(
                    report=pb.EdgeReport(
                        outcome=pb.EDGE_OUTCOME_APPLIED, endpoints_versions={str(n): "v" for n in range(201)}
                    )
                ),
                "report.endpoints_versions: expected at most 200",
            ),
            (pb.FollowRequest(gateway=pb.EdgeGateway(edge="edge")), "gateway: expected in the first request alone"),
        ],
        ids=["no outcome", "unknown outcome", "long version", "many services", "another gateway"],
    )
    async def test_a_wrong_request_ends_the_stream(self, world: World, request_: pb.FollowRequest, reason: str) -> None:
        async with Gateway(world.channel) as gateway:
            await gateway.read()
            await gateway.call.write(request_)
            code, details = await gateway.end()
        assert code is INVALID
        assert reason in details

    @pytest.mark.parametrize(
        ("gateway", "reason"),
        [
            (None, "gateway: expected in the first request"),
            (pb.EdgeGateway(edge="Edge"), "gateway.edge: expected a DNS label"),
            (pb.EdgeGateway(edge="edge"), "gateway.id: expected 1 to 128 characters"),
            (pb.EdgeGateway(edge="edge", id=129 * "x"), "gateway.id: expected 1 to 128 characters"),
            (pb.EdgeGateway(edge="edge", id="1"), "gateway.kind: expected EDGE_KIND_KONG or EDGE_KIND_ENVOY"),
        ],
    )
    async def test_a_gateway_has_to_say_who_it_is(
        self, world: World, gateway: pb.EdgeGateway | None, reason: str
    ) -> None:
        follower = Gateway(world.channel)
        follower.first = pb.FollowRequest(gateway=gateway)
        async with follower:
            code, details = await follower.end()
        assert code is INVALID
        assert reason in details


class TestLimits:
    async def test_who_says_nothing_is_not_waited_for(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(edges, "FIRST_PATIENCE", 0.05)
        call = pb_grpc.EdgeServiceStub(world.channel).Follow(timeout=BOUND)
        with pytest.raises(grpc.aio.AioRpcError, match="did not say who it is"):
            await call.read()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def test_more_streams_than_fit_are_refused(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(edges, "MAX_FOLLOWERS", 2)
        async with Gateway(world.channel) as one, Gateway(world.channel) as other:
            await one.read()
            await other.read()
            async with Gateway(world.channel) as third:
                code, details = await third.end()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "at most 2, 20 of one workload" in details


class TestIdentity:
    async def test_the_service_that_is_named_like_the_edge_follows_and_nobody_else(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with running_securely(tmp_path) as world:
            channel, workload_id = await world.workload("edge")
            stranger, _ = await world.workload("orders")
            admin = admin_pb2_grpc.AdminServiceStub(await world.operator())
            async with Gateway(channel) as gateway:
                await gateway.read()
                (shown,) = (await edge_status(admin)).gateways
                assert (shown.service, shown.workload_id) == ("edge", workload_id)
                for other, name in ((stranger, "service/orders"), (await world.operator("bob"), "operator/bob")):
                    async with Gateway(other) as refused:
                        code, details = await refused.end()
                    assert code is DENIED
                    assert details == (
                        f"spiffe://mesh.internal/{name} may not follow the policy of edge edge: "
                        "only workloads of edge may"
                    )
                assert "may not follow the policy of edge edge" in caplog.text
                async with Gateway(stranger, "orders") as own:
                    await own.read()
            denials = (await admin.GetStatus(admin_pb2.GetStatusRequest())).denials
            assert {item.caller: item.count for item in denials} == {
                "spiffe://mesh.internal/service/orders": 1,
                "spiffe://mesh.internal/operator/bob": 1,
            }

    async def test_a_policy_that_names_other_gateways_sends_the_former_ones_away(self, tmp_path: Path) -> None:
        async with running_securely(tmp_path) as world:
            edge, kong = (await world.workload("edge"))[0], (await world.workload("kong"))[0]
            admin = admin_pb2_grpc.AdminServiceStub(await world.operator())
            async with Gateway(edge) as before:
                await before.read()
                await apply(admin, "gateways: [kong, envoy]")
                code, details = await before.end()
                assert code is DENIED
                assert "only workloads of kong or envoy may" in details
            async with Gateway(kong) as after:
                assert (await after.read()).policy.gateways == ["kong", "envoy"]

    async def test_a_revoked_gateway_is_cut(self, tmp_path: Path) -> None:
        async with running_securely(tmp_path) as world:
            channel, workload_id = await world.workload("edge")
            operator = await world.operator()
            async with Gateway(channel) as gateway:
                await gateway.read()
                await authority_pb2_grpc.AuthorityServiceStub(operator).RevokeWorkload(
                    authority_pb2.RevokeWorkloadRequest(workload_id=workload_id), timeout=BOUND
                )
                assert await gateway.end() == (DENIED, "the workload has been revoked")

    async def test_one_workload_does_not_keep_the_others_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(edges, "MAX_FOLLOWERS_OF_ONE", 1)
        async with running_securely(tmp_path) as world:
            one, other = (await world.workload("edge"))[0], (await world.workload("edge"))[0]
            async with Gateway(one) as first:
                await first.read()
                async with Gateway(one) as second:
                    assert (await second.end())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
                async with Gateway(other) as third:
                    await third.read()
