"""A child process: one instance of the shop's inventory as a secure server of the mesh. Says its port.

Reads from its environment how it joins, as every process of the mesh does.
"""

from __future__ import annotations

import asyncio

from shop.v1 import inventory_pb2_grpc

import mesh_client
from benchmarks.processes import serve_parent
from benchmarks.shop_server import Inventory


async def _main() -> None:
    server = mesh_client.server("inventory", insecure=False)
    inventory_pb2_grpc.add_InventoryServiceServicer_to_server(Inventory(), server)
    await server.start()
    await server.registered()
    try:
        await serve_parent(server.port)
    finally:
        await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_main())
