"""A child process: the shop's inventory twice with mutual TLS, once bare and once guarded by rules. Says both ports.

The bare one is grpc's own server. The guarded one is the mesh's: it knows who calls, asks its rules, counts the call,
and its handler asks who called. Asked anything, it answers with the CPU time that the process has spent, in seconds.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
from shop.v1 import inventory_pb2, inventory_pb2_grpc

import mesh_client
from benchmarks.processes import serve_parent
from benchmarks.shop_server import Inventory
from mesh_client.core.policy import ServicePolicy
from mesh_client.transport import SERVER_OPTIONS

RULES = ServicePolicy.parse(
    {
        "service": "inventory",
        "authorization": [
            {"callers": ["gateway", "reports"], "methods": ["shop.v1.InventoryService/WatchStock"]},
            {"callers": ["orders"], "methods": ["shop.v1.InventoryService/*"]},
        ],
    }
)


class AskingInventory(Inventory):
    """Asks who called."""

    async def GetStock(self, request: Any, context: Any) -> inventory_pb2.GetStockResponse:
        """One response, for callers that are somebody."""
        caller = mesh_client.current_caller()
        if caller is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "nobody called")
        return inventory_pb2.GetStockResponse(sku=request.sku, available=7)


async def _cpu(_: Any) -> float:
    return time.process_time()


async def _main() -> None:
    async with mesh_client.connect(service="inventory", cache_dir="") as mesh:
        guarded = mesh_client.server("inventory", mesh=mesh, policy=RULES, reflection=False)
        inventory_pb2_grpc.add_InventoryServiceServicer_to_server(AskingInventory(), guarded)
        await guarded.start()
        bare = grpc.aio.server(options=SERVER_OPTIONS)
        inventory_pb2_grpc.add_InventoryServiceServicer_to_server(Inventory(), bare)
        port = mesh.transport.add_port(bare, "127.0.0.1:0")
        await bare.start()
        try:
            await serve_parent({"bare": port, "guarded": guarded.port}, _cpu)
        finally:
            await bare.stop(None)
            await guarded.stop(0)


if __name__ == "__main__":
    asyncio.run(_main())
