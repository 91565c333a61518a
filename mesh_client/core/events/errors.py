"""What goes wrong with events, and why an event ends in a dead-letter queue."""

from __future__ import annotations

import enum

from mesh_client.core.errors import ConfigError, MeshError


class DeadReason(enum.Enum):
    """Why an event is in a dead-letter queue."""

    NOT_AN_EVENT = "not-an-event"
    """It is no CloudEvent with a protobuf message."""
    UNKNOWN_TYPE = "unknown-type"
    """The group has no handler for its message type."""
    UNDECODABLE = "undecodable"
    """Its body is not a message of its type."""
    SCHEMA = "schema"
    """It was made by a definition of its type that ours contradicts."""
    TOO_LARGE = "too-large"
    """Its body is larger than the group takes."""
    FORGED = "forged"
    """It names another publisher than the one whom the broker let in."""
    UNAUTHORIZED = "unauthorized"
    """Its publisher is none of those who may publish it to the group."""
    REJECTED = "rejected"
    """Its handler said that it is of no use."""
    ATTEMPTS = "attempts"
    """Its handler failed as often as it may."""
    DELIVERIES = "delivery-limit"
    """The broker delivered it as often as it may, and nobody acknowledged: handlers' processes died of it."""


class EventError(MeshError):
    """Root of the errors that publishers and handlers of events meet."""


class UnusableEventError(EventError):
    """An event that no further attempt can help.

    Attributes:
        reason: as operators see it with the dead letter.
        detail: the same in words.
    """

    def __init__(self, reason: DeadReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class Reject(UnusableEventError):  # noqa: N818 - what a handler raises says what it wants
    """Raised by a handler: this event is of no use, now or later. It goes to the dead-letter queue at once."""

    def __init__(self, detail: str) -> None:
        super().__init__(DeadReason.REJECTED, detail)


class OutboxFullError(EventError):
    """The outbox holds as many events as it may: the broker does not take them, or nobody is subscribed to them.

    Nothing was stored. Slow down, and look at ``bus.state()``.
    """


class OutboxAwayError(EventError, ConfigError):
    """The outbox's database does not answer, or somebody else holds it. It may be there a moment later."""


class PublishTimeoutError(EventError, TimeoutError):
    """The event could not be stored in the outbox before the deadline. It may be stored all the same a moment later."""


class EventTooLargeError(EventError, ValueError):
    """The message is larger than events may be. Nothing was stored; publish a reference to it in its place."""
