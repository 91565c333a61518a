"""The shop's services on real sockets, without a mesh: plain grpc servers and channels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from shop.v1.inventory_pb2_grpc import InventoryServiceStub, add_InventoryServiceServicer_to_server
from shop.v1.orders_pb2_grpc import OrderServiceStub, add_OrderServiceServicer_to_server
from shop.v1.payments_pb2_grpc import PaymentServiceStub, add_PaymentServiceServicer_to_server

from mesh_client.events import EventBus
from mesh_client.transport import PlaintextTransport
from services.common.database import Database
from services.inventory import store as inventory_store
from services.inventory.service import InventoryService
from services.inventory.store import InventoryStore
from services.orders import store as order_store
from services.orders.service import OrderService
from services.orders.store import OrderStore
from services.payments import store as payment_store
from services.payments.outage import Outage
from services.payments.service import PaymentService
from services.payments.store import PaymentStore

if TYPE_CHECKING:
    from shop.v1.inventory_pb2_grpc import InventoryServiceAsyncStub
    from shop.v1.orders_pb2_grpc import OrderServiceAsyncStub
    from shop.v1.payments_pb2_grpc import PaymentServiceAsyncStub


@asynccontextmanager
async def serve(add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of its own on a port that the system picks."""
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


@dataclass
class Shop:
    """Starts instances of the services over SQLite files in one directory; entered on the given stack."""

    directory: Path
    stack: AsyncExitStack
    outage: Outage = field(default_factory=Outage)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def inventory(self) -> grpc.aio.Channel:
        """A further instance of inventory."""
        database = await self.stack.enter_async_context(
            Database(self.directory / "inventory.sqlite", inventory_store.SCHEMA)
        )
        service = InventoryService(InventoryStore(database), self.stopping)
        return await self.stack.enter_async_context(
            serve(lambda server: add_InventoryServiceServicer_to_server(service, server))
        )

    async def payments(self) -> grpc.aio.Channel:
        """A further instance of payments."""
        database = await self.stack.enter_async_context(
            Database(self.directory / "payments.sqlite", payment_store.SCHEMA)
        )
        service = PaymentService(PaymentStore(database), self.outage)
        return await self.stack.enter_async_context(
            serve(lambda server: add_PaymentServiceServicer_to_server(service, server))
        )

    async def orders(self, inventory: grpc.aio.Channel, payments: grpc.aio.Channel, instance: str) -> grpc.aio.Channel:
        """A further instance of orders."""
        database = await self.stack.enter_async_context(Database(self.directory / "orders.sqlite", order_store.SCHEMA))
        events = EventBus("orders", PlaintextTransport(), None, self.directory / "orders.sqlite")
        self.stack.push_async_callback(events.close)
        service = OrderService(OrderStore(database), inventory, payments, events, instance)
        self.stack.push_async_callback(service.settled)
        return await self.stack.enter_async_context(
            serve(lambda server: add_OrderServiceServicer_to_server(service, server))
        )


@dataclass
class Stubs:
    """One shop, ready to call; two instances of orders on one file."""

    shop: Shop
    orders: OrderServiceAsyncStub
    orders_b: OrderServiceAsyncStub
    inventory: InventoryServiceAsyncStub
    payments: PaymentServiceAsyncStub


async def open_shop(directory: Path, stack: AsyncExitStack) -> Stubs:
    """A whole shop with two instances of orders."""
    shop = Shop(directory, stack)
    inventory, payments = await shop.inventory(), await shop.payments()
    return Stubs(
        shop,
        OrderServiceStub(await shop.orders(inventory, payments, "orders-a")),
        OrderServiceStub(await shop.orders(inventory, payments, "orders-b")),
        InventoryServiceStub(inventory),
        PaymentServiceStub(payments),
    )
