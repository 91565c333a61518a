"""What goes wrong, in words that say what to do next. Every error of the mesh derives from `MeshError`."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class MeshError(Exception):
    """Root of every error that the mesh raises itself."""


class ConfigError(MeshError):
    """An option, file or environment variable is wrong. The message says which, and what is expected."""


class IdentityError(MeshError):
    """This process has no identity in the mesh: no certificate, or none that others accept. The message says why."""


class InvalidValueError(MeshError, ValueError):
    """A value is outside its range.

    Attributes:
        path: field path, such as ``endpoint.port``.
        expected: the allowed range in words.
    """

    def __init__(self, path: str, value: object, expected: str) -> None:
        shown = repr(value)
        super().__init__(
            f"{path}: {shown if len(shown) <= 80 else shown[:77] + '...'} is not allowed; expected {expected}"
        )
        self.path = path
        self.expected = expected


class InvalidTransitionError(MeshError, RuntimeError):
    """An event came that the state machine does not allow in its state; the machine is unchanged."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One bad field of a document: its path, and what is wrong with it."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidPolicyError(MeshError, ValueError):
    """A policy document is invalid.

    Attributes:
        errors: each bad field, in document order; never empty.
    """

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors


class Reason(enum.Enum):
    """Why the mesh failed a call."""

    ATTEMPTS_FAILED = "every attempt failed"
    UNKNOWN_SERVICE = "the mesh does not know the service"
    NO_ENDPOINTS = "the service is known but has no endpoints"
    NO_MATCHING_ENDPOINTS = "no endpoint matches the route's labels"
    CONTROL_PLANE_NEVER_REACHED = "the control plane was never reached and nothing is cached"
    NO_IDENTITY = "this process has no certificate of the mesh"
    BREAKER_OPEN = "the service breaker is open"
    CONCURRENCY_LIMIT = "too many calls to the service are in flight in this client"
    FAULT_INJECTED = "a fault was injected by policy"
    DEADLINE_EXCEEDED = "the deadline passed"


HINTS = {
    Reason.UNKNOWN_SERVICE: "check the name, and that an instance of it is registered",
    Reason.NO_ENDPOINTS: "its last instance has left or is draining; start one",
    Reason.NO_MATCHING_ENDPOINTS: "start an instance that carries the labels, or mend the route's split",
    Reason.CONTROL_PLANE_NEVER_REACHED: "check MESH_CONTROL_PLANE and that a control plane runs there",
    Reason.NO_IDENTITY: "check MESH_ENROLMENT and the join token; `mesh token create` makes another",
    Reason.BREAKER_OPEN: "the service failed as a whole; its probes close the breaker when it answers again",
    Reason.CONCURRENCY_LIMIT: "raise concurrency_limit.max_in_flight in its policy, or call less at once",
}
"""What to do about it."""


@dataclass(frozen=True, slots=True)
class AttemptDetail:
    """One attempt of a failed call."""

    endpoint_id: str
    target: str
    code: str
    """Status code name."""
    details: str
    elapsed: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class MeshErrorDetail:
    """Everything that explains a failed call."""

    service: str
    method: str
    reason: Reason
    attempts: tuple[AttemptDetail, ...] = ()
    breaker: str = "closed"
    """State of the service breaker when the call ended: closed, open or half-open."""
    snapshot_version: str = ""
    """Version of the endpoints that the call was balanced over; empty when there were none."""
    snapshot_age: float | None = None
    """Seconds since the control plane last confirmed it; None when it never did in this process."""
    control_plane: str = ""
    """State of the discovery stream, in words."""
    hint: str = ""
    """What to do next."""
    identity: str = ""
    """State of this process's certificate, in words; empty in plaintext."""
    trace_id: str = ""
    """Of the trace that is kept of the call, 32 hex digits; empty when none is."""

    def __str__(self) -> str:
        parts = [f"{self.service}: {self.reason.value}"]
        if self.attempts:
            tried = ", ".join(
                f"{attempt.endpoint_id} at {attempt.target} {attempt.code} after {attempt.elapsed * 1000:.0f} ms"
                for attempt in self.attempts
            )
            parts.append(f"tried {tried}")
        parts.append(f"breaker {self.breaker}")
        if self.snapshot_version:
            age = "from the disk cache" if self.snapshot_age is None else f"{self.snapshot_age:.1f} s old"
            parts.append(f"endpoints version {self.snapshot_version} {age}")
        if self.control_plane:
            parts.append(f"control plane {self.control_plane}")
        if self.identity:
            parts.append(f"identity: {self.identity}")
        if self.hint:
            parts.append(self.hint)
        return "; ".join(parts)
