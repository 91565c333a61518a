"""Just enough of HTTP/1.1 to answer a scrape: one small request without a body, one answer, and the connection ends."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_HEAD = 8 * 1024
"""Bytes of a request line with all its headers."""

_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]{1,2000}) HTTP/1\.[01]")
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Attributes:
        method: such as GET.
        path: without its query.
        accept: all ``Accept`` headers, joined by commas.
    """

    method: str
    path: str
    accept: str


def parse_head(head: bytes) -> Request | None:
    """The request that a head, up to its empty line, states; None when it is none."""
    line, _, rest = head.partition(b"\r\n")
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    accept = []
    for header in rest.split(b"\r\n"):
        name, colon, value = header.partition(b":")
        if header and not colon:
            return None
        if name.strip().lower() == b"accept":
            accept.append(value.strip().decode("latin-1"))
    return Request(match[1].decode(), match[2].decode().partition("?")[0], ",".join(accept))


def answer(status: int, body: bytes, content_type: str = "text/plain; charset=utf-8", *, head: bool = False) -> bytes:
    """An answer, after which the connection ends; without its body, but with its length, where a head was asked for."""
    lines = (
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *(["Allow: GET, HEAD"] if status == 405 else []),
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode("latin-1") + (b"" if head else body)
