"""A gateway's side of EdgeService, against real control planes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from mesh.v1 import admin_pb2, admin_pb2_grpc
from mesh.v1 import edge_service_pb2 as pb

from control_plane.convert import edge_policy_to_proto
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from gateway import edge_client
from gateway.edge_client import EdgeClient, EdgeKind, EdgeOutcome, EdgeReport
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.policy import Backoff
from mesh_client.identity.settings import identity_settings
from mesh_client.identity.workload import WorkloadIdentity
from mesh_client.transport import MutualTls, PlaintextTransport, Transport
from tests.ports import held_address

PATIENCE = 20.0
KIND = admin_pb2.POLICY_KIND_EDGE
LOGS = EdgePolicy(access_log=True)
PLAIN = EdgePolicy()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_client, "RECONNECT", Backoff(initial=0.02, max=0.1))


@asynccontextmanager
async def running(address: str, directory: Path) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(ControlPlaneOptions(address=address, insecure=True, data_dir=directory / "state"))
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop(0.2)


def follower(*addresses: str, cache: Path | None = None, transport: Transport | None = None) -> EdgeClient:
    return EdgeClient(
        "edge",
        EdgeKind.ENVOY,
        addresses,
        transport or PlaintextTransport(),
        id="edge-1",
        cache=cache,
        rng=Random(1),
    )


async def apply(address: str, document: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=document, kind=KIND), timeout=PATIENCE)


async def gateways(address: str, condition: Callable[[list[admin_pb2.EdgeGatewayStatus]], bool]) -> None:
    """Returns when the control plane shows such gateways of the edge."""
    async with grpc.aio.insecure_channel(address) as channel, asyncio.timeout(PATIENCE):
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        while True:
            status = await admin.GetStatus(admin_pb2.GetStatusRequest())
            found = [gateway for edge in status.edges for gateway in edge.gateways]
            if condition(found):
                return


async def until(condition: Callable[[], bool]) -> None:
    """Returns when the condition holds, of what only log and state say."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


async def applied(client: EdgeClient, known: str | None = None) -> str:
    """The next policy, reported as applied; its version."""
    async with asyncio.timeout(PATIENCE):
        version = (await client.changed(known)).version
    client.report(EdgeReport(version, EdgeOutcome.APPLIED, applied_version=version, endpoints_versions={"b": "e1"}))
    return version


async def test_a_policy_is_followed_and_what_became_of_it_is_said(tmp_path: Path) -> None:
    with held_address() as address:
        async with running(address, tmp_path):
            async with follower(address) as client:
                first = await applied(client)
                assert (client.current and client.current.stored, client.confirmed) == (False, True)
                assert first == PLAIN.version
                await apply(address, "access_log: true")
                second = await applied(client, first)
                assert client.current is not None
                assert (client.current.policy, client.current.stored) == (LOGS, True)
                assert client.state == f"{address} connected"
                await gateways(address, lambda found: found[0].report.applied_version == second)
                client.report(EdgeReport("x", EdgeOutcome.REJECTED, "no such method", second))
                await gateways(address, lambda found: found[0].report.detail == "no such method")
            await gateways(address, lambda found: not found)


async def test_it_comes_back_after_the_control_plane_and_says_again_what_it_said(tmp_path: Path) -> None:
    with held_address() as address:
        async with follower(address) as client:
            async with running(address, tmp_path):
                await apply(address, "access_log: true")
                version = await applied(client, PLAIN.version)
                await gateways(address, lambda found: bool(found) and found[0].report.applied_version == version)
            followed = client.current
            await until(lambda: "unreachable" in client.state)
            async with running(address, tmp_path):
                await gateways(address, lambda found: bool(found) and found[0].report.applied_version == version)
                assert client.current is followed
                await apply(address, "access_log: false")
                await applied(client, version)


async def test_without_a_control_plane_the_edge_starts_with_what_it_ran_by_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    with held_address() as address:
        async with running(address, tmp_path):
            await apply(address, "access_log: true")
            async with follower(address, cache=cache) as client:
                good = await applied(client)
                await apply(address, "accept: [int64]")
                async with asyncio.timeout(PATIENCE):
                    bad = await client.changed(good)
                client.report(EdgeReport(bad.version, EdgeOutcome.REJECTED, "lint", good))
        (file,) = cache.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        async with follower(address, cache=cache) as client:
            async with asyncio.timeout(PATIENCE):
                followed = await client.changed(None)
            assert (followed.policy, followed.stored, client.confirmed) == (LOGS, True, False)
            assert "no control plane has told the policy of edge edge: it is taken from the disk" in caplog.text
            async with running(address, tmp_path):
                async with asyncio.timeout(PATIENCE):
                    assert (await client.changed(good)).version == bad.version
                assert client.confirmed
        # What could be anybody's word is not believed.
        file.chmod(0o666)
        async with follower(address, cache=cache) as client:
            await until(lambda: "unreachable" in client.state)
            assert client.current is None


