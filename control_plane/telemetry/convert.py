"""Load reports as they come: checked field by field, so that what is wrong is named, and nothing else gets in."""

from __future__ import annotations

import re
from collections.abc import Iterator

from google.protobuf.duration_pb2 import Duration
from mesh.v1 import telemetry_pb2

from control_plane.subscription import ClientNode
from control_plane.telemetry.recorder import MAX_EVENTS, OutboxReport, ProcessState
from control_plane.telemetry.timeline import CODE_NAMES
from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import AttemptDetail, InvalidValueError, MeshErrorDetail, Reason
from mesh_client.core.events.envelope import check_type
from mesh_client.core.events.state import RelayState
from mesh_client.core.events.topology import check_group
from mesh_client.core.incidents import Example, Transition
from mesh_client.core.load_report import (
    CalledService,
    ConsumedGroup,
    EndpointTotals,
    EventTotals,
    FailureTotals,
    LoadReport,
    MethodTotals,
    ReceivedTotals,
    ServedInstance,
    ServiceState,
    Totals,
)
from mesh_client.core.model import check_endpoint_id, check_service_name
from mesh_client.core.outlier import Ejection, EjectionReason
from mesh_client.core.store import Resolution
from mesh_client.core.tally import BOUNDS, OTHER, is_method
from mesh_client.core.tap import TappedCall

MAX_TEXT = 300
"""Characters of a text that are kept."""
MAX_VERSION = 64
MAX_ATTEMPTS = 10
LONGEST = 10 * 366 * 86_400.0
"""Seconds; no span of time is longer."""

_CALLER = re.compile(r"[a-z0-9:-]{1,80}")
_TRACE = re.compile(r"[0-9a-f]{32}")

_REASONS = {telemetry_pb2.FailureReason.Value(f"FAILURE_REASON_{reason.name}"): reason for reason in Reason}
_BREAKERS = {telemetry_pb2.BreakerState.Value(f"BREAKER_STATE_{state.name}"): state for state in BreakerState}
_EJECTIONS = {telemetry_pb2.EjectionReason.Value(f"EJECTION_REASON_{reason.name}"): reason for reason in EjectionReason}
_RELAYS = {telemetry_pb2.OutboxRelay.Value(f"OUTBOX_RELAY_{state.name}"): state for state in RelayState}
_RESOLUTIONS: dict[int, Resolution] = {
    telemetry_pb2.SERVICE_RESOLUTION_ACTIVE: Resolution.ACTIVE,
    telemetry_pb2.SERVICE_RESOLUTION_UNKNOWN: Resolution.UNKNOWN,
}


def report_from_proto(message: telemetry_pb2.ReportRequest, service: str, now: float) -> LoadReport:
    """The counters of a request.

    Args:
        message: the request.
        service: the service of who reports.
        now: seconds, on the clock that times are to be on.

    Raises:
        InvalidValueError: a name, number or sum is not allowed; the path names it.
    """
    called = tuple(_called(each, f"called[{number}]", now) for number, each in enumerate(message.called))
    served = tuple(_served(each, f"served[{number}]", service) for number, each in enumerate(message.served))
    consumed = tuple(_consumed(each, f"consumed[{number}]") for number, each in enumerate(message.consumed))
    return LoadReport(seconds(message.covers), called, served, consumed)


def process_from_proto(message: telemetry_pb2.ProcessState) -> ProcessState:
    """The process as a whole."""
    expires = float(message.certificate_expires.seconds) if message.HasField("certificate_expires") else None
    outbox = outbox_from_proto(message.outbox) if message.HasField("outbox") else None
    return ProcessState(_text(message.control_plane), expires, _text(message.identity_warning), outbox)


def outbox_from_proto(message: telemetry_pb2.OutboxState) -> OutboxReport:
    """An outbox of events."""
    return OutboxReport(
        message.events,
        message.max_events,
        float(message.oldest.seconds) if message.HasField("oldest") else None,
        message.refused,
        _RELAYS.get(message.relay),
        _text(message.broker),
    )


def tapped_from_proto(message: telemetry_pb2.ReportRequest, now: float) -> Iterator[tuple[int, str, TappedCall]]:
    """The tapped calls of a request: the number of the tap, the service called, and the call.

    Raises:
        InvalidValueError: a name or number is not allowed.
    """
    for number, each in enumerate(message.tapped):
        path = f"tapped[{number}]"
        call = TappedCall(
            _method(each.method, path),
            _code(each.code, path),
            seconds(each.took),
            each.attempts,
            each.endpoint_id and check_endpoint_id(each.endpoint_id, f"{path}.endpoint_id"),
            _text(each.details),
            each.trace_id if _TRACE.fullmatch(each.trace_id) else "",
            now - seconds(each.ago),
        )
        yield each.tap_id, _service(each.service, path), call


def seconds(duration: Duration) -> float:
    """A span of time, at least 0 and at most `LONGEST`."""
    return min(max(duration.seconds + duration.nanos / 1e9, 0.0), LONGEST)


def check_node(node: ClientNode) -> None:
    """Whether who reports can be named so.

    Raises:
        InvalidValueError: it cannot.
    """
    if not 1 <= len(node.id) <= 256:
        raise InvalidValueError("node.id", node.id, "1 to 256 characters")
    if node.service:
        _service(node.service, "node")


