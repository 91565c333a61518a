"""Customers are told each thing once, in the order in which it happened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from shop.v1.events_pb2 import OrderPlaced, OrderShipped
from shop.v1.notifications_pb2 import ListNotificationsRequest
from shop.v1.notifications_pb2_grpc import NotificationServiceStub, add_NotificationServiceServicer_to_server

from services.common.database import Database
from services.notifications.service import NotificationService
from services.notifications.store import SCHEMA, NotificationStore
from tests.services.events import event, rows
from tests.services.shop import serve

if TYPE_CHECKING:
    from shop.v1.notifications_pb2_grpc import NotificationServiceAsyncStub

PLACED = OrderPlaced(order_id="order-1", sku="tea", quantity=2, amount_cents=905)
SHIPPED = OrderShipped(order_id="order-1", shipment_id="ship-1")


@dataclass
class Instance:
    """Notifications: its handlers and its RPCs."""

    service: NotificationService
    stub: NotificationServiceAsyncStub

    async def told(self, order_id: str = "order-1") -> list[str]:
        answer = await self.stub.ListNotifications(ListNotificationsRequest(order_id=order_id))
        return list(answer.texts)


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Instance]:
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(Database(tmp_path / "notifications.sqlite", SCHEMA))
        service = NotificationService(NotificationStore(database))
        channel = await stack.enter_async_context(
            serve(lambda server: add_NotificationServiceServicer_to_server(service, server))
        )
        yield Instance(service, NotificationServiceStub(channel))


async def test_customers_are_told_what_becomes_of_their_order(instance: Instance) -> None:
    await instance.service.order_placed(event(PLACED, "e1", "notifications"))
    await instance.service.order_shipped(event(SHIPPED, "e2", "notifications", "mesh:shipping"))
    await instance.service.order_placed(event(OrderPlaced(order_id="order-2", sku="pot"), "e3", "notifications"))
    assert await instance.told() == [
        "Thank you for your order of 2 tea, 9.05 EUR.",
        "Your order is on its way as ship-1.",
    ]
    assert len(await instance.told("order-2")) == 1
    assert await instance.told("order-3") == []


async def test_an_event_that_comes_again_tells_nothing(instance: Instance, tmp_path: Path) -> None:
    for _ in range(3):
        await instance.service.order_placed(event(PLACED, "e1", "notifications"))
    assert len(await instance.told()) == 1
    assert rows(tmp_path / "notifications.sqlite", "SELECT id FROM duplicates") == [("e1",), ("e1",)]


async def test_ids_are_unique_for_each_publisher_alone(instance: Instance) -> None:
    await instance.service.order_placed(event(PLACED, "e1", "notifications"))
    await instance.service.order_shipped(event(SHIPPED, "e1", "notifications", "mesh:shipping"))
    assert len(await instance.told()) == 2
