"""Events between services, over RabbitMQ, with nothing lost. Needs the ``events`` extra.

>>> bus = mesh.events()
>>> await bus.publish(OrderPlaced(order_id="1"), key="1")

`EventBus` is made by `mesh_client.mesh.Mesh.events`.
"""

from mesh_client.core.events.errors import (
    DeadReason,
    EventError,
    EventTooLargeError,
    OutboxAwayError,
    OutboxFullError,
    PublishTimeoutError,
    Reject,
    UnusableEventError,
)
from mesh_client.core.events.retry import RetrySchedule
from mesh_client.core.events.state import EventsState, GroupState, OutboxState, RelayState
from mesh_client.events import inbox
from mesh_client.events.bus import EventBus
from mesh_client.events.event import Event
from mesh_client.events.options import GroupOptions
from mesh_client.events.outbox import SCHEMA as OUTBOX_SCHEMA
from mesh_client.events.outbox import OutboxStore, SqliteOutbox
from mesh_client.events.prepared import PreparedEvent

__all__ = [
    "OUTBOX_SCHEMA",
    "DeadReason",
    "Event",
    "EventBus",
    "EventError",
    "EventTooLargeError",
    "EventsState",
    "GroupOptions",
    "GroupState",
    "OutboxAwayError",
    "OutboxFullError",
    "OutboxState",
    "OutboxStore",
    "PreparedEvent",
    "PublishTimeoutError",
    "Reject",
    "RelayState",
    "RetrySchedule",
    "SqliteOutbox",
    "UnusableEventError",
    "inbox",
]
