"""Which tracer providers of this process send their spans to the control plane, without importing the SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.trace_export import MeshSpanExporter

EXPORTERS: WeakKeyDictionary[TracerProvider, MeshSpanExporter] = WeakKeyDictionary()
"""Their exporters: the mesh clients that make spans with a provider send its spans."""
