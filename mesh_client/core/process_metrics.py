"""What the mesh knows in one process, as metrics: its calls, their endpoints, and what its servers receive."""

from __future__ import annotations

from collections.abc import Iterable

from mesh_client.core.breaker import BreakerState
from mesh_client.core.events.metrics import EVENT_FAMILIES
from mesh_client.core.load_report import Server
from mesh_client.core.metric import Family, Kind, MetricSet
from mesh_client.core.model import Health
from mesh_client.core.service import Service
from mesh_client.core.store import Resolution
from mesh_client.core.tally import Tally

_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

FAMILIES: tuple[Family, ...] = (
    Family(
        "grpc_mesh_client_calls_total",
        _COUNTER,
        "Calls that ended, however many attempts they took.",
        ("service", "method", "code"),
    ),
    Family(
        "grpc_mesh_client_call_duration_seconds",
        _HISTOGRAM,
        "How long calls took, all attempts together.",
        ("service", "method"),
    ),
    Family(
        "grpc_mesh_client_failed_calls_total",
        _COUNTER,
        "Calls that did not end with OK, by why the mesh failed them.",
        ("service", "method", "code", "reason"),
    ),
    Family(
        "grpc_mesh_client_attempts_total",
        _COUNTER,
        "Attempts that ended, by endpoint; of those that left long ago the endpoint is empty.",
        ("service", "endpoint", "code"),
    ),
    Family("grpc_mesh_client_retries_total", _COUNTER, "Attempts beyond the first of their call.", ("service",)),
    Family("grpc_mesh_client_retry_budget", _GAUGE, "Retries that the budget has left.", ("service",)),
    Family("grpc_mesh_client_in_flight", _GAUGE, "Calls that are under way.", ("service",)),
    Family(
        "grpc_mesh_client_breaker_state",
        _GAUGE,
        "1 for the state that the service breaker is in, else 0.",
        ("service", "state"),
    ),
    Family(
        "grpc_mesh_client_breaker_transitions_total",
        _COUNTER,
        "How often the service breaker entered a state.",
        ("service", "state"),
    ),
    Family(
        "grpc_mesh_client_endpoints",
        _GAUGE,
        "Endpoints that calls are balanced over, by health as the control plane knows it.",
        ("service", "health"),
    ),
    Family("grpc_mesh_client_ejected_endpoints", _GAUGE, "Endpoints that are ejected.", ("service",)),
    Family("grpc_mesh_client_ejections_total", _COUNTER, "Ejections of endpoints.", ("service", "reason")),
    Family("grpc_mesh_client_service_known", _GAUGE, "1 when the mesh knows the service, else 0.", ("service",)),
    Family(
        "grpc_mesh_client_snapshot_info",
        _GAUGE,
        "1, with the versions that are obeyed.",
        ("service", "policy_version", "endpoints_version"),
    ),
    Family(
        "grpc_mesh_client_snapshot_age_seconds",
        _GAUGE,
        "Time since a control plane confirmed what is held; 0 while it is in sync, none when it never was.",
        ("node",),
    ),
    Family(
        "grpc_mesh_client_control_plane_connected",
        _GAUGE,
        "1 while the discovery stream is open and in sync, else 0.",
        ("node",),
    ),
    Family(
        "grpc_mesh_client_load_reports_total", _COUNTER, "Load reports that were sent to control planes.", ("node",)
    ),
    Family(
        "grpc_mesh_client_load_reports_accepted",
        _GAUGE,
        "1 while a control plane takes them, else 0.",
        ("node",),
    ),
    Family(
        "grpc_mesh_certificate_expiry_timestamp_seconds",
        _GAUGE,
        "When the certificate of this process ends, in seconds since 1970.",
        ("spiffe_id",),
    ),
    Family(
        "grpc_mesh_server_calls_total",
        _COUNTER,
        "Calls that were received and ended, refused ones included; an empty caller is nobody of the mesh.",
        ("service", "endpoint", "method", "code", "caller"),
    ),
    Family(
        "grpc_mesh_server_call_duration_seconds",
        _HISTOGRAM,
        "How long received calls took.",
        ("service", "endpoint", "method"),
    ),
    Family("grpc_mesh_server_in_flight", _GAUGE, "Received calls that are under way.", ("service", "endpoint")),
    Family(
        "grpc_mesh_server_refused_calls_total",
        _COUNTER,
        "Received calls that were refused: for who called, by a rate limit, or because too many were in flight.",
        ("service", "endpoint", "why"),
    ),
    Family(
        "grpc_mesh_server_serving",
        _GAUGE,
        "1 while the server serves and passes its own check, else 0.",
        ("service", "endpoint"),
    ),
    *EVENT_FAMILIES,
)
"""Every metric of a process that uses the library."""


