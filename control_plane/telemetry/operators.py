"""TrafficService: what operators see of the calls of the last minutes."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import traffic_pb2, traffic_pb2_grpc

from control_plane.access import Context
from control_plane.access import caller as connected_caller
from control_plane.catalog import Catalog
from control_plane.convert import duration_to_proto, policy_to_proto
from control_plane.discovery import StreamHub
from control_plane.documents import parse_document
from control_plane.policies import PROVISIONAL, PolicyBook
from control_plane.publisher import Publisher
from control_plane.telemetry.answers import (
    edge_to_proto,
    endpoint_to_proto,
    event_edge_to_proto,
    event_impact_to_proto,
    failures_to_proto,
    finding_to_proto,
    method_to_proto,
    refusals_to_proto,
    shown_to_proto,
    stats_to_proto,
)
from control_plane.telemetry.convert import seconds
from control_plane.telemetry.dry_run import try_policy
from control_plane.telemetry.event_dry_run import try_events
from control_plane.telemetry.explain import Facts, Lagging, Refused, findings
from control_plane.telemetry.recorder import Recorder
from control_plane.telemetry.reports import TelemetryServicer
from control_plane.telemetry.taps import DEFAULT_RATE, RENEWAL, OpenTap, Taps, TooManyTapsError
from control_plane.telemetry.timeline import CODE_NAMES, CODES, RATE_LIMITED, SHED, UNAUTHORIZED, WINDOW
from control_plane.telemetry.traffic import Traffic
from mesh_client.core.errors import InvalidPolicyError, InvalidValueError
from mesh_client.core.model import check_service_name
from mesh_client.core.policy import ServicePolicy, check_method_pattern

LAST_MINUTE = 60.0
TAP_FLUSH = 0.2
"""Seconds between responses to who taps."""

_TRACE = re.compile(r"[0-9a-f]{32}")
_log = logging.getLogger(__name__)


class TrafficServicer(traffic_pb2_grpc.TrafficServiceServicer):
    """Serves ``mesh.v1.TrafficService``. To be made inside the event loop.

    Args:
        traffic: answers questions.
        recorder: who reports.
        taps: what somebody looks at.
        reports: asks processes for calls.
        catalog: services and endpoints.
        book: which policies hold.
        publisher: what is published.
        hub: what clients hold of it.
    """

    def __init__(
        self,
        traffic: Traffic,
        recorder: Recorder,
        taps: Taps,
        reports: TelemetryServicer,
        *,
        catalog: Catalog,
        book: PolicyBook[ServicePolicy],
        publisher: Publisher,
        hub: StreamHub,
    ) -> None:
        self._traffic = traffic
        self._recorder = recorder
        self._taps = taps
        self._reports = reports
        self._catalog = catalog
        self._book = book
        self._publisher = publisher
        self._hub = hub

    async def GetTraffic(
        self,
        request: traffic_pb2.GetTrafficRequest,
        context: grpc.aio.ServicerContext[traffic_pb2.GetTrafficRequest, traffic_pb2.GetTrafficResponse],
    ) -> traffic_pb2.GetTrafficResponse:
        """Who calls whom."""
        now = self._refreshed()
        span = _span(request.window if request.HasField("window") else None, LAST_MINUTE)
        service, traffic = request.service, self._traffic
        async with _refusing(context):
            _check_optional(service)
        return traffic_pb2.GetTrafficResponse(
            window=duration_to_proto(traffic.reach(now, span)),
            edges=map(edge_to_proto, traffic.edges(now, span, service)),
            methods=map(method_to_proto, traffic.methods(service, now, span) if service else ()),
            endpoints=map(endpoint_to_proto, traffic.endpoints(service, now, span) if service else ()),
            reporting=self._recorder.connected,
            events=map(event_edge_to_proto, traffic.event_edges(now, span, service)),
        )

    async def ListFailures(
        self,
        request: traffic_pb2.ListFailuresRequest,
        context: grpc.aio.ServicerContext[traffic_pb2.ListFailuresRequest, traffic_pb2.ListFailuresResponse],
    ) -> traffic_pb2.ListFailuresResponse:
        """Failed calls, grouped."""
        now = self._refreshed()
        span = _span(request.window if request.HasField("window") else None, WINDOW)
        async with _refusing(context):
            _check_optional(request.service)
        groups = self._traffic.failures(now, span, request.service)
        return traffic_pb2.ListFailuresResponse(groups=[failures_to_proto(group, now) for group in groups])

    async def Explain(
        self,
        request: traffic_pb2.ExplainRequest,
        context: grpc.aio.ServicerContext[traffic_pb2.ExplainRequest, traffic_pb2.ExplainResponse],
    ) -> traffic_pb2.ExplainResponse:
        """Why calls fail."""
        now = self._refreshed()
        service = request.service
        if request.WhichOneof("subject") == "trace_id":
            if not _TRACE.fullmatch(request.trace_id):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "trace_id: expected 32 hex digits")
            failure = self._traffic.failure_of(request.trace_id)
            if failure is None:
                await context.abort(
                    grpc.StatusCode.NOT_FOUND,
                    "no failed call of this trace is kept: of each way in which calls fail, the last one of the last "
                    f"{WINDOW / 60:.0f} min is",
                )
            service, groups = failure.service, [failure]
        else:
            async with _refusing(context):
                check_service_name(service)
            groups = self._traffic.failures(now, service=service)
        facts = self._facts(service, now)
        if facts.records is None:
            await self._require_known(service, context)
        return traffic_pb2.ExplainResponse(
            service=service,
            findings=map(finding_to_proto, findings(facts)),
            failures=[failures_to_proto(group, now) for group in groups],
            calls=stats_to_proto(facts.calls),
        )

    async def TryPolicy(
        self,
        request: traffic_pb2.TryPolicyRequest,
        context: grpc.aio.ServicerContext[traffic_pb2.TryPolicyRequest, traffic_pb2.TryPolicyResponse],
    ) -> traffic_pb2.TryPolicyResponse:
        """What a policy would have refused."""
        async with _refusing(context):
            policy = parse_document(request.document, ServicePolicy)
        now = self._refreshed()
        span = _span(request.window if request.HasField("window") else None, WINDOW)
        received = self._traffic.received(policy.service, now, span)
        current, _ = self._book.policy(policy.service)
        handled = self._traffic.handled(policy.service, now, span)
        proposed, events = try_policy(policy, received), try_events(policy, handled)
        return traffic_pb2.TryPolicyResponse(
            window=duration_to_proto(self._traffic.reach(now, span)),
            calls=proposed.calls,
            instances=len({each.instance_id for each in received}),
            proposed=refusals_to_proto(proposed),
            current=refusals_to_proto(try_policy(current, received)),
            current_policy=policy_to_proto(current),
            handled=events.handled,
            proposed_events=event_impact_to_proto(events),
            current_events=event_impact_to_proto(try_events(current, handled)),
        )

    async def Tap(
        self,
        request: traffic_pb2.TapRequest,
        context: grpc.aio.ServicerContext[traffic_pb2.TapRequest, traffic_pb2.TapResponse],
    ) -> AsyncIterator[traffic_pb2.TapResponse]:
        """Calls as they end."""
        self._refreshed()
        async with _refusing(context):
            check_service_name(request.service)
        if request.service not in self._catalog.view(_now()).services:
            await self._require_known(request.service, context)
        async with _refusing(context):
            tap = self._open_tap(request, _now())
        who = connected_caller(context) or "somebody"
        _log.info("%s at %s taps calls to %s", who, context.peer(), tap.service)
        try:
            renewed_at, processes = _now(), self._reports.taps_changed(tap)
            yield traffic_pb2.TapResponse(processes=processes)
            while (now := _now()) < tap.order.until:
                await asyncio.sleep(min(TAP_FLUSH, tap.order.until - now))
                if now >= renewed_at + RENEWAL / 3:
                    renewed_at, processes = now, self._reports.taps_changed(tap)
                calls, dropped = tap.take()
                if calls or dropped:
                    shown = [shown_to_proto(each, _now(), time.time()) for each in calls]
                    yield traffic_pb2.TapResponse(calls=shown, dropped=dropped, processes=processes)
        finally:
            self._taps.close(tap)
            self._reports.taps_changed(tap)

    async def _require_known(self, service: str, context: Context) -> None:
        """Ends the call unless some process is of a service that no registry lists, or calls it."""
        if not self._traffic.knows(service):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"nobody knows a service {service}, and nobody calls one")

    def _open_tap(self, request: traffic_pb2.TapRequest, now: float) -> OpenTap:
        unknown = [code for code in request.codes if code not in CODE_NAMES]
        if unknown:
            raise InvalidValueError("codes", unknown[0], "gRPC status codes")
        self._taps.expire(now)
        return self._taps.open(
            check_service_name(request.service),
            now,
            method=check_method_pattern(request.method or "*"),
            codes=[CODE_NAMES[code] for code in request.codes],
            slower_than=seconds(request.slower_than),
            caller=request.caller if request.HasField("caller") else None,
            rate=request.rate or DEFAULT_RATE,
            duration=seconds(request.duration) if request.HasField("duration") else LAST_MINUTE,
        )

    def _refreshed(self) -> float:
        now = _now()
        self._recorder.expire(now)
        return now

    def _facts(self, service: str, now: float) -> Facts:
        view = self._catalog.view(now).services.get(service)
        _, version = self._book.policy(service)
        problem = next((each for each in self._book.problems if each.name == service), None)
        return Facts(
            service,
            None if view is None else view.records,
            () if problem is None else problem.errors,
            "" if problem is None else problem.obeyed_version,
            version.endswith(PROVISIONAL),
            list(self._lagging(service)),
            self._traffic.calls_to(service, now),
            self._received(service, now),
            list(self._traffic.callers(service)),
            [each for each in self._recorder.reporters if each.connected and each.service == service and each.served],
            self._refused(service, now),
            now,
            time.time(),
        )

    def _lagging(self, service: str) -> Iterator[Lagging]:
        for client in self._hub.clients():
            for state in client.subscriptions:
                if state.service != service:
                    continue
                current = self._publisher.snapshot.get(state.kind, service)
                version = "" if current is None else current.version
                if state.acknowledged_version != version:
                    node_id = client.peer if client.node is None else client.node.id
                    rejection = state.rejection if state.rejected_version == version else ""
                    yield Lagging(node_id, state.kind, state.acknowledged_version, rejection)

    def _received(self, service: str, now: float) -> dict[str, int]:
        edges = self._traffic.edges(now, service=service)
        return {
            edge.caller: edge.calls.count
            for edge in edges
            if edge.received and edge.service == service and edge.calls.count
        }

    def _refused(self, service: str, now: float) -> Refused:
        whole: Counter[int] = Counter()
        denied: Counter[str] = Counter()
        for step in self._traffic.received(service, now):
            whole.update({counter: step.whole.get(counter, 0) for counter in (UNAUTHORIZED, RATE_LIMITED, SHED)})
            for (caller, _), counters in step.calls.items():
                denied[caller] += counters.get(CODES["PERMISSION_DENIED"], 0)
        return Refused(whole[UNAUTHORIZED], whole[RATE_LIMITED], whole[SHED], +denied)


def _check_optional(service: str) -> None:
    if service:
        check_service_name(service)


def _span(window: Duration | None, default: float) -> float:
    return default if window is None else seconds(window)


@asynccontextmanager
async def _refusing(context: Context) -> AsyncIterator[None]:
    """Ends the call with the status code of the error that comes out of the block."""
    try:
        yield
    except (InvalidValueError, InvalidPolicyError) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except TooManyTapsError as error:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))


def _now() -> float:
    return asyncio.get_running_loop().time()
