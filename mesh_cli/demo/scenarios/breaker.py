"""A service that fails as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import statistics
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from shop.v1.payments_pb2 import ChargeRequest
from shop.v1.payments_pb2_grpc import PaymentServiceStub

if TYPE_CHECKING:
    from shop.v1.payments_pb2_grpc import PaymentServiceAsyncStub

from mesh_cli.demo.load import new_key
from mesh_cli.demo.policies import OPEN_DURATION
from mesh_cli.demo.promises import Promise, at_most, exactly
from mesh_cli.demo.stage import Stage
from mesh_client.core.breaker import BreakerState

_RETRY_EVERY = 0.1
_FAST_MS = 10.0
_OPENS_WITHIN = 20
_CLOSES_WITHIN = OPEN_DURATION + 1.0
_PENDING_ORDERS = 10
_PATIENCE = 15.0


@dataclass
class _Outage:
    """What callers saw of it."""

    calls_until_open: float = math.inf
    refused_ms: list[float] = field(default_factory=list)
    refused_orders: list[str] = field(default_factory=list)
    closed_after: float = math.inf
    never_placed: int = 0


class FailingService:
    """Every instance of payments answers UNAVAILABLE for a while."""

    title = "Payments fail as a whole"

    async def play(self, stage: Stage) -> list[Promise]:
        """The breaker opens, refuses at once, and closes by itself; refused orders are placed later."""
        await stage.customers.pause()
        payments = PaymentServiceStub(stage.mesh.channel("payments"))
        await payments.Charge(_charge(), timeout=_PATIENCE)
        seen = _Outage()
        stage.view.tell("all of payments answers UNAVAILABLE")
        _switch(stage, signal.SIGUSR1, "failing")
        for call in range(1, 10 * _OPENS_WITHIN):
            await _fails(payments)
            if stage.breaker("payments") is not BreakerState.CLOSED:
                seen.calls_until_open = call
                break
        stage.view.tell("the breaker is open; calls are refused without being sent")
        while len(seen.refused_ms) < stage.profile.refused_calls and stage.breaker("payments") is BreakerState.OPEN:
            seen.refused_ms.append(1000.0 * await _fails(payments))
        await self._refuse_orders(stage, seen)
        stage.view.tell("payments recovers")
        _switch(stage, signal.SIGUSR2, "up")
        began = time.monotonic()
        while time.monotonic() - began < _PATIENCE:
            await _fails(payments)
            if stage.breaker("payments") is BreakerState.CLOSED:
                seen.closed_after = time.monotonic() - began
                break
            await asyncio.sleep(_RETRY_EVERY)
        stage.view.tell("the refused orders are placed with the same keys")
        await self._place_again(stage, seen)
        stage.customers.go_on()
        return _promises(seen)

    async def _refuse_orders(self, stage: Stage, seen: _Outage) -> None:
        """Customers of orders are told to come again; each instance of orders has a breaker of its own."""
        for _ in range(_PENDING_ORDERS):
            key = new_key()
            try:
                await stage.customers.place(key)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.ABORTED:
                    seen.refused_orders.append(key)

    async def _place_again(self, stage: Stage, seen: _Outage) -> None:
        """Until every instance of orders has seen payments recover, some are refused again."""
        give_up = time.monotonic() + _PATIENCE
        waiting = {instance.name for instance in stage.system.of("orders")}
        pending = list(seen.refused_orders)
        while (waiting or pending) and time.monotonic() < give_up:
            for key in pending[:]:
                if await _placed(stage, key):
                    pending.remove(key)
            if taken_by := await _placed(stage, new_key()):
                waiting.discard(taken_by)
            else:
                await asyncio.sleep(_RETRY_EVERY)
        seen.never_placed = len(pending)


async def _placed(stage: Stage, key: str) -> str:
    """The instance that took the order, or nothing when it was refused."""
    try:
        order = await stage.customers.place(key)
    except grpc.aio.AioRpcError:
        return ""
    return order.taken_by


def _charge() -> ChargeRequest:
    return ChargeRequest(order_id=f"demo-{uuid.uuid4().hex}", amount_cents=100, currency="EUR")


async def _fails(payments: PaymentServiceAsyncStub) -> float:
    """Seconds that a charge took, which may fail."""
    began = time.perf_counter()
    with contextlib.suppress(grpc.aio.AioRpcError):
        await payments.Charge(_charge(), timeout=_PATIENCE)
    return time.perf_counter() - began


def _switch(stage: Stage, number: signal.Signals, state: str) -> None:
    for instance in stage.system.of("payments"):
        instance.process.signal(number)
        instance.state = state


def _promises(seen: _Outage) -> list[Promise]:
    typical = statistics.median(seen.refused_ms) if seen.refused_ms else math.inf
    slowest = statistics.quantiles(seen.refused_ms, n=100)[98] if len(seen.refused_ms) > 1 else math.inf
    return [
        at_most(
            "breaker.opens",
            "payments fail: calls until the breaker opens",
            seen.calls_until_open,
            _OPENS_WITHIN,
            "calls",
        ),
        at_most(
            "breaker.fast",
            "calls that the open breaker refuses: 99% within",
            slowest,
            _FAST_MS,
            "ms",
            f"median {typical:.2f} ms of {len(seen.refused_ms)}",
        ),
        at_most(
            "breaker.closes",
            "the breaker closes by itself once payments answers",
            seen.closed_after,
            _CLOSES_WITHIN,
            "s",
        ),
        exactly(
            "breaker.resumed",
            "orders of that time that were not refused with ABORTED, or not placed later with the same key",
            _PENDING_ORDERS - len(seen.refused_orders) + seen.never_placed,
            0,
            f"of {_PENDING_ORDERS}",
        ),
    ]
