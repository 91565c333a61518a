"""Orders are shipped once, however often shipping hears of them, and never without saying so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from shop.v1.events_pb2 import OrderPlaced, OrderShipped
from shop.v1.shipping_pb2 import GetShipmentRequest
from shop.v1.shipping_pb2_grpc import ShippingServiceStub, add_ShippingServiceServicer_to_server

from mesh_client.events import EventBus, OutboxFullError
from mesh_client.transport import PlaintextTransport
from services.common.database import Database
from services.shipping.service import ShippingService
from services.shipping.store import SCHEMA, ShipmentStore
from tests.services.events import event, outbox, rows
from tests.services.shop import serve

if TYPE_CHECKING:
    from shop.v1.shipping_pb2_grpc import ShippingServiceAsyncStub

PLACED = OrderPlaced(order_id="order-1", sku="tea", quantity=2, amount_cents=900)


@dataclass
class Instance:
    """One instance of shipping: its handler and its RPCs."""

    service: ShippingService
    stub: ShippingServiceAsyncStub


Start = Callable[..., Awaitable[Instance]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts instances over one file; their outbox has no broker."""
    async with AsyncExitStack() as stack:

        async def started(max_events: int = 100) -> Instance:
            path = tmp_path / "shipping.sqlite"
            database = await stack.enter_async_context(Database(path, SCHEMA))
            bus = EventBus("shipping", PlaintextTransport(), None, path, max_events=max_events)
            await stack.enter_async_context(bus)
            service = ShippingService(ShipmentStore(database), bus)
            channel = await stack.enter_async_context(
                serve(lambda server: add_ShippingServiceServicer_to_server(service, server))
            )
            return Instance(service, ShippingServiceStub(channel))

        yield started


async def test_a_placed_order_is_shipped_and_that_is_published(start: Start, tmp_path: Path) -> None:
    instance = await start()
    await instance.service.order_placed(event(PLACED, "e1", "shipping"))
    shipment = await instance.stub.GetShipment(GetShipmentRequest(order_id="order-1"))
    assert (shipment.sku, shipment.quantity) == ("tea", 2)
    assert shipment.shipment_id.startswith("ship-")
    [(type, key, body)] = outbox(tmp_path / "shipping.sqlite")
    assert (type, key) == ("shop.v1.OrderShipped", "order-1")
    assert isinstance(body, bytes)
    assert OrderShipped.FromString(body) == OrderShipped(order_id="order-1", shipment_id=shipment.shipment_id)


async def test_an_event_that_comes_again_ships_nothing_at_whichever_instance(start: Start, tmp_path: Path) -> None:
    one, two = await start(), await start()
    await asyncio.gather(
        *(each.service.order_placed(event(PLACED, "e1", "shipping")) for each in (one, two) for _ in range(5))
    )
    answers = [await each.stub.GetShipment(GetShipmentRequest(order_id="order-1")) for each in (one, two)]
    assert answers[0] == answers[1]
    path = tmp_path / "shipping.sqlite"
    assert len(outbox(path)) == 1
    assert rows(path, "SELECT count(*) FROM shipments") == [(1,)]
    assert rows(path, "SELECT id, count(*) FROM duplicates GROUP BY id") == [("e1", 9)]


async def test_an_order_is_not_shipped_while_there_is_no_room_to_say_so(start: Start, tmp_path: Path) -> None:
    """Its event is not noted either: it is handled when it comes again, once there is room."""
    instance = await start(max_events=1)
    await instance.service.order_placed(event(PLACED, "e1", "shipping"))
    second = event(OrderPlaced(order_id="order-2", sku="tea", quantity=1), "e2", "shipping")
    with pytest.raises(OutboxFullError):
        await instance.service.order_placed(second)
    with pytest.raises(grpc.aio.AioRpcError):
        await instance.stub.GetShipment(GetShipmentRequest(order_id="order-2"))
    roomy = await start(max_events=2)
    await roomy.service.order_placed(second)
    assert (await instance.stub.GetShipment(GetShipmentRequest(order_id="order-2"))).quantity == 1
    assert [key for _, key, _ in outbox(tmp_path / "shipping.sqlite")] == ["order-1", "order-2"]


async def test_an_order_that_has_not_been_shipped_is_not_found(start: Start) -> None:
    instance = await start()
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await instance.stub.GetShipment(GetShipmentRequest(order_id="order-1"))
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
    assert "'order-1' has no shipment yet" in (missing.value.details() or "")
