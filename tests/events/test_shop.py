"""The example application: an order is placed, shipped and told of, by events over a real broker."""

from __future__ import annotations

from contextlib import AsyncExitStack

from shop.v1.events_pb2 import OrderPlaced, OrderShipped

from services.common.database import Database
from services.notifications import store as notification_store
from services.notifications.service import NotificationService
from services.notifications.store import NotificationStore
from services.shipping import store as shipment_store
from services.shipping.service import ShippingService
from services.shipping.store import ShipmentStore
from tests.events.services import Services, started, until

ORDERS = 20


async def test_orders_are_shipped_and_customers_told(services: Services) -> None:
    async with AsyncExitStack() as stack:
        shipments = ShipmentStore(
            await stack.enter_async_context(Database(services.directory / "shipping.sqlite", shipment_store.SCHEMA))
        )
        notifications = NotificationStore(
            await stack.enter_async_context(
                Database(services.directory / "notifications.sqlite", notification_store.SCHEMA)
            )
        )
        shipping, telling = services.bus("shipping"), services.bus("notifications")
        shipping.subscribe(OrderPlaced)(ShippingService(shipments, shipping).order_placed)
        service = NotificationService(notifications)
        telling.subscribe(OrderPlaced)(service.order_placed)
        telling.subscribe(OrderShipped)(service.order_shipped)
        await started(telling)
        await started(shipping)
        orders = services.bus("orders")
        for number in range(ORDERS):
            placed = OrderPlaced(order_id=f"order-{number}", sku="tea", quantity=1, amount_cents=450)
            await orders.publish(placed, key=placed.order_id)
        await until(lambda: telling.state().groups[0].counters.handled == 2 * ORDERS)
        for number in range(ORDERS):
            shipment = await shipments.find(f"order-{number}")
            assert shipment is not None
            assert set(await notifications.texts(f"order-{number}")) == {
                "Thank you for your order of 1 tea, 4.50 EUR.",
                f"Your order is on its way as {shipment.shipment_id}.",
            }
        assert telling.state().groups[0].edges == {
            ("orders", "shop.v1.OrderPlaced"): ORDERS,
            ("shipping", "shop.v1.OrderShipped"): ORDERS,
        }
        # Before their databases are closed.
        for bus in (orders, shipping, telling):
            await bus.close()
