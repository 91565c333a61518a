from __future__ import annotations

import pytest

from mesh_client.core.trace_parent import trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_the_trace_is_read() -> None:
    assert trace_id(f"00-{TRACE}-00f067aa0ba902b7-01") == TRACE
    assert trace_id(f"01-{TRACE}-00f067aa0ba902b7-00-what-a-later-version-adds") == TRACE


@pytest.mark.parametrize(
    "header",
    [
        "",
        TRACE,
        f"ff-{TRACE}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
        f"00-{TRACE}-00f067aa0ba902b7-01\n",
    ],
)
def test_what_names_no_trace_is_none(header: str) -> None:
    assert trace_id(header) == ""
