"""Orders, sent again and again at a steady rate, and what became of each."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
from shop.v1.orders_pb2 import ORDER_STATE_PLACED, GetOrderRequest, Order, PlaceOrderRequest
from shop.v1.orders_pb2_grpc import OrderServiceStub

from mesh_cli.demo.edge import RestError, RestOrders
from mesh_client.core.errors import MeshError
from mesh_client.tasks import end_tasks

CALL_TIMEOUT = 10.0
"""Seconds that a customer waits."""

MAX_IN_FLIGHT = 64
"""Orders at once; a slower shop gets fewer, as real customers would do."""

SKU = "espresso-beans"


class RejectedError(MeshError):
    """The shop answered, and did not take the order."""


@dataclass(slots=True, eq=False)
class Tally:
    """What became of a number of orders. Latencies are in seconds."""

    sent: int = 0
    placed: int = 0
    by_rest: int = 0
    """Those of them that were placed by REST, through the edge."""
    repeated: int = 0
    """How often the edge gave no answer, so that an order was placed again."""
    looked_up: int = 0
    """Orders that were looked up by gRPC, and were as they had been placed."""
    failures: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    taken_by: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Orders that the customer could not place, or not look up."""
        return len(self.failures)

    def slowest_percent(self) -> float:
        """The 99th percentile of the latencies; not a number when there are too few."""
        return statistics.quantiles(self.latencies, n=100)[98] if len(self.latencies) > 1 else float("nan")

    def explain(self) -> str:
        """The first failures, in words; empty when there are none."""
        return "; ".join(self.failures[:3])

    def rest(self) -> str:
        """In words, what went through the edge; empty when nothing did."""
        if not self.by_rest:
            return ""
        return f"; {self.by_rest} by REST, {self.repeated} placed again, {self.looked_up} looked up by gRPC"


class Customers:
    """Places orders, each once.

    Those of `run` go by REST through the edge, if there is one, and each is looked up by gRPC through the mesh client
    as soon as it is placed: both ways into the mesh are under load all the time. What is measured of the mesh client
    itself, `burst` and `place`, goes by gRPC, as everything does without an edge.

    Args:
        channel: a channel to orders.
        rate: orders a second while `run` runs.
        rest: the edge; None without one.
    """

    def __init__(self, channel: grpc.aio.Channel, rate: float, rest: RestOrders | None = None) -> None:
        self.rate = rate
        self._rest = rest
        self.total = Tally()
        self.orders: list[Order] = []
        """Every order that was placed."""
        self.unanswered: list[str] = []
        """Keys of orders that failed: nobody knows what became of them."""
        self._stub = OrderServiceStub(channel)
        self._tallies: list[Tally] = [self.total]
        self._in_flight: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._finished = asyncio.Event()

    async def run(self) -> None:
        """Sends orders at the rate until cancelled; those in flight end with it, before what they go by is closed."""
        due = time.monotonic()
        try:
            while True:
                await self._open.wait()
                if not self._open.is_set():  # closed again before this task had its turn
                    continue
                if len(self._in_flight) < MAX_IN_FLIGHT:
                    task = asyncio.create_task(self._one(self._rest))
                    self._in_flight.add(task)
                    task.add_done_callback(self._in_flight.discard)
                due = max(due + 1.0 / self.rate, time.monotonic() - 1.0 / self.rate)
                await asyncio.sleep(due - time.monotonic())
        finally:
            await end_tasks(*self._in_flight)

    async def pause(self) -> None:
        """No new orders from `run`; returns when those in flight are done."""
        self._open.clear()
        await self._settle()

    def go_on(self) -> None:
        """Ends a pause."""
        self._open.set()

    @property
    def _over(self) -> int:
        return self.total.placed + len(self.unanswered)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[Tally]:
        """Tallies the orders that are sent within, and waits at the end for those still in flight."""
        tally = Tally()
        self._tallies.append(tally)
        try:
            yield tally
        finally:
            self._tallies.remove(tally)
            await self._settle()

    async def finish(self, count: int) -> None:
        """Returns when so many more orders have been placed or failed."""
        until = self._over + count
        while self._over < until:
            self._finished.clear()
            await self._finished.wait()

    async def burst(self, count: int, concurrency: int) -> Tally:
        """Sends ``count`` orders, ``concurrency`` at a time."""
        async with self.watched() as tally:
            left = iter(range(count))

            async def customer() -> None:
                for _ in left:
                    await self._one()

            await asyncio.gather(*(customer() for _ in range(concurrency)))
        return tally

    async def place(self, key: str, *, timeout: float = CALL_TIMEOUT) -> Order:
        """Places one order, of something that is never out of stock or too dear.

        Raises:
            grpc.aio.AioRpcError: it failed.
            RejectedError: the shop did not want it.
        """
        response = await self._stub.PlaceOrder(
            PlaceOrderRequest(idempotency_key=key, sku=SKU, quantity=1), timeout=timeout
        )
        self._remember(response.order)
        return response.order

    def _remember(self, order: Order) -> None:
        if order.state != ORDER_STATE_PLACED:
            raise RejectedError(order.rejection)
        self.orders.append(order)

    async def _one(self, rest: RestOrders | None = None) -> None:
        tallies = tuple(self._tallies)
        for tally in tallies:
            tally.sent += 1
        key, began, repeated = new_key(), time.monotonic(), 0
        try:
            if rest is None:
                order = await self.place(key)
            else:
                order, repeated = await rest.place(key, SKU, CALL_TIMEOUT)
                self._remember(order)
        except (grpc.aio.AioRpcError, RejectedError, RestError) as error:
            for tally in tallies:
                tally.failures.append(_in_words(error))
            self.unanswered.append(key)
            self._finished.set()
            return
        elapsed = time.monotonic() - began
        for tally in tallies:
            tally.placed += 1
            tally.by_rest += rest is not None
            tally.repeated += repeated
            tally.latencies.append(elapsed)
            tally.taken_by[order.taken_by] += 1
        self._finished.set()
        if rest is not None:
            await self._look_up(order, tallies)

    async def _look_up(self, order: Order, tallies: Sequence[Tally]) -> None:
        try:
            found = await self._stub.GetOrder(GetOrderRequest(order_id=order.order_id), timeout=CALL_TIMEOUT)
            if found.order != order:
                raise RejectedError("it is not what was placed")
        except (grpc.aio.AioRpcError, RejectedError) as error:
            for tally in tallies:
                tally.failures.append(f"looked up: {_in_words(error)}")
        else:
            for tally in tallies:
                tally.looked_up += 1

    async def _settle(self) -> None:
        if self._in_flight:
            await asyncio.wait(self._in_flight)


def _in_words(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)


def new_key() -> str:
    """An idempotency key that nobody used before."""
    return uuid.uuid4().hex