async def test_what_is_on_the_disk_waits_for_the_word_of_the_control_plane(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with held_address() as address:
        async with running(address, tmp_path):
            await apply(address, "access_log: true")
            async with follower(address, cache=cache) as client:
                version = await applied(client)
            async with follower(address, cache=cache) as client:
                assert client.current is None
                assert await applied(client) == version
                assert client.confirmed


async def test_a_control_plane_that_is_not_there_is_left_for_another(tmp_path: Path) -> None:
    with held_address() as absent, held_address() as address:
        async with running(address, tmp_path):
            for seed in (1, 2, 3):
                async with EdgeClient(
                    "edge", EdgeKind.KONG, [absent, address], PlaintextTransport(), id="1", rng=Random(seed)
                ) as client:
                    await applied(client)


Follow = Callable[[AsyncIterator[pb.FollowRequest], Any], Awaitable[None]]


@asynccontextmanager
async def serving(follow: Follow) -> AsyncIterator[str]:
    """The address of a control plane that answers so."""
    handler = grpc.stream_stream_rpc_method_handler(
        follow,
        pb.FollowRequest.FromString,
        pb.FollowResponse.SerializeToString,
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("mesh.v1.EdgeService", {"Follow": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def scripted(*responses: pb.FollowResponse) -> AsyncIterator[tuple[str, asyncio.Queue[pb.FollowRequest]]]:
    """A control plane that answers with these, and what it is told."""
    told: asyncio.Queue[pb.FollowRequest] = asyncio.Queue()

    async def follow(requests: AsyncIterator[pb.FollowRequest], context: Any) -> None:
        for item in responses:
            await context.write(item)
        async for request in requests:
            told.put_nowait(request)

    async with serving(follow) as address:
        yield address, told


def response(version: str, policy: EdgePolicy) -> pb.FollowResponse:
    return pb.FollowResponse(version=version, policy=edge_policy_to_proto(policy), stored=True)


async def test_a_policy_that_this_gateway_does_not_understand_is_rejected_and_the_good_one_kept() -> None:
    newer = response("2", PLAIN)
    newer.policy.services["a.B"].upstream = "b"
    newer.policy.services["a.B"].authentication.append("fingerprint")
    async with scripted(response("1", LOGS), newer) as (address, told), follower(address) as client:
        async with asyncio.timeout(PATIENCE):
            assert (await client.changed(None)).version == "1"
            while not (request := await told.get()).HasField("report"):
                pass
        assert (request.report.policy_version, request.report.outcome) == ("2", pb.EDGE_OUTCOME_REJECTED)
        assert "services.a.B.authentication[0]" in request.report.detail
        assert client.current is not None
        assert client.current.version == "1"


async def test_a_policy_of_another_edge_is_rejected() -> None:
    async with scripted(response("1", EdgePolicy(edge="other"))) as (address, told), follower(address) as client:
        async with asyncio.timeout(PATIENCE):
            while not (request := await told.get()).HasField("report"):
                pass
        assert "policy.edge" in request.report.detail
        assert client.current is None


async def test_a_version_that_it_does_not_have_is_another_protocol() -> None:
    async with scripted(pb.FollowResponse(version="1")) as (address, _), follower(address) as client:
        await until(lambda: "a policy of version 1" in client.state)


async def test_a_control_plane_that_does_not_know_the_policy_is_waited_for() -> None:
    async with scripted(pb.FollowResponse()) as (address, _), follower(address) as client:
        await until(lambda: client.state == f"{address} connected, which does not know the policy yet")
        assert client.current is None


async def test_a_control_plane_that_says_nothing_is_left_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_client, "FIRST_RESPONSE_TIMEOUT", 0.05)
    async with scripted() as (address, _), follower(address) as client:
        await until(lambda: "no response within" in client.state)


async def test_the_policy_on_the_disk_is_taken_when_nobody_answers_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted(response("1", LOGS)) as (address, _):
        async with follower(address, cache=tmp_path) as client:
            await applied(client)
        (file,) = tmp_path.iterdir()
    async with scripted() as (address, _):
        file.rename(tmp_path / follower(address, cache=tmp_path)._file.path.name)  # type: ignore[union-attr]  # there is one
        monkeypatch.setattr(edge_client, "PATIENCE", 0.05)
        async with follower(address, cache=tmp_path) as client, asyncio.timeout(PATIENCE):
            assert (await client.changed(None)).policy == LOGS


async def test_of_reports_that_come_faster_than_they_are_sent_the_last_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_client, "REPORTS_AT_ONCE", 1)
    monkeypatch.setattr(edge_client, "REPORTS_PER_SECOND", 5.0)
    async with scripted(response("1", LOGS)) as (address, told), follower(address) as client:
        async with asyncio.timeout(PATIENCE):
            await client.changed(None)
            first = await told.get()
            assert (first.gateway.edge, first.gateway.id, first.gateway.kind) == ("edge", "edge-1", pb.EDGE_KIND_ENVOY)
            client.report(EdgeReport("0", EdgeOutcome.FAILED))
            assert (await told.get()).report.policy_version == "0"
            for number in range(1, 10):
                client.report(EdgeReport(str(number), EdgeOutcome.FAILED))
            assert (await told.get()).report.policy_version == "9"
        assert told.empty()


async def test_a_stream_that_ends_is_opened_again() -> None:
    ended: list[pb.FollowRequest] = []

    async def follow(requests: AsyncIterator[pb.FollowRequest], context: Any) -> None:
        ended.append(await anext(aiter(requests)))
        await context.write(response("1", LOGS))
        if len(ended) == 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "max connection age")

    async with serving(follow) as address, follower(address) as client:
        await until(lambda: len(ended) == 3)
        assert [request.gateway.held_version for request in ended] == ["", "1", "1"]
        assert client.current is not None


async def test_without_an_identity_the_edge_starts_with_what_it_ran_by_last(tmp_path: Path) -> None:
    class Nobody(PlaintextTransport):
        """A transport that has tried everything, and got no certificate."""

        problem = "the authority does not answer"
        failing = True

    async with scripted(response("1", LOGS)) as (address, _):
        async with follower(address, cache=tmp_path) as client:
            await applied(client)
        async with follower(address, cache=tmp_path, transport=Nobody()) as client, asyncio.timeout(PATIENCE):
            assert (await client.changed(None)).policy == LOGS
            assert client.state == "not tried, for want of a certificate: the authority does not answer"


async def test_a_defect_of_ours_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted(response("1", LOGS)) as (address, _):
        take = EdgeClient._take
        failed: list[int] = []

        def fails_once(self: EdgeClient, received: pb.FollowResponse, at: str) -> None:
            if not failed:
                failed.append(1)
                raise ZeroDivisionError
            take(self, received, at)

        monkeypatch.setattr(EdgeClient, "_take", fails_once)
        async with follower(address) as client:
            await applied(client)
    assert "following the policy of edge edge" in caplog.text


def test_what_is_no_edge_is_refused() -> None:
    with pytest.raises(InvalidValueError):
        EdgeClient("No Edge", EdgeKind.KONG, ["a:1"], PlaintextTransport(), id="1")


async def test_it_follows_by_its_own_identity_and_another_service_is_told_why_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plane = ControlPlane(ControlPlaneOptions(data_dir=tmp_path / "state"))
    await plane.start()
    try:
        assert plane.authority is not None

        async def transport(service: str) -> MutualTls:
            assert plane.authority is not None
            token = (await plane.authority.create_token(service, 600.0, 1, "test")).text
            settings = identity_settings(
                service, [plane.address], enrolment=plane.enrolment_address, token=token, insecure=False
            )
            assert settings is not None
            return MutualTls(WorkloadIdentity(settings))

        async with (
            follower(plane.address, transport=await transport("edge")) as client,
            follower(plane.address, transport=await transport("orders")) as stranger,
        ):
            await applied(client)
            await until(lambda: "PERMISSION_DENIED" in stranger.state)
            assert "may not follow the policy of edge edge: only workloads of edge may" in stranger.state
            assert stranger.current is None
    finally:
        await plane.stop(0.2)
    assert "the policy of edge edge cannot be followed at" in caplog.text
