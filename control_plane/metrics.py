"""Prometheus metrics of a control plane, read off what it knows when somebody asks."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from control_plane.access import Access
from control_plane.catalog import Catalog
from control_plane.discovery import StreamHub
from control_plane.edges import EdgeHub
from control_plane.identity.certificate_authority import CertificateAuthority
from control_plane.policies import PolicyBook
from control_plane.publisher import Publisher
from control_plane.telemetry.station import Telemetry
from mesh_client.core.events.state import RelayState
from mesh_client.core.metric import HISTOGRAM_BOUNDS, Family, Histogram, Kind, MetricSet
from mesh_client.core.model import Health
from mesh_client.core.policy import ServicePolicy

if TYPE_CHECKING:
    from control_plane.event_publisher import EventPublisher

_COUNTER, _GAUGE = Kind.COUNTER, Kind.GAUGE
_PREFIX = "grpc_mesh_control_plane_"

FAMILIES: tuple[Family, ...] = (
    Family(f"{_PREFIX}info", _GAUGE, "1, with the name of this control plane.", ("control_plane", "trust_domain")),
    Family(f"{_PREFIX}start_time_seconds", _GAUGE, "When it started, in seconds since 1970."),
    Family(
        f"{_PREFIX}streams",
        _GAUGE,
        "Open streams of clients (discovery), of reporting processes (load_reports) and of gateways (edges).",
        ("kind",),
    ),
    Family(f"{_PREFIX}services", _GAUGE, "Services that are known."),
    Family(f"{_PREFIX}endpoints", _GAUGE, "Endpoints by health; those that drain are not published.", ("health",)),
    Family(
        f"{_PREFIX}push_latency_seconds",
        Kind.HISTOGRAM,
        "From a change's coming in to its acknowledgement by a client.",
    ),
    Family(f"{_PREFIX}responses_total", _COUNTER, "Responses that were sent on discovery streams."),
    Family(f"{_PREFIX}rejections_total", _COUNTER, "Responses that clients rejected."),
    Family(
        f"{_PREFIX}lagging_subscriptions",
        _GAUGE,
        "Subscriptions that have not acknowledged what is published: rejected it, or not answered yet.",
        ("why",),
    ),
    Family(f"{_PREFIX}snapshots_total", _COUNTER, "Snapshots that were published."),
    Family(f"{_PREFIX}source_up", _GAUGE, "1 while a registry or policy store can be read, else 0.", ("source",)),
    Family(
        f"{_PREFIX}source_lag_seconds",
        _GAUGE,
        "How long what a source said last has been all that is known: 0 while it can be read.",
        ("source",),
    ),
    Family(f"{_PREFIX}held_endpoints", _GAUGE, "Endpoints that the mass removal guard keeps published."),
    Family(f"{_PREFIX}policy_problems", _GAUGE, "Stored policies that are invalid and not obeyed."),
    Family(
        f"{_PREFIX}certificates_issued_total",
        _COUNTER,
        "Certificates that were signed: first ones (issued) and further ones (renewed).",
        ("kind",),
    ),
    Family(
        f"{_PREFIX}issuer_expiry_timestamp_seconds",
        _GAUGE,
        "When what signs certificates ends, in seconds since 1970.",
    ),
    Family(f"{_PREFIX}denied_requests_total", _COUNTER, "Requests that were refused because of who asked."),
    Family(f"{_PREFIX}reporting_processes", _GAUGE, "Processes that report their load, or lately did.", ("state",)),
    Family(f"{_PREFIX}load_reports_total", _COUNTER, "Load reports that were taken in."),
    Family(f"{_PREFIX}load_reports_refused_total", _COUNTER, "Load reports that were malformed or could not be true."),
    Family(
        f"{_PREFIX}load_report_names",
        _GAUGE,
        "Names that the window of load reports holds, of the 10000 that it has room for.",
    ),
    Family(
        f"{_PREFIX}load_report_counters_ignored_total",
        _COUNTER,
        "Reported counters that there was no room for.",
    ),
    Family(f"{_PREFIX}taps", _GAUGE, "Operators that look at single calls now."),
    Family(
        f"{_PREFIX}events_published_total",
        _COUNTER,
        "Events of the mesh that were put into the outbox for the broker.",
        ("type",),
    ),
    Family(f"{_PREFIX}events_dropped_total", _COUNTER, "Events of the mesh that there was no room for."),
    Family(f"{_PREFIX}outbox_events", _GAUGE, "Events of the mesh that wait for the broker."),
    Family(
        f"{_PREFIX}outbox_relay_state",
        _GAUGE,
        "1 for the state of what sends events of the mesh, else 0; none without a broker.",
        ("state",),
    ),
)
"""Every metric of a control plane."""

_FAMILIES = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Observed:
    """The parts of a control plane that have something to tell."""

    control_plane: str
    catalog: Catalog
    book: PolicyBook[ServicePolicy]
    publisher: Publisher
    hub: StreamHub
    edges: EdgeHub
    access: Access
    telemetry: Telemetry
    authority: CertificateAuthority | None
    events: EventPublisher | None = None


class ControlPlaneCollector(Collector):
    """Collects what a control plane knows. In its event loop.

    Args:
        observed: its parts.
    """

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._started_at = time.time()

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment; those without a value are there too."""
        metrics = MetricSet(FAMILIES)
        metrics.add(f"{_PREFIX}start_time_seconds", (), self._started_at)
        _add(metrics, self._observed)
        return families_of(metrics)


