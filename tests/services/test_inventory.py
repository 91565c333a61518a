"""Stock is reserved once, given back once, and watched as it changes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.message import Message
from shop.v1.inventory_pb2 import GetStockRequest, ReleaseRequest, ReserveRequest, WatchStockRequest
from shop.v1.inventory_pb2_grpc import InventoryServiceStub

from tests.services.shop import Stubs

if TYPE_CHECKING:
    from shop.v1.inventory_pb2_grpc import InventoryServiceAsyncStub

STOCK = 1_000_000


async def reserve(
    inventory: InventoryServiceAsyncStub, quantity: int = 3, attempt: int = 1, order_id: str = "order-1"
) -> int:
    request = ReserveRequest(order_id=order_id, sku="grinder", quantity=quantity, attempt=attempt)
    return (await inventory.Reserve(request)).available


async def release(inventory: InventoryServiceAsyncStub, attempt: int = 1) -> None:
    await inventory.Release(ReleaseRequest(order_id="order-1", attempt=attempt))


async def stock(inventory: InventoryServiceAsyncStub) -> int:
    return (await inventory.GetStock(GetStockRequest(sku="grinder"))).available


async def test_a_repeated_reservation_takes_stock_once(shop: Stubs) -> None:
    assert await reserve(shop.inventory) == STOCK - 3
    assert await reserve(shop.inventory) == STOCK - 3
    assert await reserve(shop.inventory, attempt=2) == STOCK - 3


async def test_a_repeated_release_gives_back_once(shop: Stubs) -> None:
    await reserve(shop.inventory)
    await release(shop.inventory)
    await release(shop.inventory)
    assert await stock(shop.inventory) == STOCK


async def test_the_release_of_an_earlier_attempt_changes_nothing(shop: Stubs) -> None:
    await reserve(shop.inventory, attempt=2)
    await release(shop.inventory, attempt=1)
    assert await stock(shop.inventory) == STOCK - 3


@pytest.mark.parametrize("reserved_before", [True, False])
async def test_a_reservation_that_comes_after_its_release_is_aborted(shop: Stubs, reserved_before: bool) -> None:
    if reserved_before:
        await reserve(shop.inventory)
    await release(shop.inventory)
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await reserve(shop.inventory)
    assert late.value.code() is grpc.StatusCode.ABORTED
    assert await reserve(shop.inventory, attempt=2) == STOCK - 3


async def test_the_reservation_of_an_earlier_attempt_is_aborted(shop: Stubs) -> None:
    await reserve(shop.inventory, attempt=2)
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await reserve(shop.inventory, attempt=1)
    assert late.value.code() is grpc.StatusCode.ABORTED


async def test_two_instances_never_sell_the_same_unit(shop: Stubs) -> None:
    other = InventoryServiceStub(await shop.shop.inventory())
    quantity = STOCK // 4
    answers = await asyncio.gather(
        *(
            reserve(inventory, quantity, order_id=f"order-{name}-{number}")
            for name, inventory in (("a", shop.inventory), ("b", other))
            for number in range(4)
        ),
        return_exceptions=True,
    )
    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert [error.code() for error in refused] == [grpc.StatusCode.FAILED_PRECONDITION] * 4
    assert await stock(shop.inventory) == 0


async def test_a_watch_tells_the_stock_at_once_and_at_each_change_by_any_instance(shop: Stubs) -> None:
    other = InventoryServiceStub(await shop.shop.inventory())
    watch = shop.inventory.WatchStock(WatchStockRequest(sku="grinder"), timeout=10)
    told = aiter(watch)
    assert (await anext(told)).available == STOCK
    await reserve(shop.inventory, order_id="order-own")
    assert (await anext(told)).available == STOCK - 3
    await reserve(other, order_id="order-other")
    assert (await anext(told)).available == STOCK - 6
    watch.cancel()


async def test_a_shutdown_ends_watches(shop: Stubs) -> None:
    told = aiter(shop.inventory.WatchStock(WatchStockRequest(sku="grinder"), timeout=10))
    await anext(told)
    shop.shop.stopping.set()
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await anext(told)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("GetStock", GetStockRequest(sku="moon"), grpc.StatusCode.NOT_FOUND),
        ("Reserve", ReserveRequest(order_id="o", sku="moon", quantity=1, attempt=1), grpc.StatusCode.NOT_FOUND),
        ("Reserve", ReserveRequest(sku="grinder", quantity=1, attempt=1), grpc.StatusCode.INVALID_ARGUMENT),
        ("Reserve", ReserveRequest(order_id="o", sku="grinder", attempt=1), grpc.StatusCode.INVALID_ARGUMENT),
        ("Reserve", ReserveRequest(order_id="o", sku="grinder", quantity=1), grpc.StatusCode.INVALID_ARGUMENT),
        ("Release", ReleaseRequest(attempt=1), grpc.StatusCode.INVALID_ARGUMENT),
        ("Release", ReleaseRequest(order_id="o"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_bad_request_is_refused(shop: Stubs, method: str, request_: Message, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await getattr(shop.inventory, method)(request_)
    assert refused.value.code() is code


async def test_an_order_cannot_reserve_something_else(shop: Stubs) -> None:
    await reserve(shop.inventory, quantity=3)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await reserve(shop.inventory, quantity=4)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_item_cannot_be_watched(shop: Stubs) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await anext(aiter(shop.inventory.WatchStock(WatchStockRequest(sku="moon"))))
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
