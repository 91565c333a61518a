"""EdgeService: who follows the policies of edges, and what became of them there."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from mesh.v1 import admin_pb2
from mesh.v1 import edge_service_pb2 as pb

from control_plane.access import Access, Caller
from control_plane.access import caller as connected_caller
from control_plane.convert import duration_to_proto, edge_policy_to_proto
from control_plane.events import PolicyDeleted, PolicyStored
from control_plane.policies import PolicyBook
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import check_service_name
from mesh_client.core.rate_limit import TokenBucket
from mesh_client.tasks import end_tasks

if TYPE_CHECKING:  # cannot be subscripted at run time
    FollowContext = grpc.aio.ServicerContext[pb.FollowRequest, pb.FollowResponse]

MAX_FOLLOWERS = 1_000
"""Streams at once; further ones are refused."""
MAX_FOLLOWERS_OF_ONE = 20
"""Streams of one workload, so that none of them keeps the others out: one for each gateway process would do."""
REPORTS_PER_SECOND, REPORTS_AT_ONCE = 1.0, 10
"""Requests of one stream that are taken, on average and at once. The others wait until they are read."""
FIRST_PATIENCE = 10.0
"""Seconds that a stream has to say who follows."""
MAX_ID, MAX_DETAIL, MAX_VERSION, MAX_ENDPOINTS_VERSIONS = 128, 1024, 64, 200

_SERVICE = pb.DESCRIPTOR.services_by_name["EdgeService"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """What a gateway said last."""

    message: pb.EdgeReport
    """Its ``ago`` is of the time when it came."""
    at: float
    """When it came."""


class Follower:
    """One gateway that follows."""

    __slots__ = ("caller", "connected_at", "edge", "ending", "id", "kind", "peer", "report", "sent_version", "wake")

    def __init__(self, gateway: pb.EdgeGateway, caller: Caller | None, peer: str, connected_at: float) -> None:
        self.edge = gateway.edge
        self.id = gateway.id
        self.kind = gateway.kind
        self.caller = caller
        self.peer = peer
        self.connected_at = connected_at
        self.sent_version: str | None = None
        """None until the first response."""
        self.report: Report | None = None
        self.wake = asyncio.Event()
        self.ending: tuple[grpc.StatusCode, str] | None = None
        """The status to end with."""

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the stream from outside of it."""
        self.ending = (code, details)
        self.wake.set()


@dataclass(frozen=True, slots=True)
class EdgeState:
    """One edge as operators see it."""

    edge: str
    policy_version: str
    """Empty while it is not known which policy holds."""
    upstreams: Sequence[str]
    """Services that its policy sends calls to."""
    followers: Sequence[Follower]


