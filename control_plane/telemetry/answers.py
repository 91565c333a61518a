"""What operators are answered about traffic, as protobuf messages."""

from __future__ import annotations

import math

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import telemetry_pb2, traffic_pb2

from control_plane.convert import duration_to_proto
from control_plane.telemetry.dry_run import Refusals
from control_plane.telemetry.event_dry_run import EventImpact
from control_plane.telemetry.explain import Finding, Severity, explain_failures
from control_plane.telemetry.recorder import OutboxReport
from control_plane.telemetry.stats import Stats
from control_plane.telemetry.taps import Shown
from control_plane.telemetry.timeline import CODES
from control_plane.telemetry.traffic import Edge, EndpointLoad, EventEdge, Failures, MethodLoad
from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import Reason
from mesh_client.core.events.state import RelayState
from mesh_client.core.incidents import Example

_REASONS = {reason: telemetry_pb2.FailureReason.Value(f"FAILURE_REASON_{reason.name}") for reason in Reason}
_SEVERITIES = {severity: traffic_pb2.Severity.Value(f"SEVERITY_{severity.name}") for severity in Severity}
_RELAYS = {state: telemetry_pb2.OutboxRelay.Value(f"OUTBOX_RELAY_{state.name}") for state in RelayState}
_BREAKERS = {state.value: telemetry_pb2.BreakerState.Value(f"BREAKER_STATE_{state.name}") for state in BreakerState}


def stats_to_proto(stats: Stats) -> traffic_pb2.TrafficStats:
    """How calls went."""
    return traffic_pb2.TrafficStats(
        count=stats.count,
        rate=stats.rate,
        success_rate=stats.success_rate,
        p50=_percentile(stats.p50),
        p95=_percentile(stats.p95),
        p99=_percentile(stats.p99),
        codes={CODES[code]: count for code, count in stats.codes.items()},
    )


def _percentile(seconds: float | None) -> Duration | None:
    return None if seconds is None or math.isinf(seconds) else duration_to_proto(seconds)


def edge_to_proto(edge: Edge) -> traffic_pb2.EdgeTraffic:
    """Calls of one service to another."""
    return traffic_pb2.EdgeTraffic(
        caller=edge.caller,
        service=edge.service,
        calls=stats_to_proto(edge.calls),
        retries=edge.calls.retries,
        in_flight=edge.in_flight,
        processes=edge.processes,
        breakers_open=edge.breakers_open,
        ejected=edge.ejected,
        total=edge.total,
        received=edge.received,
    )


def event_edge_to_proto(edge: EventEdge) -> traffic_pb2.EventTraffic:
    """Events of one service that another one handles."""
    return traffic_pb2.EventTraffic(
        publisher=edge.publisher,
        service=edge.service,
        group=edge.group,
        type=edge.type,
        handled=stats_to_proto(edge.handled),
    )


def outbox_to_proto(outbox: OutboxReport) -> telemetry_pb2.OutboxState:
    """An outbox of events."""
    message = telemetry_pb2.OutboxState(
        events=outbox.events, max_events=outbox.max_events, refused=outbox.refused, broker=outbox.broker
    )
    if outbox.relay is not None:
        message.relay = _RELAYS[outbox.relay]
    if outbox.oldest is not None:
        message.oldest.CopyFrom(Timestamp(seconds=int(outbox.oldest)))
    return message


def method_to_proto(load: MethodLoad) -> traffic_pb2.MethodTraffic:
    """Calls of one method."""
    return traffic_pb2.MethodTraffic(method=load.method, calls=stats_to_proto(load.calls), retries=load.calls.retries)


def endpoint_to_proto(load: EndpointLoad) -> traffic_pb2.EndpointTraffic:
    """Attempts on one endpoint."""
    return traffic_pb2.EndpointTraffic(
        endpoint_id=load.endpoint_id, attempts=stats_to_proto(load.attempts), ejected_by=load.ejected_by
    )


def failures_to_proto(failures: Failures, now: float) -> traffic_pb2.FailureGroup:
    """Calls that failed in one way, explained."""
    explanation, remedy = explain_failures(failures)
    return traffic_pb2.FailureGroup(
        caller=failures.caller,
        service=failures.service,
        method=failures.method,
        code=CODES[failures.code],
        reason=telemetry_pb2.FAILURE_REASON_UNSPECIFIED if failures.reason is None else _REASONS[failures.reason],
        count=failures.count,
        example=None if failures.example is None else _example(failures.example.example, now),
        explanation=explanation,
        remedy=remedy,
        received=failures.received,
    )


def _example(example: Example, now: float) -> telemetry_pb2.FailedCall:
    detail = example.detail
    return telemetry_pb2.FailedCall(
        ago=duration_to_proto(now - example.at),
        attempts=[
            telemetry_pb2.FailedAttempt(
                endpoint_id=attempt.endpoint_id,
                target=attempt.target,
                code=CODES[attempt.code],
                details=attempt.details,
                elapsed=duration_to_proto(attempt.elapsed),
            )
            for attempt in detail.attempts
        ],
        breaker=_BREAKERS[detail.breaker],
        endpoints_version=detail.snapshot_version,
        snapshot_age=None if detail.snapshot_age is None else duration_to_proto(detail.snapshot_age),
        control_plane=detail.control_plane,
        identity=detail.identity,
        hint=detail.hint,
        trace_id=detail.trace_id,
    )


def finding_to_proto(finding: Finding) -> traffic_pb2.Finding:
    """Something that was found."""
    return traffic_pb2.Finding(
        severity=_SEVERITIES[finding.severity],
        subject=finding.subject,
        message=finding.message,
        remedy=finding.remedy,
    )


def refusals_to_proto(refusals: Refusals) -> traffic_pb2.Refusals:
    """What a policy would have refused."""
    return traffic_pb2.Refusals(
        unauthorized=refusals.unauthorized,
        rate_limited=refusals.rate_limited,
        shed=refusals.shed,
        details=[
            traffic_pb2.RefusedCalls(
                caller=row.caller,
                method=row.method,
                calls=row.calls,
                unauthorized=row.unauthorized,
                rate_limited=row.rate_limited,
                shed=row.shed,
            )
            for row in refusals.details
        ],
    )


def event_impact_to_proto(impact: EventImpact) -> traffic_pb2.EventImpact:
    """What a policy would have done to events."""
    return traffic_pb2.EventImpact(
        paused=impact.paused,
        unauthorized=impact.unauthorized,
        timed_out=impact.timed_out,
        details=[
            traffic_pb2.KeptEvents(
                group=row.group,
                publisher=row.publisher,
                type=row.type,
                handled=row.handled,
                paused=row.paused,
                unauthorized=row.unauthorized,
                timed_out=row.timed_out,
            )
            for row in impact.details
        ],
    )


def shown_to_proto(shown: Shown, now: float, wall: float) -> traffic_pb2.CallRecord:
    """One call that somebody looks at; ``wall`` is the time of day at ``now``, seconds since the epoch."""
    call, at = shown.call, Timestamp()
    at.FromNanoseconds(round((wall - now + shown.at) * 1e9))
    return traffic_pb2.CallRecord(
        at=at,
        caller=shown.caller,
        node_id=shown.node_id,
        call=telemetry_pb2.TappedCall(
            service=shown.service,
            method=call.method,
            code=CODES[call.code],
            took=duration_to_proto(call.took),
            attempts=call.attempts,
            endpoint_id=call.endpoint_id,
            details=call.details,
            trace_id=call.trace_id,
            ago=duration_to_proto(now - shown.at),
        ),
    )
