"""Requests and what is answered, of which the contract of the REST edge is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tests.edge import tokens

NO_405 = "a path with a method that it does not have is 404, without `Allow`"
UNMEASURED = "not measured with Kong"
"""Why Kong may answer otherwise."""


class _Anything:
    def __repr__(self) -> str:
        return "ANYTHING"


ANYTHING: Final = _Anything()
"""A body that is not looked at."""


@dataclass(frozen=True)
class Answer:
    """What is expected. Of what is not said, nothing."""

    status: int | tuple[int, ...] = 200
    body: object = ANYTHING
    """The JSON."""
    text: str | None = None
    """The body as it is."""
    code: int | None = None
    """The body is a google.rpc.Status with this code."""
    message: str | None = None
    """And with this message."""
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    """Of the request as the service saw it; None for what must not be there."""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Of the answer; None for what must not be there, ``*`` for any value."""

    def check(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Holds an answer against this one."""
        shown = f"{status} {dict(headers)} {body[:500]!r}"
        assert status in (self.status if isinstance(self.status, tuple) else (self.status,)), shown
        for name, value in self.headers.items():
            assert (name in headers) if value == "*" else headers.get(name) == value, f"{name}: {shown}"
        if self.text is not None:
            assert body.decode() == self.text, shown
        if self.body is not ANYTHING:
            assert headers.get("content-type", "").startswith("application/json"), shown
            assert json.loads(body) == self.body, shown
        if self.code is not None:
            assert headers.get("content-type", "").startswith("application/json"), shown
            said = json.loads(body)
            assert said["code"] == self.code, shown
            assert isinstance(said.get("message", ""), str), shown
            assert said.keys() <= {"code", "message"}, shown
            if self.message is not None:
                assert said.get("message", "") == self.message, shown
        if self.metadata:
            received = json.loads(body)["metadata"]
            for name, value in self.metadata.items():
                assert received.get(name) == value, f"{name}: {shown}"


@dataclass(frozen=True)
class Difference:
    """What Kong does otherwise."""

    why: str
    """For docs/edge.md."""
    answer: Answer | None = None
    """What it answers; None if it cannot be asked, or nobody has measured it."""


@dataclass(frozen=True)
class Row:
    """One request, or the last of several equal ones, and what is answered."""

    name: str
    verb: str
    path: str
    answer: Answer
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """With names of tokens in braces."""
    times: int = 1
    kong: Difference | None = None

    def request_headers(self) -> dict[str, str]:
        """The headers with tokens in place of their names."""
        return {name: value.format_map(tokens.tokens()) for name, value in self.headers.items()}


def echo(**request: object) -> Answer:
    """What Echo answers."""
    return Answer(body={"request": request})


def refused(status: int, code: int, message: str | None = None, **more: str | None) -> Answer:
    """An error. Further arguments are headers, with underscores."""
    return Answer(status, code=code, message=message, headers={name.replace("_", "-"): more[name] for name in more})
