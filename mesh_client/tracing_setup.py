"""Sets the OpenTelemetry SDK up for a process, by the environment: only when asked, and so that nothing waits for it.

Needs the ``tracing`` extra. A process that has set a tracer provider itself is left alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

from mesh_client.core.errors import ConfigError
from mesh_client.core.trace_environment import Destination, plan_tracing
from mesh_client.trace_export import MeshSpanExporter, MeshSpanProcessor
from mesh_client.trace_exporters import EXPORTERS

SHUTDOWN_TIMEOUT = 0.5
"""Seconds for which the end of the process is held up by a collector that does not answer."""

_ABORT_TIMEOUT = 0.1
"""Seconds after that in which its exporter, told to give up, does so while there still is a log for what it says."""

log = logging.getLogger(__name__)


class BoundedBatchProcessor(BatchSpanProcessor):
    """The SDK's batch processor, whose end does not wait for a collector that does not answer.

    The SDK's own waits as long as the exporter does, 10 s and more.
    """

    def shutdown(self) -> None:
        """Sends what can be sent within `SHUTDOWN_TIMEOUT`."""
        end: Callable[[], object] = super().shutdown
        ending = threading.Thread(target=end, name="end of tracing", daemon=True)
        try:
            ending.start()
        except RuntimeError:  # the interpreter takes no new threads any more
            end()
            return
        ending.join(SHUTDOWN_TIMEOUT)
        if ending.is_alive():
            log.warning("the last spans are not sent: their collector did not take them within %g s", SHUTDOWN_TIMEOUT)
            with contextlib.suppress(Exception):  # whatever an exporter makes of being ended while it sends
                self.span_exporter.shutdown()
            ending.join(_ABORT_TIMEOUT)


def configure_tracing(
    service: str = "",
    instance: str = "",
    *,
    asked: bool = False,
    environ: Mapping[str, str] | None = None,
    install: bool = True,
) -> TracerProvider | None:
    """Sets tracing up as the environment asks for it; None when it does not.

    The first mesh client or server of a process does it by itself. Whoever calls it before has the provider for spans
    of their own. Spans for the control plane are sent by the mesh clients that use the provider; at the end of the
    process, or with ``provider.shutdown()``, what is left is given `SHUTDOWN_TIMEOUT`.

    Args:
        service: what spans are of, unless the environment says.
        instance: name of this process among those of its service.
        asked: set it up although the environment does not ask for it; it may still forbid it.
        environ: the environment; by default the process's.
        install: make it the process's provider, as `opentelemetry.trace` gives it. Otherwise it is to be given to
            `mesh_client.connect` and `mesh_client.server`.

    Raises:
        ConfigError: a variable is wrong, what it asks for is not installed, or the process has a provider already.
    """
    plan = plan_tracing(os.environ if environ is None else environ, asked=asked)
    if plan is None:
        return None
    if install and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        raise ConfigError("this process has a tracer provider already; give that to mesh_client.connect")
    named = {} if plan.names_service or not service else {SERVICE_NAME: service}
    if instance and not plan.names_instance:
        named[SERVICE_INSTANCE_ID] = instance
    provider = TracerProvider(resource=Resource.create(dict(named)))
    for destination in plan.destinations:
        if destination is Destination.CONTROL_PLANE:
            exporter = EXPORTERS[provider] = MeshSpanExporter(plan.queue, plan.batch, plan.delay)
            provider.add_span_processor(MeshSpanProcessor(exporter))
        else:
            provider.add_span_processor(BoundedBatchProcessor(_stock_exporter(destination)))
    if install:
        trace.set_tracer_provider(provider)
    return provider


def _stock_exporter(destination: Destination) -> SpanExporter:
    if destination is Destination.CONSOLE:
        return ConsoleSpanExporter(out=sys.stdout)
    try:
        if destination is Destination.OTLP_GRPC:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            return GrpcExporter()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; install 'grpc-mesh[tracing]'") from None
