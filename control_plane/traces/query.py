"""What is asked of traces."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from control_plane.traces.trace import Trace
from mesh_client.core.errors import InvalidValueError

_ID_PREFIX = re.compile(r"[0-9a-f]{1,32}")


@dataclass(frozen=True, slots=True)
class TraceFilter:
    """Which traces are wanted: those that have, among the spans of the service and method, what else is asked for.

    Attributes:
        service: name of a service; empty for any.
        method: full name of a method, ``package.Service/*`` for all of a service's, or a method's name alone; empty for
            any.
        errors: a span failed.
        min_duration: a span took at least as long, in nanoseconds.
    """

    service: str = ""
    method: str = ""
    errors: bool = False
    min_duration: int = 0

    def matches(self, trace: Trace) -> bool:
        """Whether the trace is wanted."""
        if self.service and not trace.has_service(self.service):
            return False
        if self.errors and not trace.errors:
            return False
        if not (self.service or self.method):
            return trace.duration >= self.min_duration
        covers = _method_test(self.method)
        spans = [span for span in trace.spans if self.service in {"", span.service} and covers(span.method)]
        return (
            bool(spans)
            and (not self.errors or any(span.failed for span in spans))
            and max(span.duration for span in spans) >= self.min_duration
        )


def _method_test(pattern: str) -> Callable[[str], bool]:
    pattern = pattern.removeprefix("/")
    if not pattern:
        return lambda _: True
    if pattern.endswith("/*"):
        return lambda method: method.startswith(pattern[:-1])
    if "/" in pattern:
        return lambda method: method == pattern
    return lambda method: method.rpartition("/")[2] == pattern


def check_id_prefix(text: str) -> str:
    """The beginning of a trace id, in lower case.

    Raises:
        InvalidValueError: it is none.
    """
    prefix = text.strip().lower()
    if not _ID_PREFIX.fullmatch(prefix):
        raise InvalidValueError("trace_id", text, "a trace id or its beginning: 1 to 32 hex digits")
    return prefix
