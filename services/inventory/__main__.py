"""One instance of inventory: ``python -m services.inventory``."""

from __future__ import annotations

from shop.v1.inventory_pb2_grpc import add_InventoryServiceServicer_to_server

import mesh_client
from services.common.database import Database
from services.common.process import run
from services.common.settings import Settings
from services.inventory.service import InventoryService
from services.inventory.store import SCHEMA, InventoryStore


async def main() -> int:
    """Serves until SIGTERM; returns the exit code."""
    settings = Settings.from_environment("inventory")
    mesh_client.configure_logs(service="inventory", instance=settings.instance, grpc=True)
    async with Database(settings.database, SCHEMA) as database:
        server = mesh_client.server(
            "inventory", address=settings.address, instance_id=settings.instance, weight=settings.weight
        )
        service = InventoryService(InventoryStore(database), server.stopping)
        add_InventoryServiceServicer_to_server(service, server)
        return await server.serve()


if __name__ == "__main__":
    run(main())
