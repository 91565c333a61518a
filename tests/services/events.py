"""Events as the shop's services get them, and what is in their outboxes."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

from mesh_client.events import Event

M = TypeVar("M", bound=Message)


def event(message: M, id: str, group: str, source: str = "mesh:orders") -> Event[M]:
    """As it is delivered for the first time."""
    return Event(message, id, source, None, message.DESCRIPTOR.full_name, "", time.time(), 1, group)


def rows(database: Path, query: str) -> list[tuple[object, ...]]:
    """What a service has written."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def outbox(database: Path) -> list[tuple[object, ...]]:
    """Type, key and body of what waits to be published."""
    return rows(database, "SELECT type, event_key, body FROM mesh_outbox ORDER BY number")
