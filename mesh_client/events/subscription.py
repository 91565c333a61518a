"""A handler of events: what it is for, whose events it takes, and what a policy changes about that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from mesh_client.core.events.errors import DeadReason, UnusableEventError
from mesh_client.core.policy import EventHandling
from mesh_client.events.event import Handler


@dataclass(frozen=True, slots=True)
class Subscription:
    """A handler, as its code subscribes it.

    Attributes:
        message_class: of the events that it is for.
        handler: what is called.
        timeout: seconds that it has, unless a policy says otherwise.
        publishers: whose events it takes; empty for everybody's.
    """

    message_class: type[Message]
    handler: Handler[Any]
    timeout: float
    publishers: frozenset[str] = frozenset()

    def check_publisher(self, user: str | None, policy: EventHandling) -> None:
        """Whether both code and policy take a publisher's events.

        Args:
            user: whose event it is, as the broker says.
            policy: of the handler.

        Raises:
            UnusableEventError: one of them does not.
        """
        for allowed, who in ((self.publishers, "the group takes"), (policy.publishers, "the service's policy takes")):
            if allowed and user not in allowed:
                raise UnusableEventError(
                    DeadReason.UNAUTHORIZED, f"it is of {user!r}; {who} it of {', '.join(sorted(allowed))} alone"
                )
