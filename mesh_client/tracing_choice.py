"""Whether this process traces, without importing what only tracing needs."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from mesh_client.core.errors import ConfigError
from mesh_client.core.trace_environment import SWITCH, plan_tracing
from mesh_client.trace_exporters import EXPORTERS

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.trace_sender import TraceSender
    from mesh_client.tracing import Tracing
    from mesh_client.transport import Transport

_SDK = "opentelemetry.sdk"

log = logging.getLogger(__name__)

_asked = False
"""Whether the environment has been looked at: a process has one tracer provider, for good."""


def choose_tracing(service: str, provider: TracerProvider | None, instance: str = "") -> Tracing | None:
    """Makes spans with this tracer provider, else with the process's as it is now; None where there is none.

    A process that has none gets one if its environment asks for tracing.

    Args:
        service: of this process; empty for none.
        provider: of tracers, or None.
        instance: name of this process among those of its service.

    Raises:
        ConfigError: the environment asks for tracing wrongly, or for what is not installed.
    """
    if provider is None:
        _obey_environment(service, instance)
        if "opentelemetry.trace" not in sys.modules:  # nobody can have set one
            return None
    from mesh_client.tracing import Tracing

    return Tracing.of_process(service) if provider is None else Tracing(provider, service)


def send_traces(
    provider: TracerProvider | None, transport: Transport, addresses: Sequence[str], rng: Random
) -> TraceSender | None:
    """Sends what the provider, or the process's, has for the control plane, from the running event loop.

    None when its spans go elsewhere, or there is none.

    Args:
        provider: of tracers, or None.
        transport: started.
        addresses: control planes, the preferred one first.
        rng: draws waits.
    """
    if not EXPORTERS:
        return None
    from opentelemetry.trace import get_tracer_provider

    exporter = EXPORTERS.get(provider or get_tracer_provider())
    return None if exporter is None else exporter.attach(transport, addresses, rng)


def _obey_environment(service: str, instance: str) -> None:
    global _asked  # noqa: PLW0603 - of the process
    if _asked:
        return
    plan = plan_tracing(os.environ)
    _asked = True
    if plan is None:
        return
    if not _is_installed():
        explanation = f"tracing is asked for, and {_SDK} is not installed; install 'grpc-mesh[tracing]'"
        if plan.by_name:
            raise ConfigError(f"{SWITCH}: {explanation}")
        log.warning("%s, or set %s=0", explanation, SWITCH)
        return
    from opentelemetry.trace import ProxyTracerProvider, get_tracer_provider

    if not isinstance(get_tracer_provider(), ProxyTracerProvider):
        log.info("this process has a tracer provider: tracing is not set up by the environment")
        return
    from mesh_client.tracing_setup import configure_tracing

    configure_tracing(service, instance)


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec(_SDK) is not None
    except ModuleNotFoundError:  # nor is what it is part of
        return False
