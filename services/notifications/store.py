"""What customers were told, in SQLite."""

from __future__ import annotations

import sqlite3
from typing import Any

from mesh_client.events import Event, inbox
from services.common.database import Database

SCHEMA = f"""{inbox.SCHEMA}
CREATE TABLE IF NOT EXISTS notifications (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    order_id TEXT NOT NULL,
    type TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS notifications_order ON notifications (order_id);
CREATE TABLE IF NOT EXISTS duplicates (id TEXT NOT NULL);
"""


class NotificationStore:
    """Remembers what was told of each order."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def tell(self, event: Event[Any], order_id: str, text: str) -> bool:
        """Remembers it with its event, in one transaction; False when the event has come before."""

        def work(connection: sqlite3.Connection) -> bool:
            if not inbox.first_time(connection, event):
                connection.execute("INSERT INTO duplicates VALUES (?)", (event.id,))
                return False
            connection.execute(
                "INSERT INTO notifications (order_id, type, text) VALUES (?, ?, ?)", (order_id, event.type, text)
            )
            return True

        return await self._database.write(work)

    async def texts(self, order_id: str) -> list[str]:
        """What was told of an order, in order."""

        def work(connection: sqlite3.Connection) -> list[str]:
            query = "SELECT text FROM notifications WHERE order_id = ? ORDER BY number"
            return [row["text"] for row in connection.execute(query, (order_id,))]

        return await self._database.read(work)
