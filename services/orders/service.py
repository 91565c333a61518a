"""`shop.v1.OrderService`."""

from __future__ import annotations

import asyncio
import contextvars
import logging

import grpc
from shop.v1 import inventory_pb2, payments_pb2
from shop.v1 import orders_pb2 as pb
from shop.v1.events_pb2 import OrderPlaced
from shop.v1.inventory_pb2_grpc import InventoryServiceStub
from shop.v1.orders_pb2_grpc import OrderServiceServicer
from shop.v1.payments_pb2_grpc import PaymentServiceStub

from mesh_client.events import EventBus
from services.orders.listing import OrderQuery, next_page_token
from services.orders.messages import order_message
from services.orders.store import OrderStore, State, StoredOrder

logger = logging.getLogger(__name__)

PRICES_CENTS = {"espresso-beans": 1250, "filter-paper": 450, "grinder": 18900}
"""What the shop sells, and for how much a unit."""

ROUNDS = 3
"""How often an attempt begins anew after another one took the order over, perhaps only to be cancelled itself."""

RELEASE_TIMEOUT = 5.0
"""Seconds in which stock is given back, whatever was left of the call's own time."""

MAX_TEXT = 200
"""Characters of a note, or of a reason."""


class OrderService(OrderServiceServicer):
    """Takes orders.

    An order is a saga of three databases: remember it, reserve stock, charge. Every step may be repeated, and the
    idempotency key makes the whole repeatable, so the mesh and the caller are free to retry.
    """

    def __init__(
        self,
        orders: OrderStore,
        inventory: grpc.aio.Channel,
        payments: grpc.aio.Channel,
        events: EventBus,
        instance: str,
    ) -> None:
        self._orders = orders
        self._inventory = InventoryServiceStub(inventory)
        self._payments = PaymentServiceStub(payments)
        self._events = events
        self._instance = instance
        self._releases: set[asyncio.Task[None]] = set()

    async def settled(self) -> None:
        """Returns when stock that was to be given back has been. For the end, once no calls are served any more."""
        await asyncio.gather(*self._releases)

    async def PlaceOrder(
        self,
        request: pb.PlaceOrderRequest,
        context: grpc.aio.ServicerContext[pb.PlaceOrderRequest, pb.PlaceOrderResponse],
    ) -> pb.PlaceOrderResponse:
        """Places an order, or goes on with the one that the idempotency key belongs to."""
        if not 1 <= len(request.idempotency_key) <= 64:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "idempotency_key must have 1 to 64 characters")
        if not 1 <= request.quantity <= 100:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "quantity must be 1 to 100")
        if request.sku not in PRICES_CENTS:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"the shop does not sell {request.sku!r}")
        for _ in range(ROUNDS):
            order = await self._orders.begin(
                request.idempotency_key,
                request.sku,
                request.quantity,
                PRICES_CENTS[request.sku] * request.quantity,
                self._instance,
            )
            if (order.sku, order.quantity) != (request.sku, request.quantity):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "idempotency_key belongs to another order")
            try:
                finished = order if order.state is not State.PENDING else await self._fulfil(order)
            except asyncio.CancelledError:
                # The caller has given up, and may never come back with this key.
                self._give_up(order, "the call was cancelled")
                raise
            except grpc.aio.AioRpcError as error:
                await asyncio.shield(self._give_up(order, f"{error.code().name}: {error.details()}"))
                # Not UNAVAILABLE: this instance is well, and the mesh must not try all others in turn.
                await context.abort(
                    grpc.StatusCode.ABORTED, f"cannot be fulfilled now, try again with the same key: {error.details()}"
                )
            if finished is not None:
                break
        else:
            await context.abort(grpc.StatusCode.ABORTED, "other attempts at this order keep taking over; try again")
        return pb.PlaceOrderResponse(order=order_message(finished))

    async def GetOrder(
        self, request: pb.GetOrderRequest, context: grpc.aio.ServicerContext[pb.GetOrderRequest, pb.GetOrderResponse]
    ) -> pb.GetOrderResponse:
        """One order, whichever instance took it."""
        if request.order_id:
            order = await self._orders.find(request.order_id)
        elif request.idempotency_key:
            order = await self._orders.find_by_key(request.idempotency_key)
        else:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "order_id or idempotency_key is needed")
        if order is None:
            wanted = request.order_id or request.idempotency_key
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no order {wanted!r}")
        return pb.GetOrderResponse(order=order_message(order))

    async def ListOrders(
        self,
        request: pb.ListOrdersRequest,
        context: grpc.aio.ServicerContext[pb.ListOrdersRequest, pb.ListOrdersResponse],
    ) -> pb.ListOrdersResponse:
        """Orders, page by page."""
        try:
            query = OrderQuery.of(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        page = await self._orders.list(
            query.selection, oldest_first=query.oldest_first, after=query.after, limit=query.limit
        )
        return pb.ListOrdersResponse(
            orders=map(order_message, page.orders),
            next_page_token=next_page_token(page),
            total_amount_cents=page.total_amount_cents,
        )

    async def UpdateOrder(
        self,
        request: pb.UpdateOrderRequest,
        context: grpc.aio.ServicerContext[pb.UpdateOrderRequest, pb.UpdateOrderResponse],
    ) -> pb.UpdateOrderResponse:
        """Changes what may be changed of an order."""
        if len(request.order.note) > MAX_TEXT:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"order.note must have at most {MAX_TEXT} characters")
        order = await self._orders.annotate(request.order_id, request.order.note)
        if order is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no order {request.order_id!r}")
        return pb.UpdateOrderResponse(order=order_message(order))

    async def CancelOrder(
        self,
        request: pb.CancelOrderRequest,
        context: grpc.aio.ServicerContext[pb.CancelOrderRequest, pb.CancelOrderResponse],
    ) -> pb.CancelOrderResponse:
        """Cancels a placed order. Each step may be repeated, and the last one is to say that it is cancelled."""
        if len(request.reason) > MAX_TEXT:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"reason must have at most {MAX_TEXT} characters")
        order = await self._orders.find(request.order_id)
        if order is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no order {request.order_id!r}")
        if order.state is State.PLACED:
            try:
                await self._payments.Refund(payments_pb2.RefundRequest(order_id=order.order_id))
                await self._release(order)
            except grpc.aio.AioRpcError as error:
                await context.abort(grpc.StatusCode.ABORTED, f"cannot be cancelled now, try again: {error.details()}")
            order = await self._orders.cancel(order.order_id, request.reason) or order
            logger.info("cancelled", extra={"order": order.order_id})
        if order.state is not State.CANCELLED:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"the order is {order.state}, not placed")
        return pb.CancelOrderResponse(order=order_message(order))

    async def _fulfil(self, order: StoredOrder) -> StoredOrder | None:
        """The finished order; None when a later attempt took over. Errors other than a refusal are raised."""
        try:
            await self._inventory.Reserve(
                inventory_pb2.ReserveRequest(
                    order_id=order.order_id, sku=order.sku, quantity=order.quantity, attempt=order.attempt
                )
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.ABORTED:
                return None
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return await self._reject(order, error)
        try:
            charge = await self._payments.Charge(
                payments_pb2.ChargeRequest(order_id=order.order_id, amount_cents=order.amount_cents, currency="EUR")
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            await self._release(order)
            return await self._reject(order, error)
        logger.info("placed", extra={"order": order.order_id, "payment": charge.payment_id})
        placed = OrderPlaced(
            order_id=order.order_id, sku=order.sku, quantity=order.quantity, amount_cents=order.amount_cents
        )
        event = self._events.prepare(placed, key=order.order_id)
        finished = await self._orders.finish(order, State.PLACED, payment_id=charge.payment_id, event=event)
        self._events.stored()
        return finished

    async def _reject(self, order: StoredOrder, refusal: grpc.aio.AioRpcError) -> StoredOrder | None:
        logger.info("rejected", extra={"order": order.order_id, "reason": refusal.details()})
        return await self._orders.finish(order, State.REJECTED, rejection=refusal.details() or "refused")

    def _give_up(self, order: StoredOrder, cause: str) -> asyncio.Task[None]:
        """Gives the stock back. The order stays pending: a repetition finds out whether it was charged."""
        logger.warning("given up", extra={"order": order.order_id, "cause": cause})
        # In a context of its own, for it outlives the call, whose deadline outbound calls inherit.
        task = asyncio.create_task(self._release_pending(order), context=contextvars.Context())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        return task

    async def _release_pending(self, order: StoredOrder) -> None:
        # What was begun of finishing it comes first in the file: it may be placed by now.
        found = await self._orders.find(order.order_id)
        if found is None or found.state is not State.PENDING:
            return
        try:
            await self._release(order)
        except grpc.aio.AioRpcError as error:
            logger.warning("stock stays reserved", extra={"order": order.order_id, "cause": error.details()})

    async def _release(self, order: StoredOrder) -> None:
        await self._inventory.Release(
            inventory_pb2.ReleaseRequest(order_id=order.order_id, attempt=order.attempt), timeout=RELEASE_TIMEOUT
        )
