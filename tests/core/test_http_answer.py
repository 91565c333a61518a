"""The little of HTTP that a scrape needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.http_answer import Request, answer, parse_head


@pytest.mark.parametrize(
    ("head", "request_"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x", Request("GET", "/metrics", "")),
        (b"GET /metrics?name=x HTTP/1.0", Request("GET", "/metrics", "")),
        (
            b"HEAD / HTTP/1.1\r\nAccept: text/plain\r\naccept : application/openmetrics-text;version=1.0.0",
            Request("HEAD", "/", "text/plain,application/openmetrics-text;version=1.0.0"),
        ),
        (b"GET /metrics HTTP/2", None),
        (b"get /metrics HTTP/1.1", None),
        (b"GET /metrics", None),
        (b"GET /me trics HTTP/1.1", None),
        (b"GET /metrics HTTP/1.1\r\nno colon", None),
        (b"\x16\x03\x01\x02\x00", None),
        (b"", None),
    ],
)
def test_heads_of_requests(head: bytes, request_: Request | None) -> None:
    assert parse_head(head) == request_


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_request_or_none(head: bytes) -> None:
    found = parse_head(head)
    assert found is None or found.method.isupper()


def test_answers() -> None:
    assert answer(200, b"abc", "text/x") == (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/x\r\nContent-Length: 3\r\nCache-Control: no-store\r\n"
        b"X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\nabc"
    )
    assert b"Allow: GET, HEAD" in answer(405, b"")
    assert answer(404, b"abc", head=True).endswith(
        b"Content-Length: 3\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
