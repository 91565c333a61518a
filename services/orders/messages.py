"""Orders as messages."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from shop.v1 import orders_pb2 as pb

from services.orders.store import State, StoredOrder

STATES = {
    State.PENDING: pb.ORDER_STATE_PENDING,
    State.PLACED: pb.ORDER_STATE_PLACED,
    State.REJECTED: pb.ORDER_STATE_REJECTED,
    State.CANCELLED: pb.ORDER_STATE_CANCELLED,
}


def order_message(order: StoredOrder) -> pb.Order:
    """The order as callers see it."""
    seconds, microseconds = divmod(order.taken_at, 1_000_000)
    return pb.Order(
        order_id=order.order_id,
        sku=order.sku,
        quantity=order.quantity,
        state=STATES[order.state],
        payment_id=order.payment_id,
        taken_by=order.taken_by,
        amount_cents=order.amount_cents,
        rejection=order.rejection,
        number=order.number,
        taken_at=Timestamp(seconds=seconds, nanos=microseconds * 1_000),
        note=order.note,
        cancellation=order.cancellation,
    )
