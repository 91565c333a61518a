"""Load reports as protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import telemetry_pb2

from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import Reason
from mesh_client.core.events.state import OutboxState, RelayState
from mesh_client.core.incidents import Example
from mesh_client.core.load_report import (
    CalledService,
    ConsumedGroup,
    LoadReport,
    ServedInstance,
    ServiceState,
    Totals,
)
from mesh_client.core.model import StatusCode
from mesh_client.core.outlier import EjectionReason
from mesh_client.core.store import Resolution
from mesh_client.core.tap import TapOrder, TappedCall

MAX_DETAILS = 300
"""Characters of a status message that are passed on: they are the application's, and may say anything."""
MAX_ATTEMPTS = 10
MAX_REQUEST = 1024 * 1024
"""Bytes after which a report goes on in another request. Servers take 4 MiB."""

CODE_NUMBERS = {code.name: int(code) for code in StatusCode}
CODE_NAMES = {number: name for name, number in CODE_NUMBERS.items()}
REASONS = {reason: telemetry_pb2.FailureReason.Value(f"FAILURE_REASON_{reason.name}") for reason in Reason}
BREAKERS = {state: telemetry_pb2.BreakerState.Value(f"BREAKER_STATE_{state.name}") for state in BreakerState}
_BREAKERS_BY_VALUE = {state.value: number for state, number in BREAKERS.items()}
_RESOLUTIONS = {
    Resolution.PENDING: telemetry_pb2.SERVICE_RESOLUTION_PENDING,
    Resolution.ACTIVE: telemetry_pb2.SERVICE_RESOLUTION_ACTIVE,
    Resolution.UNKNOWN: telemetry_pb2.SERVICE_RESOLUTION_UNKNOWN,
}
RELAYS = {state: telemetry_pb2.OutboxRelay.Value(f"OUTBOX_RELAY_{state.name}") for state in RelayState}
_EJECTIONS = {reason: telemetry_pb2.EjectionReason.Value(f"EJECTION_REASON_{reason.name}") for reason in EjectionReason}


def requests_of(report: LoadReport, now: float, most: int = MAX_REQUEST) -> Iterator[telemetry_pb2.ReportRequest]:
    """The requests that carry a report, one at least; all but the last say that there are more.

    Args:
        report: what changed.
        now: seconds, on the clock of the report's times.
        most: bytes, about, of one request.
    """
    request, size = telemetry_pb2.ReportRequest(covers=duration(report.covers)), 0
    for called in report.called:
        message = _called(called, now)
        if size and size + message.ByteSize() > most:
            request.more = True
            yield request
            request, size = telemetry_pb2.ReportRequest(covers=duration(report.covers)), 0
        size += message.ByteSize()
        request.called.append(message)
    request.served.extend(map(_served, report.served))
    request.consumed.extend(map(_consumed, report.consumed))
    yield request


def duration(seconds: float) -> Duration:
    """The message; a negative time counts as 0."""
    made = Duration()
    made.FromNanoseconds(max(0, round(seconds * 1e9)))
    return made


def _totals(totals: Totals) -> telemetry_pb2.Totals:
    return telemetry_pb2.Totals(
        codes={CODE_NUMBERS[code]: count for code, count in totals.codes.items()}, buckets=totals.buckets
    )


def _called(called: CalledService, now: float) -> telemetry_pb2.CalledService:
    message = telemetry_pb2.CalledService(service=called.service)
    if called.state is not None:
        message.state.CopyFrom(_state(called.state))
    for method in called.methods:
        message.methods.add(method=method.method, calls=_totals(method.calls), attempts=method.attempts)
    for endpoint in called.endpoints:
        message.endpoints.add(endpoint_id=endpoint.endpoint_id, attempts=_totals(endpoint.attempts))
    for failure in called.failures:
        message.failures.add(
            method=failure.method,
            code=CODE_NUMBERS[failure.code],
            reason=telemetry_pb2.FAILURE_REASON_UNSPECIFIED if failure.reason is None else REASONS[failure.reason],
            count=failure.count,
            example=None if failure.example is None else _failed_call(failure.example, now),
        )
    for ejection in called.ejections:
        message.ejections.add(
            endpoint_id=ejection.endpoint_id,
            reason=_EJECTIONS[ejection.reason],
            ago=duration(now - ejection.at),
            duration=duration(ejection.until - ejection.at),
        )
    for transition in called.transitions:
        message.transitions.add(
            old_state=BREAKERS[transition.old], new_state=BREAKERS[transition.new], ago=duration(now - transition.at)
        )
    return message


