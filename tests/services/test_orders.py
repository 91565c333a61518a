"""Orders are placed once, refused cleanly, and give back what they cannot pay."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from shop.v1.inventory_pb2 import GetStockRequest, ReleaseRequest, WatchStockRequest
from shop.v1.orders_pb2 import (
    ORDER_STATE_PENDING,
    ORDER_STATE_PLACED,
    ORDER_STATE_REJECTED,
    GetOrderRequest,
    Order,
    PlaceOrderRequest,
)
from shop.v1.orders_pb2_grpc import OrderServiceStub
from shop.v1.payments_pb2 import GetPaymentRequest

from services.common.database import Database
from services.orders.store import SCHEMA, OrderStore, State
from tests.services.shop import Shop, Stubs

if TYPE_CHECKING:
    from shop.v1.orders_pb2_grpc import OrderServiceAsyncStub

STOCK = 1_000_000


def an_order(quantity: int = 2, sku: str = "grinder", key: str | None = None) -> PlaceOrderRequest:
    return PlaceOrderRequest(idempotency_key=key or uuid.uuid4().hex, sku=sku, quantity=quantity)


async def place(orders: OrderServiceAsyncStub, request: PlaceOrderRequest) -> Order:
    response = await orders.PlaceOrder(request, timeout=10)
    return response.order


async def stock(shop: Stubs, sku: str = "grinder") -> int:
    return (await shop.inventory.GetStock(GetStockRequest(sku=sku))).available


async def test_an_order_is_reserved_charged_and_remembered(shop: Stubs) -> None:
    order = await place(shop.orders, an_order(quantity=3))
    assert order.state == ORDER_STATE_PLACED
    assert order.taken_by == "orders-a"
    assert order.amount_cents == 3 * 18900
    assert await stock(shop) == STOCK - 3
    payment = await shop.payments.GetPayment(GetPaymentRequest(order_id=order.order_id))
    assert (payment.payment_id, payment.amount_cents, payment.currency) == (order.payment_id, 3 * 18900, "EUR")


async def test_an_order_taken_by_one_instance_is_read_at_another(shop: Stubs) -> None:
    order = await place(shop.orders, an_order())
    assert (await shop.orders_b.GetOrder(GetOrderRequest(order_id=order.order_id))).order == order


async def test_a_repeated_key_returns_the_first_order_at_any_instance(shop: Stubs) -> None:
    request = an_order()
    first = await place(shop.orders, request)
    assert await place(shop.orders_b, request) == first
    assert await stock(shop) == STOCK - 2


async def test_one_key_sent_many_times_at_once_places_one_order(shop: Stubs) -> None:
    request = an_order()
    answers = await asyncio.gather(
        *(place(orders, request) for orders in (shop.orders, shop.orders_b) for _ in range(5)), return_exceptions=True
    )
    placed = [answer for answer in answers if isinstance(answer, Order)]
    overtaken = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(placed) + len(overtaken) == len(answers)
    assert {error.code() for error in overtaken} <= {grpc.StatusCode.ABORTED}
    final = await place(shop.orders, request)
    assert all(order == final for order in placed)
    assert final.state == ORDER_STATE_PLACED
    assert await stock(shop) == STOCK - 2


async def test_a_declined_payment_rejects_the_order_and_gives_the_stock_back(shop: Stubs) -> None:
    request = an_order(quantity=100)
    order = await place(shop.orders, request)
    assert order.state == ORDER_STATE_REJECTED
    assert order.rejection == "the payment was declined"
    assert await stock(shop) == STOCK
    assert await place(shop.orders_b, request) == order


async def test_missing_stock_rejects_the_order_before_it_is_charged(shop: Stubs) -> None:
    async with Database(shop.shop.directory / "inventory.sqlite", "") as database:
        await database.write(lambda connection: connection.execute("UPDATE stock SET available = 1"))
    order = await place(shop.orders, an_order(quantity=2))
    assert (order.state, order.rejection) == (ORDER_STATE_REJECTED, "not enough of grinder is left")
    assert await stock(shop) == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await shop.payments.GetPayment(GetPaymentRequest(order_id=order.order_id))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_while_payments_fail_stock_goes_back_and_the_same_key_succeeds_later(shop: Stubs) -> None:
    request = an_order()
    shop.shop.outage.switch(True)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await place(shop.orders, request)
    assert failed.value.code() is grpc.StatusCode.ABORTED
    assert "same key" in (failed.value.details() or "")
    assert await stock(shop) == STOCK
    shop.shop.outage.switch(False)
    order = await place(shop.orders_b, request)
    assert (order.state, order.taken_by) == (ORDER_STATE_PLACED, "orders-a")
    assert await stock(shop) == STOCK - 2


async def test_an_attempt_that_was_overtaken_undoes_nothing(shop: Stubs, tmp_path: Path) -> None:
    """An instance that hung between its steps comes back when another has finished the order."""
    request = an_order()
    async with Database(tmp_path / "orders.sqlite", SCHEMA) as database:
        hung = OrderStore(database)
        order = await hung.begin(request.idempotency_key, request.sku, request.quantity, 2 * 18900, "orders-hung")
        placed = await place(shop.orders, request)
        assert placed.order_id == order.order_id
        await shop.inventory.Release(ReleaseRequest(order_id=order.order_id, attempt=order.attempt))
        assert await hung.finish(order, State.REJECTED, rejection="late") is None
    assert await stock(shop) == STOCK - 2
    assert (await shop.orders.GetOrder(GetOrderRequest(order_id=order.order_id))).order == placed


async def test_an_order_left_half_done_is_shown_as_pending(shop: Stubs, tmp_path: Path) -> None:
    async with Database(tmp_path / "orders.sqlite", SCHEMA) as database:
        order = await OrderStore(database).begin("key", "grinder", 1, 18900, "orders-killed")
    answer = await shop.orders.GetOrder(GetOrderRequest(order_id=order.order_id))
    assert answer.order.state == ORDER_STATE_PENDING


@asynccontextmanager
async def held_at_payments(
    shop: Stubs, directory: Path, request: PlaceOrderRequest
) -> AsyncIterator[asyncio.Task[Order]]:
    """An order that has its stock and is being placed at payments, which cannot write until the end."""
    async with Database(directory / "payments.sqlite", "") as file:
        release, held = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def hold(_: object) -> None:
            loop.call_soon_threadsafe(held.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(timeout=10)

        holding = asyncio.create_task(file.write(hold))
        await held.wait()
        before = await stock(shop)
        placing = asyncio.create_task(place(shop.orders, request))
        await until_stock(shop, lambda available: available < before)
        try:
            yield placing
        finally:
            release.set()
            await holding


async def until_stock(shop: Stubs, holds: Callable[[int], bool]) -> None:
    watch = shop.inventory.WatchStock(WatchStockRequest(sku="grinder"), timeout=10)
    async for change in watch:
        if holds(change.available):
            break
    watch.cancel()


async def overtake(shop: Stubs, directory: Path, request: PlaceOrderRequest) -> asyncio.Task[Order]:
    """An order that is being placed at payments while another attempt, which goes no further, has begun."""
    async with (
        Database(directory / "orders.sqlite", SCHEMA) as orders,
        held_at_payments(shop, directory, request) as placing,
    ):
        await OrderStore(orders).begin(request.idempotency_key, request.sku, request.quantity, 0, "orders-b")
    return placing


async def test_a_call_that_is_cancelled_halfway_gives_the_stock_back_and_the_same_key_succeeds_later(
    shop: Stubs, tmp_path: Path
) -> None:
    request = an_order()
    async with held_at_payments(shop, tmp_path, request) as placing:
        placing.cancel()
        await until_stock(shop, lambda available: available == STOCK)
    order = await place(shop.orders_b, request)
    assert order.state == ORDER_STATE_PLACED
    assert await stock(shop) == STOCK - 2


async def test_an_order_overtaken_by_an_attempt_that_was_cancelled_is_placed_all_the_same(
    shop: Stubs, tmp_path: Path
) -> None:
    order = await (await overtake(shop, tmp_path, an_order()))
    assert (order.state, order.taken_by) == (ORDER_STATE_PLACED, "orders-a")
    assert await stock(shop) == STOCK - 2


async def test_an_order_overtaken_again_and_again_is_aborted(
    shop: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.orders.service.ROUNDS", 1)
    request = an_order()
    placing = await overtake(shop, tmp_path, request)
    with pytest.raises(grpc.aio.AioRpcError) as overtaken:
        await placing
    assert overtaken.value.code() is grpc.StatusCode.ABORTED
    assert (await place(shop.orders_b, request)).state == ORDER_STATE_PLACED
    assert await stock(shop) == STOCK - 2


async def test_an_attempt_that_inventory_has_seen_overtaken_begins_anew(shop: Stubs, tmp_path: Path) -> None:
    request = an_order()
    async with Database(tmp_path / "orders.sqlite", SCHEMA) as database:
        order = await OrderStore(database).begin(request.idempotency_key, "grinder", 2, 2 * 18900, "orders-b")
    await shop.inventory.Release(ReleaseRequest(order_id=order.order_id, attempt=order.attempt + 1))
    assert (await place(shop.orders, request)).state == ORDER_STATE_PLACED
    assert await stock(shop) == STOCK - 2


async def test_when_inventory_is_gone_the_order_is_aborted_not_unavailable(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        shop = Shop(tmp_path, stack)
        nobody = await stack.enter_async_context(grpc.aio.insecure_channel("127.0.0.1:1"))
        orders = OrderServiceStub(await shop.orders(nobody, nobody, "orders-a"))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await orders.PlaceOrder(an_order())
        assert failed.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    ("request_", "code", "word"),
    [
        (PlaceOrderRequest(sku="grinder", quantity=1), grpc.StatusCode.INVALID_ARGUMENT, "idempotency_key"),
        (an_order(key="k" * 65), grpc.StatusCode.INVALID_ARGUMENT, "idempotency_key"),
        (an_order(quantity=0), grpc.StatusCode.INVALID_ARGUMENT, "quantity"),
        (an_order(quantity=101), grpc.StatusCode.INVALID_ARGUMENT, "quantity"),
        (an_order(sku="moon"), grpc.StatusCode.NOT_FOUND, "moon"),
    ],
)
async def test_a_bad_request_is_refused_by_name(
    shop: Stubs, request_: PlaceOrderRequest, code: grpc.StatusCode, word: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await place(shop.orders, request_)
    assert refused.value.code() is code
    assert word in (refused.value.details() or "")


async def test_a_key_of_another_order_is_refused(shop: Stubs) -> None:
    request = an_order(quantity=1)
    await place(shop.orders, request)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await place(shop.orders, an_order(quantity=2, key=request.idempotency_key))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_unknown_order_is_not_found(shop: Stubs) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await shop.orders.GetOrder(GetOrderRequest(order_id="order-none"))
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