class EdgeHub:
    """Serves ``mesh.v1.EdgeService``: sends edge policies to those who may follow them, and remembers what they say.

    Args:
        access: who may follow.

    Attributes:
        book: which policies hold. Unread until `read`.
    """

    def __init__(self, access: Access) -> None:
        self.book = PolicyBook(EdgePolicy)
        self.book.unread = True
        self._access = access
        self._followers: dict[Follower, None] = {}
        self._open: Counter[str] = Counter()
        self._closed = False

    def apply(self, event: PolicyStored | PolicyDeleted) -> None:
        """Takes an event of the policy store in, and wakes those whom it concerns."""
        if self.book.apply(event):
            self._wake(event.name)

    def read(self) -> None:
        """The policy store was read whole: edges without a policy expose nothing."""
        self.book.unread = False
        self._wake(None)

    def states(self) -> list[EdgeState]:
        """Every edge that has a policy or a follower, in order."""
        names = {*self.book.names, *(follower.edge for follower in self._followers)}
        return [self._state(name) for name in sorted(names)]

    def missing(self, service: str, came: Mapping[str, int]) -> list[str]:
        """Edges that send calls to a service, and of which fewer gateways have come for its endpoints than must come.

        That is one at least, and as many as follow the edge's policy now.

        Args:
            service: which one.
            came: how many streams of the nodes of each service have subscribed to its endpoints.
        """
        names = []
        for edge in sorted(self.book.names):
            policy, _ = self.book.policy(edge)
            there = sum(came.get(name, 0) for name in policy.followers)
            following = sum(follower.edge == edge for follower in self._followers)
            if service in policy.upstreams and there < max(1, following):
                names.append(edge)
        return names

    @property
    def streams(self) -> int:
        """Gateways that follow an edge now."""
        return len(self._followers)

    def close(self) -> None:
        """Ends every stream with UNAVAILABLE, so that gateways go to another control plane at once."""
        self._closed = True
        for follower in self._followers:
            follower.end(grpc.StatusCode.UNAVAILABLE, "this control plane is stopping; use another")

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's handler, for ``server.add_generic_rpc_handlers``."""
        follow = grpc.stream_stream_rpc_method_handler(
            self._follow,
            request_deserializer=pb.FollowRequest.FromString,
            response_serializer=pb.FollowResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(_SERVICE.full_name, {"Follow": follow})

    async def _follow(self, requests: AsyncIterator[pb.FollowRequest], context: FollowContext) -> None:
        """Until the gateway has ended it, or may not follow any more."""
        who = connected_caller(context) if self._access.secure else None
        key = "" if who is None else who.workload_id
        many = self._access.secure and self._open[key] >= MAX_FOLLOWERS_OF_ONE
        crowded = many or self._open.total() >= MAX_FOLLOWERS
        self._open[key] += 1
        try:
            # A refusal that crosses the first request may lose its reason (grpc.aio), so that is waited for.
            first = await self._first(requests, context)
            if crowded:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"too many gateways follow policies here: at most {MAX_FOLLOWERS}, {MAX_FOLLOWERS_OF_ONE} of one "
                    "workload; use another control plane",
                )
            follower = await self._identified(first, context)
            self._followers[follower] = None
            try:
                cut = partial(follower.end, grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
                with self._access.cut_when_revoked(follower.caller, cut):
                    await self._serve(follower, first, requests, context)
            finally:
                del self._followers[follower]
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]

    async def _first(self, requests: AsyncIterator[pb.FollowRequest], context: FollowContext) -> pb.FollowRequest:
        try:
            async with asyncio.timeout(FIRST_PATIENCE):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"the gateway did not say who it is within {FIRST_PATIENCE:g} s"
            )
        if first is None or not first.HasField("gateway"):
            await self._access.require_caller(context, "follow the policy of an edge")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "gateway: expected in the first request")
        return first

    async def _identified(self, first: pb.FollowRequest, context: FollowContext) -> Follower:
        gateway = first.gateway
        try:
            check_service_name(gateway.edge)
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"gateway.edge: expected {error.expected}")
        if not gateway.id or len(gateway.id) > MAX_ID:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"gateway.id: expected 1 to {MAX_ID} characters")
        if gateway.kind not in (pb.EDGE_KIND_KONG, pb.EDGE_KIND_ENVOY):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "gateway.kind: expected EDGE_KIND_KONG or EDGE_KIND_ENVOY"
            )
        caller = await self._may_follow(gateway.edge, context)
        return Follower(gateway, caller, context.peer(), _now())

    async def _may_follow(self, edge: str, context: FollowContext) -> Caller | None:
        # The book remembers whatever it is asked for, and this may be any name.
        policy = self.book.policy(edge)[0] if self.book.has_policy(edge) else EdgePolicy(edge=edge)
        return await self._access.require_one_of(context, policy.followers, f"follow the policy of edge {edge}")

    async def _serve(
        self,
        follower: Follower,
        first: pb.FollowRequest,
        requests: AsyncIterator[pb.FollowRequest],
        context: FollowContext,
    ) -> None:
        _log.info("gateway %s follows the policy of edge %s", follower.id, follower.edge)
        reading = asyncio.create_task(self._read(follower, first, requests), name="reports of a gateway")
        reading.add_done_callback(lambda _: follower.wake.set())
        held = first.gateway.held_version
        if self._closed:  # between its first request and here
            follower.end(grpc.StatusCode.UNAVAILABLE, "this control plane is stopping; use another")
        try:
            while not reading.done():
                follower.wake.clear()
                if follower.ending is not None:
                    await context.abort(*follower.ending)
                if self.book.is_provisional(follower.edge):
                    if follower.sent_version is None:
                        follower.sent_version = ""
                        await context.write(pb.FollowResponse())
                        continue
                else:
                    # It may be for others now.
                    await self._may_follow(follower.edge, context)
                    policy, version = self.book.policy(follower.edge)
                    if version != follower.sent_version:
                        response = pb.FollowResponse(version=version, stored=self.book.has_policy(follower.edge))
                        if version != held:
                            response.policy.CopyFrom(edge_policy_to_proto(policy))
                        # What it held before it was sent another one it holds no more.
                        held, follower.sent_version = "", version
                        await context.write(response)
                        continue
                await follower.wake.wait()
            if error := reading.exception():
                raise error
        except _WrongReportError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            await end_tasks(reading)
            _log.info("gateway %s follows the policy of edge %s no more", follower.id, follower.edge)

    async def _read(
        self, follower: Follower, first: pb.FollowRequest, requests: AsyncIterator[pb.FollowRequest]
    ) -> None:
        bucket = TokenBucket(REPORTS_PER_SECOND, REPORTS_AT_ONCE, _now())
        _take(follower, first)
        async for request in requests:
            while wait := bucket.take(_now()):
                await asyncio.sleep(wait)  # what comes meanwhile is held back by HTTP/2's flow control
            if request.HasField("gateway"):
                raise _WrongReportError("gateway: expected in the first request alone")
            _take(follower, request)

    def _state(self, name: str) -> EdgeState:
        policy, version = self.book.policy(name)
        return EdgeState(
            name,
            "" if self.book.is_provisional(name) else version,
            policy.upstreams,
            [follower for follower in self._followers if follower.edge == name],
        )

    def _wake(self, edge: str | None) -> None:
        for follower in self._followers:
            if edge is None or follower.edge == edge:
                follower.wake.set()


