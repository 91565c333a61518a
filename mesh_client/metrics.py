"""Prometheus metrics of everything that the mesh does in this process.

Nothing is counted for them: they are read off what calls, balancing and servers know anyway, when somebody asks. Needs
the ``metrics`` extra: ``pip install 'grpc-mesh[metrics]'``.

>>> prometheus_client.REGISTRY.register(mesh_client.metrics.MeshCollector())

adds them to what a process exposes already; `mesh_client.Mesh.serve_metrics`, or MESH_METRICS, exposes them alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from weakref import WeakSet

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mesh_client.core.metric import HISTOGRAM_BOUNDS, Histogram, Kind, MetricSet
from mesh_client.core.process_metrics import FAMILIES
from mesh_client.observed import CLIENTS, SERVERS, ObservedClient, ObservedServer

_FAMILIES = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


class MeshCollector(Collector):
    """Collects what all mesh clients and servers of this process know, or only some of them.

    Args:
        clients: which clients; by default all.
        servers: which servers; by default all.
    """

    def __init__(
        self,
        clients: Iterable[ObservedClient] | None = None,
        servers: Iterable[ObservedServer] | None = None,
    ) -> None:
        self._clients = CLIENTS if clients is None else WeakSet(clients)
        self._servers = SERVERS if servers is None else WeakSet(servers)

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment; those without a value are there too. May be called from any thread."""
        metrics = MetricSet(FAMILIES)
        now = time.time()
        for client in list(self._clients):
            client.add_metrics(metrics, now)
        for server in list(self._servers):
            server.add_metrics(metrics)
        return families_of(metrics)


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
                made.add_metric(labels, _buckets(value), value.seconds)
            else:
                made.add_metric(labels, value)
        yield made


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(floatToGoString, HISTOGRAM_BOUNDS), "+Inf"]
    return list(zip(bounds, histogram.buckets, strict=True))


def exposition(collector: Collector, accept: str) -> tuple[bytes, str]:
    """What a scrape is answered: the body and its content type, as text or OpenMetrics.

    Args:
        collector: what is exposed.
        accept: the request's ``Accept`` header.
    """
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        encode, content_type = choose_encoder("")
    return encode(collector), content_type
