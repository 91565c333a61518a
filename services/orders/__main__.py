"""One instance of orders: ``python -m services.orders``."""

from __future__ import annotations

from shop.v1.orders_pb2_grpc import add_OrderServiceServicer_to_server

import mesh_client
from services.common.database import Database
from services.common.process import run
from services.common.settings import Settings
from services.orders.service import OrderService
from services.orders.store import SCHEMA, OrderStore


async def main() -> int:
    """Serves until SIGTERM; returns the exit code."""
    settings = Settings.from_environment("orders")
    mesh_client.configure_logs(service="orders", instance=settings.instance, grpc=True)
    async with Database(settings.database, SCHEMA) as database, mesh_client.connect(service="orders") as mesh:
        server = mesh_client.server(
            "orders", mesh=mesh, address=settings.address, instance_id=settings.instance, weight=settings.weight
        )
        events = mesh.events(outbox=settings.database)
        service = OrderService(
            OrderStore(database), mesh.channel("inventory"), mesh.channel("payments"), events, settings.instance
        )
        add_OrderServiceServicer_to_server(service, server)
        code = await server.serve()
        await service.settled()
        return code


if __name__ == "__main__":
    run(main())
