"""Ids of traces and spans for the OpenTelemetry SDK, by which the mesh decides on sampling before it makes a span."""

from __future__ import annotations

import threading
from random import getrandbits

from opentelemetry.sdk.trace.id_generator import IdGenerator


class PredrawnIds(IdGenerator):
    """Random ids, but that a root span can be given the trace id that decided on its sampling.

    For ``TracerProvider(id_generator=PredrawnIds())``. With another generator the sampler has to be asked about each
    call anew, and making a span that is then not kept costs several times what everything else of the mesh does.
    """

    def __init__(self) -> None:
        self._next = threading.local()

    def draw(self, trace_id: int) -> None:
        """The next trace id that this thread asks for."""
        self._next.trace_id = trace_id

    def generate_trace_id(self) -> int:
        """A trace id of 128 bits, not 0."""
        drawn: int = getattr(self._next, "trace_id", 0)
        self._next.trace_id = 0
        return drawn or getrandbits(128) or 1

    def generate_span_id(self) -> int:
        """A span id of 64 bits, not 0."""
        return getrandbits(64) or 1

    def is_trace_id_random(self) -> bool:
        """Whether trace ids are random (W3C Trace Context, level 2): they are."""
        return True
