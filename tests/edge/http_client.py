"""HTTP as it is said: paths and headers go out as they are given."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """What came back; names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def ask(
    address: tuple[str, int],
    verb: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    body: str | bytes | None = None,
) -> Response:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(*address, timeout=20)
    try:
        connection.request(verb, path, body=body, headers=dict(headers or {}))
        response = connection.getresponse()
        content = response.read()
        named = {name.lower(): value for name, value in response.getheaders()}
        return Response(response.status, named, content)
    finally:
        connection.close()
