"""After everything: nothing lost, nothing doubled."""

from __future__ import annotations

from shop.v1.inventory_pb2 import GetStockRequest
from shop.v1.inventory_pb2_grpc import InventoryServiceStub
from shop.v1.payments_pb2 import GetPaymentRequest
from shop.v1.payments_pb2_grpc import PaymentServiceStub

from mesh_cli.demo.load import SKU
from mesh_cli.demo.promises import Promise, exactly
from mesh_cli.demo.stage import Stage

_FULL_STOCK = 1_000_000
_SAMPLE = 50
_TIMEOUT = 10.0


class Books:
    """Compares what customers were told with what inventory and payments remember."""

    title = "The books"

    async def play(self, stage: Stage) -> list[Promise]:
        """Retries may repeat calls, never effects."""
        await stage.customers.pause()
        # Whoever got no answer, at whatever time, asks again with the same key: the shop knows what became of it.
        unanswered = stage.customers.unanswered
        for key in unanswered:
            await stage.customers.place(key, timeout=_TIMEOUT)
        placed = {order.order_id: order for order in stage.customers.orders}
        inventory = InventoryServiceStub(stage.mesh.channel("inventory"))
        stock = await inventory.GetStock(GetStockRequest(sku=SKU), timeout=_TIMEOUT)
        taken = _FULL_STOCK - stock.available
        payments = PaymentServiceStub(stage.mesh.channel("payments"))
        wrong = 0
        for order in list(placed.values())[:: max(1, len(placed) // _SAMPLE)]:
            payment = await payments.GetPayment(GetPaymentRequest(order_id=order.order_id), timeout=_TIMEOUT)
            wrong += (payment.payment_id, payment.amount_cents) != (order.payment_id, order.amount_cents)
        return [
            exactly(
                "books.stock",
                "units reserved beside those that were ordered",
                abs(taken - sum(order.quantity for order in placed.values())),
                0,
                "units",
                f"{len(placed)} orders, {taken} units"
                + (f"; {len(unanswered)} orders placed again that had failed" if unanswered else ""),
            ),
            exactly("books.payments", "payments that differ from their orders", wrong, 0, "payments", "of a sample"),
        ]
