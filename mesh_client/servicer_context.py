"""Servicer contexts, asynchronous and synchronous, as far as the mesh needs them alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import grpc


class CallContext(Protocol):
    """What the asynchronous and the synchronous servicer context have in common."""

    def peer(self) -> str:
        """Address of the caller."""

    def peer_identities(self) -> Iterable[bytes] | None:
        """The names in the caller's certificate."""

    def auth_context(self) -> Mapping[str, Any]:
        """What the handshake established."""

    def time_remaining(self) -> float | None:
        """Seconds to the deadline."""

    def invocation_metadata(self) -> Any:
        """Metadata pairs."""

    def set_trailing_metadata(self, trailing_metadata: tuple[tuple[str, str], ...]) -> None:
        """What the status will carry."""


class SyncContext:
    """A servicer context of a plain handler that can be asked for the status set on it, as asynchronous ones can."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._code: Any = None
        self._details: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def code(self) -> Any:
        """The status that was set; None before."""
        return self._code

    def details(self) -> Any:
        """Its message."""
        return self._details

    def set_code(self, code: Any) -> None:
        """As for grpc's own, as the others."""
        self._code = code
        self._context.set_code(code)

    def set_details(self, details: Any) -> None:
        """Sets the message."""
        self._details = details
        self._context.set_details(details)

    def abort(self, code: Any, details: Any = "", trailing_metadata: Any = ()) -> None:
        """Ends the call."""
        self._code, self._details = code, details
        self._context.abort(code, details, trailing_metadata)

    def abort_with_status(self, status: Any) -> None:
        """Ends the call."""
        self._code, self._details = status.code, status.details
        self._context.abort_with_status(status)


_CODES: dict[Any, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def status_name(code: Any, unset: str) -> str:
    """The name of a status that a servicer context holds, which is a number, a `grpc.StatusCode` or None."""
    if isinstance(code, grpc.StatusCode):
        return code.name
    return _CODES.get(code, unset)


def status_details(context: Any) -> str | None:
    """The message of the status that a servicer context holds."""
    details = context.details()
    text = details.decode(errors="replace") if isinstance(details, bytes) else details
    return text or None
