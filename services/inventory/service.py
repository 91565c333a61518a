"""`shop.v1.InventoryService`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
from shop.v1 import inventory_pb2 as pb
from shop.v1.inventory_pb2_grpc import InventoryServiceServicer

from services.inventory.store import InventoryStore, OutOfStockError, SupersededError, UnknownSkuError

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 0.2
"""Seconds after which a watch looks for what other instances changed; own changes are seen at once."""


class InventoryService(InventoryServiceServicer):
    """Keeps stock."""

    def __init__(self, inventory: InventoryStore, stopping: asyncio.Event) -> None:
        """Watches, which never end by themselves, end soon after ``stopping`` is set: a shutdown need not wait."""
        self._inventory = inventory
        self._stopping = stopping
        self._changed = asyncio.Event()

    async def GetStock(
        self,
        request: pb.GetStockRequest,
        context: grpc.aio.ServicerContext[pb.GetStockRequest, pb.GetStockResponse],
    ) -> pb.GetStockResponse:
        """How much of an item is left."""
        try:
            return pb.GetStockResponse(sku=request.sku, available=await self._inventory.available(request.sku))
        except UnknownSkuError:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no item {request.sku!r}")

    async def Reserve(
        self, request: pb.ReserveRequest, context: grpc.aio.ServicerContext[pb.ReserveRequest, pb.ReserveResponse]
    ) -> pb.ReserveResponse:
        """Takes stock for an order."""
        if not request.order_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "order_id is empty")
        if request.quantity < 1:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "quantity must be at least 1")
        if request.attempt < 1:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "attempt must be at least 1")
        try:
            available = await self._inventory.reserve(request.order_id, request.sku, request.quantity, request.attempt)
        except UnknownSkuError:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no item {request.sku!r}")
        except OutOfStockError:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"not enough of {request.sku} is left")
        except SupersededError:
            await context.abort(grpc.StatusCode.ABORTED, "a later attempt at this order took over")
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        self._wake_watches()
        logger.info("reserved", extra={"order": request.order_id, "sku": request.sku, "left": available})
        return pb.ReserveResponse(available=available)

    async def Release(
        self, request: pb.ReleaseRequest, context: grpc.aio.ServicerContext[pb.ReleaseRequest, pb.ReleaseResponse]
    ) -> pb.ReleaseResponse:
        """Gives back what an order reserved."""
        if not request.order_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "order_id is empty")
        if request.attempt < 1:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "attempt must be at least 1")
        if await self._inventory.release(request.order_id, request.attempt):
            self._wake_watches()
            logger.info("released", extra={"order": request.order_id})
        return pb.ReleaseResponse()

    async def WatchStock(
        self,
        request: pb.WatchStockRequest,
        context: grpc.aio.ServicerContext[pb.WatchStockRequest, pb.WatchStockResponse],
    ) -> AsyncIterator[pb.WatchStockResponse]:
        """Streams an item's stock. Changes that come faster than the reader reads are told as one."""
        last: int | None = None
        while not self._stopping.is_set():
            changed = self._changed
            try:
                available = await self._inventory.available(request.sku)
            except UnknownSkuError:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no item {request.sku!r}")
            if available != last:
                last = available
                yield pb.WatchStockResponse(available=available)
            try:
                async with asyncio.timeout(WATCH_INTERVAL):
                    await changed.wait()
            except TimeoutError:
                continue
        await context.abort(grpc.StatusCode.UNAVAILABLE, "this instance shuts down; watch again")

    def _wake_watches(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