def _called(message: telemetry_pb2.CalledService, path: str, now: float) -> CalledService:
    methods = tuple(
        MethodTotals(_method(each.method, path), _totals(each.calls, f"{path}.methods"), each.attempts)
        for each in message.methods
    )
    endpoints = tuple(
        EndpointTotals(check_endpoint_id(each.endpoint_id, f"{path}.endpoint_id"), _totals(each.attempts, path))
        for each in message.endpoints
    )
    failures = tuple(_failure(each, message.service, path, now) for each in message.failures)
    return CalledService(
        _service(message.service, path),
        _state(message.state, path) if message.HasField("state") else None,
        methods,
        endpoints,
        failures,
        tuple(_ejections(message, path, now)),
        tuple(
            Transition(now - seconds(each.ago), _BREAKERS[each.old_state], _BREAKERS[each.new_state])
            for each in message.transitions[-MAX_EVENTS:]
            if each.old_state in _BREAKERS and each.new_state in _BREAKERS
        ),
    )


def _ejections(message: telemetry_pb2.CalledService, path: str, now: float) -> Iterator[Ejection]:
    for each in message.ejections[-MAX_EVENTS:]:
        at = now - seconds(each.ago)
        reason = _EJECTIONS.get(each.reason, EjectionReason.CONSECUTIVE_FAILURES)
        yield Ejection(
            check_endpoint_id(each.endpoint_id, f"{path}.ejections"), at, at + seconds(each.duration), reason
        )


def _state(message: telemetry_pb2.CalledServiceState, path: str) -> ServiceState:
    return ServiceState(
        _RESOLUTIONS.get(message.resolution, Resolution.PENDING),
        message.policy_version[:MAX_VERSION],
        message.endpoints_version[:MAX_VERSION],
        _BREAKERS.get(message.breaker, BreakerState.CLOSED),
        tuple(check_endpoint_id(each, f"{path}.state.ejected") for each in message.ejected[:1000]),
        message.endpoints,
        message.in_flight,
        message.retries,
        message.retry_budget,
    )


def _failure(message: telemetry_pb2.FailureTotals, service: str, path: str, now: float) -> FailureTotals:
    path = f"{path}.failures"
    method, reason = _method(message.method, path), _REASONS.get(message.reason)
    example = None
    if message.HasField("example"):
        example = _example(message.example, service, method, reason, path, now)
    return FailureTotals(method, _code(message.code, path), reason, message.count, example)


def _example(
    message: telemetry_pb2.FailedCall, service: str, method: str, reason: Reason | None, path: str, now: float
) -> Example:
    attempts = tuple(
        AttemptDetail(
            check_endpoint_id(each.endpoint_id, f"{path}.example"),
            _text(each.target),
            _code(each.code, path),
            _text(each.details),
            seconds(each.elapsed),
        )
        for each in message.attempts[-MAX_ATTEMPTS:]
    )
    detail = MeshErrorDetail(
        service,
        method,
        reason or Reason.ATTEMPTS_FAILED,
        attempts,
        _BREAKERS.get(message.breaker, BreakerState.CLOSED).value,
        message.endpoints_version[:MAX_VERSION],
        seconds(message.snapshot_age) if message.HasField("snapshot_age") else None,
        _text(message.control_plane),
        _text(message.hint),
        _text(message.identity),
        message.trace_id if _TRACE.fullmatch(message.trace_id) else "",
    )
    return Example(detail, now - seconds(message.ago))


def _served(message: telemetry_pb2.ServedInstance, path: str, service: str) -> ServedInstance:
    if message.service != service:
        raise InvalidValueError(f"{path}.service", message.service, f"{service!r}, of which the process is")
    return ServedInstance(
        message.service,
        check_endpoint_id(message.instance_id, f"{path}.instance_id"),
        message.in_flight,
        message.peak_in_flight,
        message.unauthorized,
        message.rate_limited,
        message.shed,
        tuple(
            ReceivedTotals(_caller(each.caller, path), _method(each.method, path), _totals(each.calls, path))
            for each in message.received
        ),
    )


def _consumed(message: telemetry_pb2.ConsumedGroup, path: str) -> ConsumedGroup:
    return ConsumedGroup(
        check_group(message.group),
        tuple(
            EventTotals(
                _caller(each.publisher, path),
                each.type if each.type == OTHER else check_type(each.type),
                _totals(each.handled, path),
            )
            for each in message.events
        ),
    )


def _totals(message: telemetry_pb2.Totals, path: str) -> Totals:
    codes = {_code(code, path): count for code, count in message.codes.items() if count}
    buckets = {bucket: count for bucket, count in message.buckets.items() if count}
    if any(bucket > len(BOUNDS) for bucket in buckets):
        raise InvalidValueError(f"{path}.buckets", max(buckets), f"buckets 0 to {len(BOUNDS)}")
    if sum(codes.values()) != sum(buckets.values()):
        raise InvalidValueError(f"{path}.buckets", sum(buckets.values()), f"{sum(codes.values())} calls, as in codes")
    return Totals(codes, buckets)


def _service(name: str, path: str) -> str:
    try:
        return check_service_name(name)
    except InvalidValueError as error:
        raise InvalidValueError(f"{path}.service", name, error.expected) from None


def _method(name: str, path: str) -> str:
    if not is_method(name):
        raise InvalidValueError(f"{path}.method", name, "/package.Service/Method, at most 256 printable characters")
    return name


def _caller(name: str, path: str) -> str:
    if name in ("", OTHER) or _CALLER.fullmatch(name):
        return name
    raise InvalidValueError(f"{path}.caller", name, "a caller as authorization rules name it")


def _code(number: int, path: str) -> str:
    name = CODE_NAMES.get(number)
    if name is None:
        raise InvalidValueError(f"{path}.code", number, "a gRPC status code")
    return name


def _text(text: str) -> str:
    return text[:MAX_TEXT]
