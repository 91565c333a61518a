"""Payments, in SQLite."""

from __future__ import annotations

import sqlite3
import uuid
from dataclasses import dataclass

from services.common.database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS payments (
    order_id TEXT PRIMARY KEY,
    payment_id TEXT NOT NULL,
    amount_cents INTEGER NOT NULL,
    currency TEXT NOT NULL,
    declined INTEGER NOT NULL,
    refunded INTEGER NOT NULL DEFAULT 0
);
"""


@dataclass(frozen=True, slots=True)
class Payment:
    """One order's payment. A declined one stays declined."""

    order_id: str
    payment_id: str
    amount_cents: int
    currency: str
    declined: bool
    refunded: bool = False


class PaymentStore:
    """Remembers one payment an order."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def charge(self, order_id: str, amount_cents: int, currency: str, *, limit_cents: int) -> Payment:
        """The order's payment: the one there is, else a new one, declined when the amount is above the limit."""

        def work(connection: sqlite3.Connection) -> Payment:
            payment = _find(connection, order_id)
            if payment is None:
                declined = amount_cents > limit_cents
                payment = Payment(order_id, f"pay-{uuid.uuid4().hex[:12]}", amount_cents, currency, declined)
                connection.execute(
                    "INSERT INTO payments (order_id, payment_id, amount_cents, currency, declined)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (payment.order_id, payment.payment_id, payment.amount_cents, payment.currency, payment.declined),
                )
            return payment

        return await self._database.write(work)

    async def refund(self, order_id: str) -> Payment | None:
        """The order's payment, given back; None when there is none, or it was declined."""

        def work(connection: sqlite3.Connection) -> Payment | None:
            connection.execute("UPDATE payments SET refunded = 1 WHERE order_id = ? AND NOT declined", (order_id,))
            payment = _find(connection, order_id)
            return payment if payment is not None and payment.refunded else None

        return await self._database.write(work)

    async def find(self, order_id: str) -> Payment | None:
        """The order's payment, declined or not; None when there is none."""
        return await self._database.read(lambda connection: _find(connection, order_id))


def _find(connection: sqlite3.Connection, order_id: str) -> Payment | None:
    row = connection.execute("SELECT * FROM payments WHERE order_id = ?", (order_id,)).fetchone()
    if row is None:
        return None
    return Payment(
        row["order_id"],
        row["payment_id"],
        row["amount_cents"],
        row["currency"],
        declined=bool(row["declined"]),
        refunded=bool(row["refunded"]),
    )
