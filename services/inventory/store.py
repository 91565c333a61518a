"""Stock and reservations, in SQLite."""

from __future__ import annotations

import sqlite3

from services.common.database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS stock (
    sku TEXT PRIMARY KEY,
    available INTEGER NOT NULL CHECK (available >= 0)
);
CREATE TABLE IF NOT EXISTS reservations (
    order_id TEXT PRIMARY KEY,
    sku TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    held INTEGER NOT NULL
);
INSERT OR IGNORE INTO stock VALUES ('espresso-beans', 1000000), ('filter-paper', 1000000), ('grinder', 1000000);
"""


class UnknownSkuError(Exception):
    """Nobody ever stocked this item."""


class OutOfStockError(Exception):
    """There is not enough left."""


class SupersededError(Exception):
    """A later attempt at the order took over, or this one has given up."""


class InventoryStore:
    """Reserves stock for orders.

    An order's row in ``reservations`` remembers the highest attempt that touched it, even after the stock went back,
    so that a request that was long on its way cannot undo a later one (a fencing token).
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def available(self, sku: str) -> int:
        """Units left.

        Raises:
            UnknownSkuError: the item is unknown.
        """
        return await self._database.read(lambda connection: _available(connection, sku))

    async def reserve(self, order_id: str, sku: str, quantity: int, attempt: int) -> int:
        """Takes stock for an order, once; returns the units left.

        Raises:
            UnknownSkuError: the item is unknown.
            OutOfStockError: not enough is left.
            SupersededError: a later attempt took over, or this one was released.
        """

        def work(connection: sqlite3.Connection) -> int:
            row = connection.execute(
                "SELECT attempt, held, sku, quantity FROM reservations WHERE order_id = ?", (order_id,)
            ).fetchone()
            held = row is not None and bool(row["held"])
            if row is not None and (attempt < row["attempt"] or (attempt == row["attempt"] and not held)):
                raise SupersededError
            if held and (row["sku"], row["quantity"]) != (sku, quantity):
                raise ValueError("the order has reserved something else before")
            if not held:
                if _available(connection, sku) < quantity:
                    raise OutOfStockError
                connection.execute("UPDATE stock SET available = available - ? WHERE sku = ?", (quantity, sku))
            connection.execute(
                "INSERT OR REPLACE INTO reservations VALUES (?, ?, ?, ?, 1)", (order_id, sku, quantity, attempt)
            )
            return _available(connection, sku)

        return await self._database.write(work)

    async def release(self, order_id: str, attempt: int) -> bool:
        """Gives back what this attempt or an earlier one reserved; returns whether there was anything."""

        def work(connection: sqlite3.Connection) -> bool:
            row = connection.execute(
                "SELECT attempt, held, sku, quantity FROM reservations WHERE order_id = ?", (order_id,)
            ).fetchone()
            if row is None:
                # The reservation may still be on its way: remember that it comes too late.
                connection.execute("INSERT INTO reservations VALUES (?, '', 0, ?, 0)", (order_id, attempt))
                return False
            if attempt < row["attempt"]:
                return False
            connection.execute("UPDATE reservations SET attempt = ?, held = 0 WHERE order_id = ?", (attempt, order_id))
            if row["held"]:
                connection.execute(
                    "UPDATE stock SET available = available + ? WHERE sku = ?", (row["quantity"], row["sku"])
                )
            return bool(row["held"])

        return await self._database.write(work)


def _available(connection: sqlite3.Connection, sku: str) -> int:
    row = connection.execute("SELECT available FROM stock WHERE sku = ?", (sku,)).fetchone()
    if row is None:
        raise UnknownSkuError
    return int(row["available"])
