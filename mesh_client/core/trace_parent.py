"""The W3C's ``traceparent``, as far as a log line needs it (https://www.w3.org/TR/trace-context/#traceparent-header)."""

from __future__ import annotations

import re

_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


def trace_id(header: str) -> str:
    """The trace that a call belongs to, 32 hex digits; empty when the header names none."""
    match = _TRACE_PARENT.fullmatch(header)
    return "" if match is None or not match["trace"].strip("0") else match["trace"]
