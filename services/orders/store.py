"""Orders, in SQLite."""

from __future__ import annotations

import enum
import sqlite3
import time
import uuid
from dataclasses import dataclass

from mesh_client.events import OUTBOX_SCHEMA, PreparedEvent
from services.common.database import Database

SCHEMA = f"""{OUTBOX_SCHEMA}
CREATE TABLE IF NOT EXISTS orders (
    number INTEGER PRIMARY KEY,
    order_id TEXT NOT NULL UNIQUE,
    idempotency_key TEXT NOT NULL UNIQUE,
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    amount_cents INTEGER NOT NULL,
    taken_by TEXT NOT NULL,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    taken_at INTEGER NOT NULL,
    payment_id TEXT NOT NULL DEFAULT '',
    rejection TEXT NOT NULL DEFAULT '',
    note TEXT NOT NULL DEFAULT '',
    cancellation TEXT NOT NULL DEFAULT ''
);
"""


class State(enum.StrEnum):
    """Where an order stands."""

    PENDING = "pending"
    PLACED = "placed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class StoredOrder:
    """One order as the file holds it."""

    number: int
    order_id: str
    idempotency_key: str
    sku: str
    quantity: int
    amount_cents: int
    taken_by: str
    state: State
    attempt: int
    """Counts who worked on it, from 1; only the latest may finish it."""
    taken_at: int
    """Microseconds since 1970."""
    payment_id: str
    rejection: str
    note: str
    cancellation: str


@dataclass(frozen=True, slots=True)
class Selection:
    """Which orders; what is None or empty matches all."""

    states: tuple[State, ...] = ()
    sku: str = ""
    taken_from: int | None = None
    """Microseconds since 1970."""
    taken_before: int | None = None

    def sql(self) -> tuple[str, list[object]]:
        """A condition and its parameters."""
        conditions: dict[str, list[object]] = {"1": []}
        if self.states:
            conditions[f"state IN ({', '.join('?' * len(self.states))})"] = list(self.states)
        if self.sku:
            conditions["sku = ?"] = [self.sku]
        if self.taken_from is not None:
            conditions["taken_at >= ?"] = [self.taken_from]
        if self.taken_before is not None:
            conditions["taken_at < ?"] = [self.taken_before]
        return " AND ".join(conditions), [value for values in conditions.values() for value in values]


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the orders that were asked for."""

    orders: tuple[StoredOrder, ...]
    more: bool
    """Further ones follow."""
    total_amount_cents: int
    """Of all that match, on whichever page."""


class OrderStore:
    """Remembers orders by id and by idempotency key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, key: str, sku: str, quantity: int, amount_cents: int, taken_by: str) -> StoredOrder:
        """The order that the key belongs to, a new one if need be.

        An unfinished order comes back with the number of a new attempt; all earlier attempts can no longer finish it.
        """
        now = time.time_ns() // 1_000

        def work(connection: sqlite3.Connection) -> StoredOrder:
            connection.execute(
                "INSERT OR IGNORE INTO orders (order_id, idempotency_key, sku, quantity, amount_cents, taken_by, state,"
                " attempt, taken_at) VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)",
                (f"order-{uuid.uuid4().hex[:12]}", key, sku, quantity, amount_cents, taken_by, State.PENDING, now),
            )
            connection.execute(
                "UPDATE orders SET attempt = attempt + 1 WHERE idempotency_key = ? AND state = ?", (key, State.PENDING)
            )
            return _order(connection.execute("SELECT * FROM orders WHERE idempotency_key = ?", (key,)).fetchone())

        return await self._database.write(work)

    async def finish(
        self,
        order: StoredOrder,
        state: State,
        *,
        payment_id: str = "",
        rejection: str = "",
        event: PreparedEvent | None = None,
    ) -> StoredOrder | None:
        """The order as finished; None when a later attempt has taken it over.

        The event is in the outbox if and only if the order is finished: both are one transaction.
        """

        def work(connection: sqlite3.Connection) -> StoredOrder | None:
            changed = connection.execute(
                "UPDATE orders SET state = ?, payment_id = ?, rejection = ?"
                " WHERE order_id = ? AND attempt = ? AND state = ?",
                (state, payment_id, rejection, order.order_id, order.attempt, State.PENDING),
            )
            if changed.rowcount == 0:
                return None
            if event is not None:
                event.store(connection)
            return _order(connection.execute("SELECT * FROM orders WHERE order_id = ?", (order.order_id,)).fetchone())

        return await self._database.write(work)

    async def cancel(self, order_id: str, reason: str) -> StoredOrder | None:
        """The order, cancelled if it was placed, else as it stands; None when there is none."""
        return await self._change(
            order_id,
            "state = ?, cancellation = ? WHERE order_id = ? AND state = ?",
            (State.CANCELLED, reason, order_id, State.PLACED),
        )

    async def annotate(self, order_id: str, note: str) -> StoredOrder | None:
        """The order with this note; None when there is none."""
        return await self._change(order_id, "note = ? WHERE order_id = ?", (note, order_id))

    async def find(self, order_id: str) -> StoredOrder | None:
        """The order; None when there is none."""
        return await self._database.read(lambda connection: _find(connection, "order_id", order_id))

    async def find_by_key(self, key: str) -> StoredOrder | None:
        """The order that the idempotency key belongs to; None when there is none."""
        return await self._database.read(lambda connection: _find(connection, "idempotency_key", key))

    async def list(self, selection: Selection, *, oldest_first: bool, after: int | None, limit: int) -> Page:
        """Orders that are selected, by their numbers.

        Args:
            selection: which.
            oldest_first: in which order.
            after: the number of the last one of the page before; None for the first page.
            limit: at most so many.
        """
        condition, values = selection.sql()
        beyond, order = (">", "ASC") if oldest_first else ("<", "DESC")

        def work(connection: sqlite3.Connection) -> Page:
            # What varies is made of the constants above; all that callers say are parameters.
            total = f"SELECT COALESCE(SUM(amount_cents), 0) FROM orders WHERE {condition}"  # noqa: S608
            page, place = condition, list(values)
            if after is not None:
                page, place = f"{condition} AND number {beyond} ?", [*values, after]
            rows = connection.execute(
                f"SELECT * FROM orders WHERE {page} ORDER BY number {order} LIMIT ?",  # noqa: S608
                [*place, limit + 1],
            ).fetchall()
            amount = int(connection.execute(total, values).fetchone()[0])
            return Page(tuple(map(_order, rows[:limit])), len(rows) > limit, amount)

        return await self._database.read(work)

    async def _change(self, order_id: str, change: str, values: tuple[str, ...]) -> StoredOrder | None:
        def work(connection: sqlite3.Connection) -> StoredOrder | None:
            connection.execute(f"UPDATE orders SET {change}", values)  # noqa: S608  # one of the two above
            return _find(connection, "order_id", order_id)

        return await self._database.write(work)


def _find(connection: sqlite3.Connection, column: str, value: str) -> StoredOrder | None:
    # Callers name the column, and never what they were asked for.
    row = connection.execute(f"SELECT * FROM orders WHERE {column} = ?", (value,)).fetchone()  # noqa: S608
    return None if row is None else _order(row)


def _order(row: sqlite3.Row) -> StoredOrder:
    return StoredOrder(**{**dict(row), "state": State(row["state"])})
