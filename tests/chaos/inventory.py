"""A small inventory, which a server of any service can serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from shop.v1 import inventory_pb2, inventory_pb2_grpc

from mesh_client import MeshServer, server

GET = inventory_pb2.GetStockRequest(sku="beans")
WATCH_SHORT = inventory_pb2.WatchStockRequest(sku="short")
WATCH_LONG = inventory_pb2.WatchStockRequest(sku="long")
SHORT = 5
"""Responses of a short stream."""
PACE = 0.05
"""Seconds between responses of a long stream, which has no end of its own."""


class Inventory(inventory_pb2_grpc.InventoryServiceServicer):
    """Counts its own calls."""

    def __init__(self) -> None:
        self._calls = 0

    async def GetStock(
        self, request: inventory_pb2.GetStockRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inventory_pb2.GetStockResponse:
        self._calls += 1
        return inventory_pb2.GetStockResponse(sku=request.sku, available=self._calls)

    async def WatchStock(
        self, request: inventory_pb2.WatchStockRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inventory_pb2.WatchStockResponse]:
        number = 0
        while request.sku == "long" or number < SHORT:
            yield inventory_pb2.WatchStockResponse(available=number)
            number += 1
            if request.sku == "long":
                await asyncio.sleep(PACE)

    async def Reserve(
        self, request: inventory_pb2.ReserveRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inventory_pb2.ReserveResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")

    async def Release(
        self, request: inventory_pb2.ReleaseRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> inventory_pb2.ReleaseResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")


def make_server(service: str, **options: Any) -> MeshServer:
    """A server that has not started, checked often so that tests are quick."""
    made = server(service, **{"check_interval": 0.2, "drain_timeout": 2.0, "grace": 2.0, **options})
    inventory_pb2_grpc.add_InventoryServiceServicer_to_server(Inventory(), made)
    return made
