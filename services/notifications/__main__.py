"""One instance of notifications: ``python -m services.notifications``."""

from __future__ import annotations

from shop.v1.events_pb2 import OrderPlaced, OrderShipped
from shop.v1.notifications_pb2_grpc import add_NotificationServiceServicer_to_server

import mesh_client
from services.common.database import Database
from services.common.process import run
from services.common.settings import Settings
from services.notifications.service import NotificationService
from services.notifications.store import SCHEMA, NotificationStore


async def main() -> int:
    """Serves until SIGTERM; returns the exit code."""
    settings = Settings.from_environment("notifications")
    mesh_client.configure_logs(service="notifications", instance=settings.instance, grpc=True)
    async with Database(settings.database, SCHEMA) as database, mesh_client.connect(service="notifications") as mesh:
        service = NotificationService(NotificationStore(database))
        events = mesh.events(outbox=settings.database)
        events.subscribe(OrderPlaced, publishers=["orders"])(service.order_placed)
        events.subscribe(OrderShipped, publishers=["shipping"])(service.order_shipped)
        server = mesh_client.server(
            "notifications", mesh=mesh, address=settings.address, instance_id=settings.instance, weight=settings.weight
        )
        add_NotificationServiceServicer_to_server(service, server)
        return await server.serve()


if __name__ == "__main__":
    run(main())
