"""The inbox: handlers that take effect once, however often an event is delivered.

A handler writes what it does and the event's id in one transaction of the service's own database. An event that comes a
second time finds its id there.

    async def ship(event: Event[OrderPlaced]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            if inbox.first_time(connection, event):
                connection.execute("INSERT INTO shipments ...")

        await database.write(work)
"""

from __future__ import annotations

import sqlite3
import time
from typing import Any

from mesh_client.events.event import Event

SCHEMA = """
CREATE TABLE IF NOT EXISTS mesh_inbox (
    event_group TEXT NOT NULL,
    source TEXT NOT NULL,
    id TEXT NOT NULL,
    handled REAL NOT NULL,
    PRIMARY KEY (event_group, source, id)
);
CREATE INDEX IF NOT EXISTS mesh_inbox_handled ON mesh_inbox (handled);
"""
"""For SQLite; PostgreSQL takes it too, with DOUBLE PRECISION in place of REAL."""

INSERT = "INSERT INTO mesh_inbox (event_group, source, id, handled) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
"""For SQLite and, with ``%s`` in place of ``?``, PostgreSQL. One row is inserted the first time, none after that."""


def parameters(event: Event[Any]) -> tuple[str, str, str, float]:
    """Values for `INSERT`."""
    return event.group, event.source, event.id, time.time()


def first_time(connection: sqlite3.Connection, event: Event[Any]) -> bool:
    """Notes within the connection's transaction that an event is handled; False when it had been before."""
    return connection.execute(INSERT, parameters(event)).rowcount == 1


def forget(connection: sqlite3.Connection, older_than: float) -> int:
    """Deletes notes of events that were handled more than so many seconds ago; how many.

    Events come twice within minutes as a rule, and as long after as somebody replays a dead letter or an outbox waits.
    """
    return connection.execute("DELETE FROM mesh_inbox WHERE handled < ?", (time.time() - older_than,)).rowcount
