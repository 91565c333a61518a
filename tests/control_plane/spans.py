"""Spans for tests, of which a test says only what it is about."""

from __future__ import annotations

from typing import Any

from control_plane.traces.span import Kind, Process, Span, Status, pack

MS = 1_000_000
BEGINNING = 1_800_000_000 * 10**9
"""When the traces of tests begin, in nanoseconds since 1970."""


def process(service: str = "orders", workload_id: str = "0123456789abcdef", **fields: Any) -> Process:
    return Process(service, workload_id, **fields)


def span(
    number: int,
    parent: int = 0,
    *,
    service: str | Process = "orders",
    start: float = 0.0,
    took: float = 10.0,
    error: str = "",
    attributes: dict[str, str] | None = None,
    **fields: Any,
) -> Span:
    """A span with the id ``number``; times are in milliseconds."""
    begins = BEGINNING + round(start * MS)
    name = fields.pop("name", f"span {number}")
    return Span(
        f"{number:016x}",
        f"{parent:016x}" if parent else "",
        service if isinstance(service, Process) else process(service),
        name,
        begins,
        begins + round(took * MS),
        fields.pop("method", name),
        fields.pop("kind", Kind.INTERNAL),
        Status.ERROR if error else fields.pop("status", Status.UNSET),
        error,
        pack((attributes or {}).items()),
        **fields,
    )


def trace_id(number: int) -> str:
    return f"{number:032x}"