def _add(metrics: MetricSet, observed: Observed) -> None:
    now = asyncio.get_running_loop().time()
    metrics.add(f"{_PREFIX}info", (observed.control_plane, observed.access.trust_domain), 1.0)
    _add_catalog(metrics, observed, now)
    _add_streams(metrics, observed)
    _add_telemetry(metrics, observed.telemetry, now)
    metrics.add(f"{_PREFIX}policy_problems", (), len(observed.book.problems))
    metrics.add(f"{_PREFIX}denied_requests_total", (), observed.access.denials.total())
    if observed.authority is not None:
        for kind in ("issued", "renewed"):
            issued = observed.authority.issuance.issued[kind]
            metrics.add(f"{_PREFIX}certificates_issued_total", (kind,), issued)
        metrics.add(f"{_PREFIX}issuer_expiry_timestamp_seconds", (), observed.authority.signs_until)
    if observed.events is not None:
        _add_events(metrics, observed.events)


def _add_events(metrics: MetricSet, events: EventPublisher) -> None:
    for message_type, count in events.published.items():
        metrics.add(f"{_PREFIX}events_published_total", (message_type,), count)
    metrics.add(f"{_PREFIX}events_dropped_total", (), events.dropped)
    if (outbox := events.outbox) is not None:
        metrics.add(f"{_PREFIX}outbox_events", (), outbox.events)
        for state in RelayState:
            if state is not RelayState.NO_BROKER:
                metrics.add(f"{_PREFIX}outbox_relay_state", (state.value,), float(state is outbox.relay))


def _add_catalog(metrics: MetricSet, observed: Observed, now: float) -> None:
    view = observed.catalog.view(now)
    health = Counter(record.endpoint.health for service in view.services.values() for record in service.records)
    metrics.add(f"{_PREFIX}services", (), len(view.services))
    for each in Health:
        metrics.add(f"{_PREFIX}endpoints", (each.value,), health[each])
    for source in view.sources:
        metrics.add(f"{_PREFIX}source_up", (source.name,), float(source.connected))
        metrics.add(f"{_PREFIX}source_lag_seconds", (source.name,), 0.0 if source.connected else now - source.since)
    metrics.add(f"{_PREFIX}held_endpoints", (), 0 if view.hold is None else view.hold.endpoints)


def _add_streams(metrics: MetricSet, observed: Observed) -> None:
    clients, figures, snapshot = observed.hub.clients(), observed.hub.figures, observed.publisher.snapshot
    lagging: Counter[str] = Counter()
    for client in clients:
        for state in client.subscriptions:
            current = snapshot.get(state.kind, state.service)
            version = "" if current is None else current.version
            if state.acknowledged_version != version:
                lagging["rejected" if state.rejected_version == version else "waiting"] += 1
    for why in ("rejected", "waiting"):
        metrics.add(f"{_PREFIX}lagging_subscriptions", (why,), lagging[why])
    metrics.add(f"{_PREFIX}streams", ("discovery",), len(clients))
    metrics.add(f"{_PREFIX}streams", ("load_reports",), observed.telemetry.reports.streams)
    metrics.add(f"{_PREFIX}streams", ("edges",), observed.edges.streams)
    metrics.add(f"{_PREFIX}responses_total", (), figures.responses)
    metrics.add(f"{_PREFIX}rejections_total", (), figures.rejections)
    metrics.durations(f"{_PREFIX}push_latency_seconds", (), figures.pushes)
    metrics.add(f"{_PREFIX}snapshots_total", (), observed.publisher.published)


def _add_telemetry(metrics: MetricSet, telemetry: Telemetry, now: float) -> None:
    recorder, window = telemetry.recorder, telemetry.window
    recorder.expire(now)
    connected = recorder.connected
    metrics.add(f"{_PREFIX}reporting_processes", ("connected",), connected)
    metrics.add(f"{_PREFIX}reporting_processes", ("gone",), len(recorder.reporters) - connected)
    metrics.add(f"{_PREFIX}load_reports_total", (), recorder.taken)
    metrics.add(f"{_PREFIX}load_reports_refused_total", (), telemetry.reports.refused)
    metrics.add(f"{_PREFIX}load_report_names", (), len(window))
    metrics.add(f"{_PREFIX}load_report_counters_ignored_total", (), recorder.ignored)
    metrics.add(f"{_PREFIX}taps", (), len(telemetry.taps))


class Collected(Collector):
    """Metrics as they were when they were collected."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterable[Metric]:
        """Those."""
        return self._metrics


def families_of(metrics: MetricSet) -> Iterator[Metric]:
    """Metrics as prometheus_client has them."""
    for family, values in metrics:
        made = _FAMILIES[family.kind](family.name, family.help, labels=family.labels)
        for labels, value in values.items():
            if isinstance(value, Histogram):
                bounds = [*map(floatToGoString, HISTOGRAM_BOUNDS), "+Inf"]
                made.add_metric(labels, list(zip(bounds, value.buckets, strict=True)), value.seconds)
            else:
                made.add_metric(labels, value)
        yield made
