"""Whether this process traces, without importing what only tracing needs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.tracing import Tracing


def choose_tracing(service: str, provider: TracerProvider | None) -> Tracing | None:
    """Makes spans with this tracer provider, else with the process's as it is now; None where there is none.

    Args:
        service: of this process; empty for none.
        provider: of tracers, or None.
    """
    if provider is None and "opentelemetry.trace" not in sys.modules:  # nobody can have set one
        return None
    from mesh_client.tracing import Tracing

    return Tracing.of_process(service) if provider is None else Tracing(provider, service)