def add_services(metrics: MetricSet, services: Iterable[Service], now: float) -> None:
    """What is known of the services that a process calls."""
    for service in services:
        _add_calls(metrics, service)
        _add_state(metrics, service, now)


def _add_calls(metrics: MetricSet, service: Service) -> None:
    name = service.name
    for method, tally in service.calls_by_method().items():
        for code, count in _codes(tally):
            metrics.add("grpc_mesh_client_calls_total", (name, method, code), count)
        metrics.durations("grpc_mesh_client_call_duration_seconds", (name, method), tally)
    for (method, code, reason), count in list(service.failed_calls.items()):
        metrics.add("grpc_mesh_client_failed_calls_total", (name, method, code, reason.name), count)
    for endpoint_id, tallies in service.tallies:
        for tally in tallies.values():
            for code, count in _codes(tally):
                metrics.add("grpc_mesh_client_attempts_total", (name, endpoint_id, code), count)


def _add_state(metrics: MetricSet, service: Service, now: float) -> None:
    name, incidents = service.name, service.incidents
    metrics.add("grpc_mesh_client_retries_total", (name,), service.retries)
    metrics.add("grpc_mesh_client_retry_budget", (name,), service.budget.balance(now))
    metrics.add("grpc_mesh_client_in_flight", (name,), service.gate.in_flight)
    now_in = service.breaker.state(now)
    for state in BreakerState:
        metrics.top("grpc_mesh_client_breaker_state", (name, state.value), float(state is now_in))
        metrics.add("grpc_mesh_client_breaker_transitions_total", (name, state.value), incidents.entered[state])
    nodes = list(service.nodes)
    for health in (Health.HEALTHY, Health.UNHEALTHY):
        count = sum(node.endpoint.health is health for node in nodes)
        metrics.top("grpc_mesh_client_endpoints", (name, health.value), count)
    metrics.top("grpc_mesh_client_ejected_endpoints", (name,), len(service.outliers.ejected))
    for reason, count in list(incidents.ejected.items()):
        metrics.add("grpc_mesh_client_ejections_total", (name, reason.name), count)
    known = service.resolution is Resolution.ACTIVE
    metrics.top("grpc_mesh_client_service_known", (name,), float(known))
    if known:
        versions = (service.policy_version, service.endpoints_version)
        metrics.top("grpc_mesh_client_snapshot_info", (name, *versions), 1.0)


def add_process(
    metrics: MetricSet,
    node: str,
    *,
    age: float | None,
    in_sync: bool,
    reports: tuple[int, bool] | None,
    certificate: tuple[str, float | None] | None,
) -> None:
    """What is known of one mesh client as a whole.

    Args:
        metrics: where it goes.
        node: its id.
        age: seconds since what it holds was confirmed; None when it never was.
        in_sync: whether it is now.
        reports: load reports that were sent, and whether a control plane takes them; None when there are none.
        certificate: the SPIFFE ID, and when the certificate ends, seconds since the epoch; None in plaintext.
    """
    if age is not None:
        metrics.top("grpc_mesh_client_snapshot_age_seconds", (node,), age)
    metrics.top("grpc_mesh_client_control_plane_connected", (node,), float(in_sync))
    if reports is not None:
        metrics.add("grpc_mesh_client_load_reports_total", (node,), reports[0])
        metrics.top("grpc_mesh_client_load_reports_accepted", (node,), float(reports[1]))
    if certificate is not None and certificate[1] is not None:
        metrics.top("grpc_mesh_certificate_expiry_timestamp_seconds", (certificate[0],), certificate[1])


def add_server(metrics: MetricSet, server: Server, *, serving: bool) -> None:
    """What is known of one server."""
    where, book = (server.service, server.instance_id), server.book
    for method, tallies in book:
        for caller, tally in tallies.items():
            for code, count in _codes(tally):
                metrics.add("grpc_mesh_server_calls_total", (*where, method, code, caller), count)
            metrics.durations("grpc_mesh_server_call_duration_seconds", (*where, method), tally)
    metrics.add("grpc_mesh_server_in_flight", where, server.in_flight)
    for why, count in (
        ("unauthorized", book.unauthorized),
        ("rate_limit", book.rate_limited),
        ("concurrency_limit", book.shed),
    ):
        metrics.add("grpc_mesh_server_refused_calls_total", (*where, why), count)
    metrics.top("grpc_mesh_server_serving", where, float(serving))


def _codes(tally: Tally) -> list[tuple[str, int]]:
    return [(code, count) for code, count in (("OK", tally.ok), *tally.failures.items()) if count]
