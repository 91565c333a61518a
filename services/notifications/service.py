"""`shop.v1.NotificationService`, and what it does with events."""

from __future__ import annotations

import grpc
from shop.v1 import notifications_pb2 as pb
from shop.v1.events_pb2 import OrderPlaced, OrderShipped
from shop.v1.notifications_pb2_grpc import NotificationServiceServicer

from mesh_client.events import Event
from services.notifications.store import NotificationStore


class NotificationService(NotificationServiceServicer):
    """Tells customers each thing once."""

    def __init__(self, notifications: NotificationStore) -> None:
        self._notifications = notifications

    async def order_placed(self, event: Event[OrderPlaced]) -> None:
        """Thanks for it."""
        order = event.message
        text = f"Thank you for your order of {order.quantity} {order.sku}, {order.amount_cents / 100:.2f} EUR."
        await self._notifications.tell(event, order.order_id, text)

    async def order_shipped(self, event: Event[OrderShipped]) -> None:
        """Says that it comes."""
        order = event.message
        await self._notifications.tell(event, order.order_id, f"Your order is on its way as {order.shipment_id}.")

    async def ListNotifications(
        self,
        request: pb.ListNotificationsRequest,
        context: grpc.aio.ServicerContext[pb.ListNotificationsRequest, pb.ListNotificationsResponse],
    ) -> pb.ListNotificationsResponse:
        """What was told of an order."""
        return pb.ListNotificationsResponse(texts=await self._notifications.texts(request.order_id))
