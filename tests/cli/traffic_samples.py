"""Fixed answers about traffic, from which golden files are made."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import telemetry_pb2, traffic_pb2

from mesh_client.core.policy import ServicePolicy
from tests.cli.samples import policy, span

PLACE, GET = "/shop.v1.OrderService/PlaceOrder", "/shop.v1.OrderService/GetOrder"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
OK, UNAVAILABLE = 0, 14


def stats(
    count: int, rate: float, success: float | None, milliseconds: tuple[float, float, float] | None = None
) -> traffic_pb2.TrafficStats:
    made = traffic_pb2.TrafficStats(count=count, rate=rate, success_rate=success)
    if count:
        bad = 0 if success is None else round(count * (1 - success))
        made.codes[OK] = count - bad
        if bad:
            made.codes[UNAVAILABLE] = bad
    for name, value in zip(("p50", "p95", "p99"), milliseconds or (), strict=False):
        getattr(made, name).CopyFrom(span(value / 1000))
    return made


def traffic() -> traffic_pb2.GetTrafficResponse:
    """A mesh in which one edge has trouble."""
    return traffic_pb2.GetTrafficResponse(
        window=span(60),
        reporting=7,
        edges=[
            traffic_pb2.EdgeTraffic(
                caller="", service="orders", calls=stats(60, 1.0, 1.0, (2.1, 4.2, 4.2)), processes=1, total=180
            ),
            traffic_pb2.EdgeTraffic(
                caller="checkout",
                service="orders",
                calls=stats(7401, 123.4, 0.99958, (3.36, 9.51, 22.6)),
                retries=31,
                in_flight=4,
                processes=3,
                breakers_open=1,
                ejected=["orders-2"],
                total=912_211,
            ),
            traffic_pb2.EdgeTraffic(
                caller="edge", service="orders", calls=stats(52, 0.87, 1.0, (2.5, 4.2, 6.7)), total=52, received=True
            ),
            traffic_pb2.EdgeTraffic(caller="orders", service="inventory", calls=stats(0, 0.0, None), processes=2),
            traffic_pb2.EdgeTraffic(
                caller="orders",
                service="payments",
                calls=stats(600, 10.04, 0.9, (55.0, 1250.0, 1250.0)),
                retries=60,
                processes=2,
                ejected=["payments-1"],
                total=5_000,
            ),
        ],
        events=[
            traffic_pb2.EventTraffic(
                publisher="orders",
                service="notifications",
                group="notifications",
                type="shop.v1.OrderPlaced",
                handled=stats(462, 7.7, 1.0, (3.0, 4.2, 5.0)),
            ),
            traffic_pb2.EventTraffic(
                publisher="orders",
                service="shipping",
                group="labels",
                type="shop.v1.OrderPlaced",
                handled=stats(470, 7.83, 0.983, (9.0, 20.0, 45.2)),
            ),
        ],
    )


def traffic_of_orders() -> traffic_pb2.GetTrafficResponse:
    """The same for one service."""
    answer = traffic()
    answer.methods.add(method=GET, calls=stats(7000, 116.7, 1.0, (3.0, 5.0, 9.0)))
    answer.methods.add(method=PLACE, calls=stats(461, 7.7, 0.993, (20.0, 90.5, 181.0)), retries=31)
    answer.endpoints.add(endpoint_id="orders-1", attempts=stats(7460, 124.3, 1.0, (3.0, 9.0, 20.0)))
    answer.endpoints.add(endpoint_id="orders-2", attempts=stats(32, 0.5, 0.03125, (1.2, 1.2, 1.4)), ejected_by=3)
    return answer


def failed_call() -> telemetry_pb2.FailedCall:
    return telemetry_pb2.FailedCall(
        ago=span(4.2),
        attempts=[
            telemetry_pb2.FailedAttempt(
                endpoint_id="orders-2",
                target="10.0.0.8:5001",
                code=UNAVAILABLE,
                details="failed to connect to all addresses; last error: Connection refused",
                elapsed=span(0.0012),
            ),
            telemetry_pb2.FailedAttempt(
                endpoint_id="orders-1", target="10.0.0.7:5001", code=UNAVAILABLE, elapsed=span(0.0009)
            ),
        ],
        breaker=telemetry_pb2.BREAKER_STATE_CLOSED,
        endpoints_version="8f8b614b46d91f1d",
        snapshot_age=span(0),
        control_plane="10.0.0.2:7070 connected",
        identity="certificate valid for 23 h",
        trace_id=TRACE,
    )


def failures() -> list[traffic_pb2.FailureGroup]:
    return [
        traffic_pb2.FailureGroup(
            caller="checkout",
            service="orders",
            method=PLACE,
            code=UNAVAILABLE,
            reason=telemetry_pb2.FAILURE_REASON_ATTEMPTS_FAILED,
            count=17,
            example=failed_call(),
            explanation="no connection to an instance could be made",
            remedy="see in `mesh endpoints orders` where they should run",
        ),
        traffic_pb2.FailureGroup(
            caller="",
            service="orders",
            method=GET,
            code=5,
            reason=telemetry_pb2.FAILURE_REASON_ATTEMPTS_FAILED,
            count=1,
            explanation="the application answered so",
        ),
        traffic_pb2.FailureGroup(
            caller="edge",
            service="orders",
            method=GET,
            code=7,
            count=1,
            explanation="instances refused the caller",
            remedy="`mesh policy check edge shop.v1.OrderService/GetOrder` says why",
            received=True,
        ),
    ]


def explanation() -> traffic_pb2.ExplainResponse:
    """A service in trouble."""
    return traffic_pb2.ExplainResponse(
        service="orders",
        findings=[
            traffic_pb2.Finding(
                severity=traffic_pb2.SEVERITY_ERROR,
                subject="breaker",
                message="the breaker is open in 1 of 3 processes of checkout, since 12 s: they fail its calls at once",
                remedy="it opened because calls failed in a row; it closes by itself when a probe succeeds",
            ),
            traffic_pb2.Finding(
                severity=traffic_pb2.SEVERITY_WARNING,
                subject="endpoints",
                message="1 healthy, 1 unhealthy: orders-2",
                remedy="see why they fail their checks; clients avoid them meanwhile",
            ),
            traffic_pb2.Finding(
                severity=traffic_pb2.SEVERITY_OK, subject="versions", message="all hold what is published"
            ),
        ],
        failures=failures(),
        calls=stats(7401, 123.4, 0.9977, (3.36, 9.51, 22.6)),
    )


def calm() -> traffic_pb2.ExplainResponse:
    """A service that is well."""
    return traffic_pb2.ExplainResponse(
        service="inventory",
        findings=[
            traffic_pb2.Finding(severity=traffic_pb2.SEVERITY_OK, subject="endpoints", message="3 healthy"),
        ],
    )


def tapped() -> list[traffic_pb2.TapResponse]:
    """What somebody sees who taps orders."""
    at = Timestamp()
    at.FromJsonString("2026-11-23T12:00:01.234567Z")
    records = [
        traffic_pb2.CallRecord(
            at=at,
            caller="checkout",
            node_id="checkout-7f3a91",
            call=telemetry_pb2.TappedCall(
                service="orders",
                method=PLACE,
                code=OK,
                took=span(0.0123),
                attempts=1,
                endpoint_id="orders-1",
                ago=span(0.1),
            ),
        ),
        traffic_pb2.CallRecord(
            at=at,
            caller="checkout",
            node_id="checkout-7f3a91",
            call=telemetry_pb2.TappedCall(
                service="orders",
                method=PLACE,
                code=UNAVAILABLE,
                took=span(0.0312),
                attempts=3,
                endpoint_id="orders-2",
                details="failed to connect\nto all addresses",
                trace_id=TRACE,
            ),
        ),
        traffic_pb2.CallRecord(
            at=at, call=telemetry_pb2.TappedCall(service="orders", method=GET, code=14, details="no endpoints")
        ),
    ]
    return [
        traffic_pb2.TapResponse(processes=3),
        traffic_pb2.TapResponse(calls=records[:2], processes=3),
        traffic_pb2.TapResponse(calls=records[2:], dropped=7, processes=3),
    ]


def tried() -> traffic_pb2.TryPolicyResponse:
    """A policy that would have refused some calls."""
    return traffic_pb2.TryPolicyResponse(
        window=span(600),
        calls=74_010,
        instances=2,
        proposed=traffic_pb2.Refusals(
            unauthorized=310,
            rate_limited=42,
            shed=5,
            details=[
                traffic_pb2.RefusedCalls(caller="reviews", method=PLACE, calls=310, unauthorized=310),
                traffic_pb2.RefusedCalls(caller="checkout", method=PLACE, calls=9_400, rate_limited=42, shed=5),
            ],
        ),
        current=traffic_pb2.Refusals(rate_limited=90),
        current_policy=policy({"service": "orders", "timeout": "1s", "retry": {"max_attempts": 2}}),
    )


def tried_events() -> traffic_pb2.TryPolicyResponse:
    """A policy that would have kept some events from their handlers, of a service that nobody calls."""
    placed, shipped = "shop.v1.OrderPlaced", "shop.v1.OrderShipped"
    return traffic_pb2.TryPolicyResponse(
        window=span(600),
        current_policy=policy({"service": "shipping"}),
        handled=2_100,
        proposed_events=traffic_pb2.EventImpact(
            paused=400,
            unauthorized=7,
            timed_out=12,
            details=[
                traffic_pb2.KeptEvents(group="reports", publisher="shipping", type=shipped, handled=400, paused=400),
                traffic_pb2.KeptEvents(group="shipping", publisher="orders", type=placed, handled=1_693, timed_out=12),
                traffic_pb2.KeptEvents(group="shipping", publisher="reviews", type=placed, handled=7, unauthorized=7),
            ],
        ),
        current_events=traffic_pb2.EventImpact(timed_out=31),
    )


def untried(document: dict[str, object]) -> traffic_pb2.TryPolicyResponse:
    """A policy that is in force, of a service whose instances report nothing."""
    ServicePolicy.parse(document)
    return traffic_pb2.TryPolicyResponse(window=span(42), current_policy=policy(document))
