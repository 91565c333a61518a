"""`shop.v1.ShippingService`, and what it does with events."""

from __future__ import annotations

import logging
import uuid

import grpc
from shop.v1 import shipping_pb2 as pb
from shop.v1.events_pb2 import OrderPlaced, OrderShipped
from shop.v1.shipping_pb2_grpc import ShippingServiceServicer

from mesh_client.events import Event, EventBus
from services.shipping.store import Shipment, ShipmentStore

logger = logging.getLogger(__name__)


class ShippingService(ShippingServiceServicer):
    """Ships each placed order once, however often it hears of it."""

    def __init__(self, shipments: ShipmentStore, events: EventBus) -> None:
        self._shipments = shipments
        self._events = events

    async def order_placed(self, event: Event[OrderPlaced]) -> None:
        """Ships it, and says so."""
        placed = event.message
        shipment = Shipment(placed.order_id, f"ship-{uuid.uuid4().hex[:12]}", placed.sku, placed.quantity)
        shipped = OrderShipped(order_id=shipment.order_id, shipment_id=shipment.shipment_id)
        if await self._shipments.ship(event, shipment, self._events.prepare(shipped, key=shipment.order_id)):
            self._events.stored()
        else:
            logger.info("a duplicate", extra={"order": placed.order_id, "event": event.id})

    async def GetShipment(
        self,
        request: pb.GetShipmentRequest,
        context: grpc.aio.ServicerContext[pb.GetShipmentRequest, pb.GetShipmentResponse],
    ) -> pb.GetShipmentResponse:
        """The shipment of an order."""
        shipment = await self._shipments.find(request.order_id)
        if shipment is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"order {request.order_id!r} has no shipment yet")
        return pb.GetShipmentResponse(shipment_id=shipment.shipment_id, sku=shipment.sku, quantity=shipment.quantity)
