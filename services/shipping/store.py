"""Shipments, in SQLite."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from mesh_client.events import OUTBOX_SCHEMA, Event, PreparedEvent, inbox
from services.common.database import Database

SCHEMA = f"""{OUTBOX_SCHEMA}{inbox.SCHEMA}
CREATE TABLE IF NOT EXISTS shipments (
    order_id TEXT PRIMARY KEY,
    shipment_id TEXT NOT NULL,
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS duplicates (id TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Shipment:
    """One order's shipment."""

    order_id: str
    shipment_id: str
    sku: str
    quantity: int


class ShipmentStore:
    """Remembers one shipment an order."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ship(self, placed: Event[Any], shipment: Shipment, shipped: PreparedEvent) -> bool:
        """Remembers a shipment and publishes it, all in one transaction; False when the event has come before."""

        def work(connection: sqlite3.Connection) -> bool:
            if not inbox.first_time(connection, placed):
                connection.execute("INSERT INTO duplicates VALUES (?)", (placed.id,))
                return False
            connection.execute(
                "INSERT INTO shipments VALUES (?, ?, ?, ?)",
                (shipment.order_id, shipment.shipment_id, shipment.sku, shipment.quantity),
            )
            shipped.store(connection)
            return True

        return await self._database.write(work)

    async def find(self, order_id: str) -> Shipment | None:
        """The order's shipment; None when there is none."""

        def work(connection: sqlite3.Connection) -> Shipment | None:
            row = connection.execute("SELECT * FROM shipments WHERE order_id = ?", (order_id,)).fetchone()
            return None if row is None else Shipment(**dict(row))

        return await self._database.read(work)