def follower_to_proto(follower: Follower, now: float) -> admin_pb2.EdgeGatewayStatus:
    """The message, its report as old as it is now."""
    message = admin_pb2.EdgeGatewayStatus(
        id=follower.id,
        kind=follower.kind,
        service="" if follower.caller is None else follower.caller.service or "",
        workload_id="" if follower.caller is None else follower.caller.workload_id,
        peer=follower.peer,
        connected=duration_to_proto(now - follower.connected_at),
    )
    if follower.report is not None:
        message.report.CopyFrom(follower.report.message)
        ago = follower.report.message.ago
        message.report.ago.CopyFrom(duration_to_proto(ago.seconds + ago.nanos / 1e9 + now - follower.report.at))
    return message


class _WrongReportError(Exception):
    """A request that ends its stream."""


def _take(follower: Follower, request: pb.FollowRequest) -> None:
    if not request.HasField("report"):
        return
    report = request.report
    if report.outcome not in pb.EdgeOutcome.values() or report.outcome == pb.EDGE_OUTCOME_UNSPECIFIED:
        raise _WrongReportError("report.outcome: expected an EdgeOutcome")
    if max(len(report.policy_version), len(report.applied_version)) > MAX_VERSION:
        raise _WrongReportError(f"report: a version has at most {MAX_VERSION} characters")
    _check_versions(report.endpoints_versions)
    report.detail = report.detail[:MAX_DETAIL]
    if follower.report is None or _said(follower.report.message) != _said(report):
        fine = report.outcome in (pb.EDGE_OUTCOME_APPLIED, pb.EDGE_OUTCOME_STANDBY)
        _log.log(
            logging.INFO if fine else logging.WARNING,
            "gateway %s of edge %s, policy %s: %s%s",
            follower.id,
            follower.edge,
            report.policy_version or "none",
            pb.EdgeOutcome.Name(report.outcome).removeprefix("EDGE_OUTCOME_").lower(),
            f": {report.detail}" if report.detail else "",
        )
    follower.report = Report(report, _now())


def _check_versions(versions: Mapping[str, str]) -> None:
    if len(versions) > MAX_ENDPOINTS_VERSIONS or any(
        len(name) > MAX_VERSION or len(version) > MAX_VERSION for name, version in versions.items()
    ):
        raise _WrongReportError(
            f"report.endpoints_versions: expected at most {MAX_ENDPOINTS_VERSIONS}, each of names and versions of "
            f"{MAX_VERSION} characters"
        )


def _said(report: pb.EdgeReport) -> tuple[object, ...]:
    return report.policy_version, report.outcome, report.detail


def _now() -> float:
    return asyncio.get_running_loop().time()