def _state(state: ServiceState) -> telemetry_pb2.CalledServiceState:
    return telemetry_pb2.CalledServiceState(
        resolution=_RESOLUTIONS[state.resolution],
        policy_version=state.policy_version,
        endpoints_version=state.endpoints_version,
        breaker=BREAKERS[state.breaker],
        ejected=state.ejected,
        endpoints=state.endpoints,
        in_flight=state.in_flight,
        retries=state.retries,
        retry_budget=state.budget,
    )


def _failed_call(example: Example, now: float) -> telemetry_pb2.FailedCall:
    detail = example.detail
    message = telemetry_pb2.FailedCall(
        ago=duration(now - example.at),
        breaker=_BREAKERS_BY_VALUE[detail.breaker],
        endpoints_version=detail.snapshot_version,
        snapshot_age=None if detail.snapshot_age is None else duration(detail.snapshot_age),
        control_plane=detail.control_plane[:MAX_DETAILS],
        identity=detail.identity[:MAX_DETAILS],
        hint=detail.hint[:MAX_DETAILS],
        trace_id=detail.trace_id,
    )
    for attempt in detail.attempts[-MAX_ATTEMPTS:]:
        message.attempts.add(
            endpoint_id=attempt.endpoint_id,
            target=attempt.target,
            code=CODE_NUMBERS[attempt.code],
            details=attempt.details[:MAX_DETAILS],
            elapsed=duration(attempt.elapsed),
        )
    return message


def _served(served: ServedInstance) -> telemetry_pb2.ServedInstance:
    message = telemetry_pb2.ServedInstance(
        service=served.service,
        instance_id=served.instance_id,
        in_flight=served.in_flight,
        peak_in_flight=served.peak_in_flight,
        unauthorized=served.unauthorized,
        rate_limited=served.rate_limited,
        shed=served.shed,
    )
    for received in served.received:
        message.received.add(caller=received.caller, method=received.method, calls=_totals(received.calls))
    return message


def _consumed(consumed: ConsumedGroup) -> telemetry_pb2.ConsumedGroup:
    message = telemetry_pb2.ConsumedGroup(group=consumed.group)
    for each in consumed.events:
        message.events.add(publisher=each.publisher, type=each.type, handled=_totals(each.handled))
    return message


def outbox_to_proto(outbox: OutboxState, wall: float) -> telemetry_pb2.OutboxState:
    """An outbox; ``wall`` is the time of day, seconds since the epoch."""
    message = telemetry_pb2.OutboxState(
        events=outbox.events,
        max_events=outbox.max_events,
        refused=outbox.refused,
        relay=RELAYS[outbox.relay],
        broker=outbox.broker[:MAX_DETAILS],
    )
    if outbox.oldest_age is not None:
        # Rounded, so that it is the same each time.
        message.oldest.CopyFrom(Timestamp(seconds=round(wall - outbox.oldest_age)))
    return message


def tapped_to_proto(tap_id: int, service: str, call: TappedCall, now: float) -> telemetry_pb2.TappedCall:
    """One call that somebody wanted to see."""
    return telemetry_pb2.TappedCall(
        tap_id=tap_id,
        service=service,
        method=call.method,
        code=CODE_NUMBERS[call.code],
        took=duration(call.took),
        attempts=call.attempts,
        endpoint_id=call.endpoint_id,
        details=call.details[:MAX_DETAILS],
        trace_id=call.trace_id,
        ago=duration(now - call.at),
    )


def orders_from_proto(taps: Iterable[telemetry_pb2.TapOrder], now: float) -> dict[str, list[TapOrder]]:
    """What is tapped, by service; orders that make no sense are left out."""
    orders: dict[str, list[TapOrder]] = {}
    for tap in taps:
        if tap.rate > 0.0:
            order = TapOrder(
                tap.id,
                tap.method or "*",
                frozenset(CODE_NAMES[code] for code in tap.codes if code in CODE_NAMES),
                tap.slower_than.ToTimedelta().total_seconds(),
                tap.rate,
                now + tap.remaining.ToTimedelta().total_seconds(),
            )
            orders.setdefault(tap.service, []).append(order)
    return orders
