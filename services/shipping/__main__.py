"""One instance of shipping: ``python -m services.shipping``."""

from __future__ import annotations

from shop.v1.events_pb2 import OrderPlaced
from shop.v1.shipping_pb2_grpc import add_ShippingServiceServicer_to_server

import mesh_client
from services.common.database import Database
from services.common.process import run
from services.common.settings import Settings
from services.shipping.service import ShippingService
from services.shipping.store import SCHEMA, ShipmentStore


async def main() -> int:
    """Serves until SIGTERM; returns the exit code."""
    settings = Settings.from_environment("shipping")
    mesh_client.configure_logs(service="shipping", instance=settings.instance, grpc=True)
    async with Database(settings.database, SCHEMA) as database, mesh_client.connect(service="shipping") as mesh:
        events = mesh.events(outbox=settings.database)
        service = ShippingService(ShipmentStore(database), events)
        events.subscribe(OrderPlaced, publishers=["orders"])(service.order_placed)
        server = mesh_client.server(
            "shipping", mesh=mesh, address=settings.address, instance_id=settings.instance, weight=settings.weight
        )
        add_ShippingServiceServicer_to_server(service, server)
        return await server.serve()


if __name__ == "__main__":
    run(main())
