"""Orders are listed page by page, annotated, and cancelled with everything given back."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from shop.v1.inventory_pb2 import GetStockRequest
from shop.v1.orders_pb2 import (
    ORDER_SORT_OLDEST_FIRST,
    ORDER_STATE_CANCELLED,
    ORDER_STATE_PENDING,
    ORDER_STATE_PLACED,
    ORDER_STATE_REJECTED,
    CancelOrderRequest,
    GetOrderRequest,
    ListOrdersRequest,
    Order,
    OrderFilter,
    OrderUpdate,
    PlaceOrderRequest,
    UpdateOrderRequest,
)
from shop.v1.payments_pb2 import GetPaymentRequest, RefundRequest

from services.common.database import Database
from services.orders.store import SCHEMA, OrderStore
from tests.services.shop import Stubs


async def place(shop: Stubs, sku: str = "grinder", quantity: int = 1, key: str | None = None) -> Order:
    request = PlaceOrderRequest(idempotency_key=key or uuid.uuid4().hex, sku=sku, quantity=quantity)
    return (await shop.orders.PlaceOrder(request)).order


async def numbers(shop: Stubs, request: ListOrdersRequest) -> list[int]:
    return [order.number for order in (await shop.orders_b.ListOrders(request)).orders]


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


async def test_orders_are_listed_page_by_page_with_what_they_cost_together(shop: Stubs) -> None:
    placed = [await place(shop, quantity=quantity) for quantity in (1, 2, 3)]
    assert [order.number for order in placed] == [1, 2, 3]
    assert await numbers(shop, ListOrdersRequest()) == [3, 2, 1]
    first = await shop.orders.ListOrders(ListOrdersRequest(page_size=2, sort=ORDER_SORT_OLDEST_FIRST))
    assert list(first.orders) == placed[:2]
    assert first.total_amount_cents == 6 * 18900
    second = await shop.orders_b.ListOrders(
        ListOrdersRequest(page_size=2, sort=ORDER_SORT_OLDEST_FIRST, page_token=first.next_page_token)
    )
    assert list(second.orders) == placed[2:]
    assert (second.next_page_token, second.total_amount_cents) == ("", 6 * 18900)
    assert await numbers(shop, ListOrdersRequest(page_token="3", page_size=1)) == [2]


async def test_orders_are_selected_by_state_item_and_time(shop: Stubs) -> None:
    first = await place(shop)
    rejected = await place(shop, quantity=100)
    paper = await place(shop, sku="filter-paper")
    assert await numbers(shop, ListOrdersRequest(states=[ORDER_STATE_REJECTED])) == [rejected.number]
    assert await numbers(shop, ListOrdersRequest(states=[ORDER_STATE_REJECTED, ORDER_STATE_PLACED])) == [3, 2, 1]
    assert await numbers(shop, ListOrdersRequest(filter=OrderFilter(sku="filter-paper"))) == [paper.number]
    since = OrderFilter(taken_from=rejected.taken_at)
    before = OrderFilter(taken_before=rejected.taken_at)
    assert await numbers(shop, ListOrdersRequest(filter=since)) == [3, 2]
    assert await numbers(shop, ListOrdersRequest(filter=before)) == [first.number]
    beyond = OrderFilter(taken_from=Timestamp(seconds=1 << 62))
    answer = await shop.orders.ListOrders(ListOrdersRequest(filter=beyond))
    assert (list(answer.orders), answer.total_amount_cents) == ([], 0)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (ListOrdersRequest(states=[99]), "states"),  # type: ignore[list-item] # what the wire can bring
        (ListOrdersRequest(states=[0]), "states"),  # type: ignore[list-item] # what the wire can bring
        (ListOrdersRequest(sort=99), "sort"),  # type: ignore[arg-type] # what the wire can bring
        (ListOrdersRequest(page_size=-1), "page_size"),
        (ListOrdersRequest(page_size=1_001), "page_size"),
        (ListOrdersRequest(page_token="x"), "page_token"),
        (ListOrdersRequest(page_token="9" * 19), "page_token"),
    ],
)
async def test_a_bad_question_is_refused_by_name(shop: Stubs, request_: ListOrdersRequest, word: str) -> None:
    code, details = await refusal(shop.orders.ListOrders(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert word in details


async def test_an_order_is_found_by_its_key_when_the_answer_was_lost(shop: Stubs) -> None:
    order = await place(shop, key="lost")
    assert (await shop.orders_b.GetOrder(GetOrderRequest(idempotency_key="lost"))).order == order
    code, _ = await refusal(shop.orders.GetOrder(GetOrderRequest(idempotency_key="other")))
    assert code is grpc.StatusCode.NOT_FOUND
    code, _ = await refusal(shop.orders.GetOrder(GetOrderRequest()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_note_is_written_and_removed(shop: Stubs) -> None:
    order = await place(shop)
    request = UpdateOrderRequest(order_id=order.order_id, order=OrderUpdate(note="a gift"))
    assert (await shop.orders.UpdateOrder(request)).order.note == "a gift"
    assert (await shop.orders_b.GetOrder(GetOrderRequest(order_id=order.order_id))).order.note == "a gift"
    assert (await shop.orders.UpdateOrder(UpdateOrderRequest(order_id=order.order_id))).order == order
    code, _ = await refusal(shop.orders.UpdateOrder(UpdateOrderRequest(order_id="none")))
    assert code is grpc.StatusCode.NOT_FOUND
    long = UpdateOrderRequest(order_id=order.order_id, order=OrderUpdate(note="n" * 201))
    code, details = await refusal(shop.orders.UpdateOrder(long))
    assert (code, "note" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_a_cancelled_order_gives_money_and_stock_back_once(shop: Stubs) -> None:
    before = (await shop.inventory.GetStock(GetStockRequest(sku="grinder"))).available
    order = await place(shop, quantity=3)
    request = CancelOrderRequest(order_id=order.order_id, reason="changed my mind")
    cancelled = (await shop.orders.CancelOrder(request)).order
    assert (cancelled.state, cancelled.cancellation) == (ORDER_STATE_CANCELLED, "changed my mind")
    again = CancelOrderRequest(order_id=order.order_id, reason="another one")
    assert (await shop.orders_b.CancelOrder(again)).order == cancelled
    assert (await shop.inventory.GetStock(GetStockRequest(sku="grinder"))).available == before
    assert (await shop.payments.GetPayment(GetPaymentRequest(order_id=order.order_id))).refunded


async def test_an_order_is_not_cancelled_while_payments_fail_and_is_later(shop: Stubs) -> None:
    order = await place(shop)
    shop.shop.outage.switch(True)
    code, details = await refusal(shop.orders.CancelOrder(CancelOrderRequest(order_id=order.order_id)))
    assert (code, "try again" in details) == (grpc.StatusCode.ABORTED, True)
    assert (await shop.orders.GetOrder(GetOrderRequest(order_id=order.order_id))).order == order
    shop.shop.outage.switch(False)
    answer = await shop.orders.CancelOrder(CancelOrderRequest(order_id=order.order_id))
    assert answer.order.state == ORDER_STATE_CANCELLED


async def test_only_a_placed_order_can_be_cancelled(shop: Stubs, tmp_path: Path) -> None:
    rejected = await place(shop, quantity=100)
    async with Database(tmp_path / "orders.sqlite", SCHEMA) as database:
        pending = await OrderStore(database).begin("key", "grinder", 1, 18900, "orders-killed")
    for order_id, word in ((rejected.order_id, "rejected"), (pending.order_id, "pending")):
        code, details = await refusal(shop.orders.CancelOrder(CancelOrderRequest(order_id=order_id)))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert word in details
    left = await shop.orders.GetOrder(GetOrderRequest(order_id=pending.order_id))
    assert left.order.state == ORDER_STATE_PENDING
    code, _ = await refusal(shop.orders.CancelOrder(CancelOrderRequest(order_id="none")))
    assert code is grpc.StatusCode.NOT_FOUND
    code, _ = await refusal(shop.orders.CancelOrder(CancelOrderRequest(order_id="none", reason="r" * 201)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_was_never_charged_is_not_refunded(shop: Stubs) -> None:
    code, _ = await refusal(shop.payments.Refund(RefundRequest(order_id="none")))
    assert code is grpc.StatusCode.NOT_FOUND
    declined = await place(shop, quantity=100)
    code, _ = await refusal(shop.payments.Refund(RefundRequest(order_id=declined.order_id)))
    assert code is grpc.StatusCode.NOT_FOUND
