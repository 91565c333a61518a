"""The whole shop on one gRPC server: ``python -m tests.edge.shop_server DIRECTORY`` prints its port.

In a process of its own, which ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
from shop.v1.inventory_pb2_grpc import add_InventoryServiceServicer_to_server
from shop.v1.orders_pb2_grpc import add_OrderServiceServicer_to_server
from shop.v1.payments_pb2_grpc import add_PaymentServiceServicer_to_server

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


async def main() -> None:
    """Serves until standard input ends."""
    directory = Path(sys.argv[1])
    async with AsyncExitStack() as stack:

        async def database(name: str, schema: str) -> Database:
            return await stack.enter_async_context(Database(directory / f"{name}.sqlite", schema))

        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
        inventory = InventoryStore(await database("inventory", inventory_store.SCHEMA))
        add_InventoryServiceServicer_to_server(InventoryService(inventory, asyncio.Event()), server)
        payments = PaymentStore(await database("payments", payment_store.SCHEMA))
        add_PaymentServiceServicer_to_server(PaymentService(payments, Outage()), server)
        events = EventBus("orders", PlaintextTransport(), None, directory / "orders.sqlite")
        stack.push_async_callback(events.close)
        store = OrderStore(await database("orders", order_store.SCHEMA))
        orders = OrderService(store, channel, channel, events, "orders")
        add_OrderServiceServicer_to_server(orders, server)
        await server.start()
        sys.stdout.write(f"{port}\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await server.stop(None)
        await orders.settled()


if __name__ == "__main__":
    asyncio.run(main())
