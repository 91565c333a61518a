"""Exchanges and queues at the broker: names by convention, and who may touch which.

| what | name | kind |
| --- | --- | --- |
| where everything is published | ``mesh.events`` | topic exchange, routing key ``PUBLISHER.MESSAGE_TYPE`` |
| a group's own routes | ``SERVICE.GROUP`` | direct exchange; each queue of the group by its name |
| what a group has to handle | ``SERVICE.GROUP`` | quorum queue, bound to ``*.MESSAGE_TYPE`` of each of its types |
| what waits to be tried again | ``SERVICE.GROUP.retry.1000ms`` | quorum queue with that TTL, then back |
| what nobody could handle | ``SERVICE.GROUP.dead`` | quorum queue |

The name of a service is one DNS label, and so has no dot: what begins with ``SERVICE.`` is that service's alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import check_service_name

EXCHANGE = "mesh.events"
"""Where every event is published."""

CONTROL_PLANE = "mesh:control-plane"
"""Publisher and broker user of control planes. No service has a name with a colon."""

OPERATOR = "mesh:operator"
"""Broker user of operators, who look after dead letters of every service."""

_GROUP = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NO_LIMIT = 1_000_000
"""Deliveries of a dead letter: looking at it counts as one, and must never drop it (RabbitMQ 4 has a default of 20)."""


def check_group(name: str) -> str:
    """The name, if it can be a group's: a DNS label.

    Raises:
        InvalidValueError: it is not.
    """
    if not _GROUP.fullmatch(name):
        raise InvalidValueError("group", name, "a DNS label: 1 to 63 of a-z 0-9 -, not beginning or ending with -")
    return name


def check_member(service: str) -> str:
    """The service's name, if it can have names of its own at a broker.

    Raises:
        InvalidValueError: it is no DNS label, or ``mesh``, whose names are the mesh's.
    """
    if check_service_name(service) == EXCHANGE.partition(".")[0]:
        raise InvalidValueError("service", service, "another name, for what begins with it is the mesh's at the broker")
    return service


def routing_key(publisher: str, message_type: str) -> str:
    """Where a publisher's events of a type go."""
    return f"{publisher}.{message_type}"


def binding_key(message_type: str) -> str:
    """The routing keys of a type, whoever publishes it."""
    return f"*.{message_type}"


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A durable queue as it is declared."""

    name: str
    arguments: dict[str, str | int | bool] = field(hash=False)


@dataclass(frozen=True, slots=True)
class Group:
    """One group of consumers: instances of a service that share the work.

    Attributes:
        service: whose group it is.
        name: of the group, unique within the service.

    Raises:
        InvalidValueError: a name is not allowed.
    """

    service: str
    name: str

    def __post_init__(self) -> None:
        check_member(self.service)
        check_group(self.name)

    @property
    def exchange(self) -> str:
        """The group's own direct exchange."""
        return f"{self.service}.{self.name}"

    @property
    def queue(self) -> str:
        """What the group has to handle."""
        return f"{self.service}.{self.name}"

    @property
    def dead(self) -> str:
        """What nobody could handle."""
        return f"{self.service}.{self.name}.dead"

    def retry(self, milliseconds: int) -> str:
        """What waits for so long to be tried again."""
        return f"{self.service}.{self.name}.retry.{milliseconds}ms"

    def queues(self, delays: Sequence[int], delivery_limit: int, *, ordered: bool) -> list[QueueSpec]:
        """Every queue of the group.

        Args:
            delays: milliseconds of each retry queue.
            delivery_limit: how often the broker delivers an event again that was not acknowledged.
            ordered: one instance at a time gets events, so that those of one key are handled in their order.
        """
        # At least once, also from queue to queue: without it RabbitMQ may drop what it moves (it needs reject-publish).
        moved = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        found = [QueueSpec(self.dead, {"x-queue-type": "quorum", "x-delivery-limit": _NO_LIMIT})]
        for delay in dict.fromkeys(delays):
            back = {"x-dead-letter-exchange": self.exchange, "x-dead-letter-routing-key": self.queue}
            found.append(
                QueueSpec(self.retry(delay), {"x-queue-type": "quorum", "x-message-ttl": delay, **back, **moved})
            )
        out = {"x-dead-letter-exchange": self.exchange, "x-dead-letter-routing-key": self.dead}
        found.append(
            QueueSpec(
                self.queue,
                {
                    "x-queue-type": "quorum",
                    "x-delivery-limit": delivery_limit,
                    "x-single-active-consumer": ordered,
                    **out,
                    **moved,
                },
            )
        )
        return found


@dataclass(frozen=True, slots=True)
class Permissions:
    """Regular expressions of names that a broker user may configure, write and read; see RabbitMQ's access control.

    Attributes:
        topic: routing keys with which it may publish to `EXCHANGE`.
    """

    configure: str
    write: str
    read: str
    topic: str


def permissions(user: str) -> Permissions:
    """What a user may: a service its own names, a control plane to publish, an operator to look and to move.

    Raises:
        InvalidValueError: it is none of them.
    """
    exchange = re.escape(EXCHANGE)
    if user == CONTROL_PLANE:
        return Permissions("^$", f"^{exchange}$", "^$", rf"^{user}\..+$")
    if user == OPERATOR:
        return Permissions("^$", "^[a-z0-9-]+\\.[a-z0-9-]+$", "^[a-z0-9-]+\\..+$", "^$")
    own = rf"{check_member(user)}\..+"
    return Permissions(f"^{own}$", f"^({exchange}|{own})$", f"^({exchange}|{own})$", f"^{own}$")
