"""A child process: one instance of the shop's inventory that answers at once. Says its port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from shop.v1 import inventory_pb2, inventory_pb2_grpc

from benchmarks.processes import serve_parent

MESSAGES = 10
"""Responses of each stream."""


class Inventory(inventory_pb2_grpc.InventoryServiceServicer):
    """Has the same stock for ever."""

    async def GetStock(self, request: Any, context: Any) -> inventory_pb2.GetStockResponse:
        """One response."""
        return inventory_pb2.GetStockResponse(sku=request.sku, available=7)

    async def Reserve(self, request: Any, context: Any) -> inventory_pb2.ReserveResponse:
        """Takes nothing."""
        return inventory_pb2.ReserveResponse(available=7)

    async def Release(self, request: Any, context: Any) -> inventory_pb2.ReleaseResponse:
        """Gives nothing back."""
        return inventory_pb2.ReleaseResponse()

    async def WatchStock(self, request: Any, context: Any) -> AsyncIterator[inventory_pb2.WatchStockResponse]:
        """`MESSAGES` responses."""
        for number in range(MESSAGES):
            yield inventory_pb2.WatchStockResponse(available=number)


async def _main() -> None:
    server = grpc.aio.server()
    inventory_pb2_grpc.add_InventoryServiceServicer_to_server(Inventory(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        await serve_parent(port)
    finally:
        await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_main())
