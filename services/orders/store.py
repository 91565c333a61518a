"""Orders, in SQLite."""

from __future__ import annotations

import enum
import sqlite3
import uuid
from dataclasses import dataclass

from services.common.database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS orders (
    order_id TEXT PRIMARY KEY,
    idempotency_key TEXT NOT NULL UNIQUE,
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    amount_cents INTEGER NOT NULL,
    taken_by TEXT NOT NULL,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    payment_id TEXT NOT NULL DEFAULT '',
    rejection TEXT NOT NULL DEFAULT ''
);
"""


class State(enum.StrEnum):
    """Where an order stands."""

    PENDING = "pending"
    PLACED = "placed"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class StoredOrder:
    """One order as the file holds it."""

    order_id: str
    idempotency_key: str
    sku: str
    quantity: int
    amount_cents: int
    taken_by: str
    state: State
    attempt: int
    """Counts who worked on it, from 1; only the latest may finish it."""
    payment_id: str
    rejection: str


class OrderStore:
    """Remembers orders by id and by idempotency key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, key: str, sku: str, quantity: int, amount_cents: int, taken_by: str) -> StoredOrder:
        """The order that the key belongs to, a new one if need be.

        An unfinished order comes back with the number of a new attempt; all earlier attempts can no longer finish it.
        """

        def work(connection: sqlite3.Connection) -> StoredOrder:
            connection.execute(
                "INSERT OR IGNORE INTO orders (order_id, idempotency_key, sku, quantity, amount_cents, taken_by, state,"
                " attempt) VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                (f"order-{uuid.uuid4().hex[:12]}", key, sku, quantity, amount_cents, taken_by, State.PENDING),
            )
            connection.execute(
                "UPDATE orders SET attempt = attempt + 1 WHERE idempotency_key = ? AND state = ?", (key, State.PENDING)
            )
            return _order(connection.execute("SELECT * FROM orders WHERE idempotency_key = ?", (key,)).fetchone())

        return await self._database.write(work)

    async def finish(
        self, order: StoredOrder, state: State, *, payment_id: str = "", rejection: str = ""
    ) -> StoredOrder | None:
        """The order as finished; None when a later attempt has taken it over."""

        def work(connection: sqlite3.Connection) -> StoredOrder | None:
            changed = connection.execute(
                "UPDATE orders SET state = ?, payment_id = ?, rejection = ?"
                " WHERE order_id = ? AND attempt = ? AND state = ?",
                (state, payment_id, rejection, order.order_id, order.attempt, State.PENDING),
            )
            if changed.rowcount == 0:
                return None
            return _order(connection.execute("SELECT * FROM orders WHERE order_id = ?", (order.order_id,)).fetchone())

        return await self._database.write(work)

    async def find(self, order_id: str) -> StoredOrder | None:
        """The order; None when there is none."""

        def work(connection: sqlite3.Connection) -> StoredOrder | None:
            row = connection.execute("SELECT * FROM orders WHERE order_id = ?", (order_id,)).fetchone()
            return None if row is None else _order(row)

        return await self._database.read(work)


def _order(row: sqlite3.Row) -> StoredOrder:
    return StoredOrder(**{**dict(row), "state": State(row["state"])})
