"""Payments are charged once and can pretend an outage."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc
import pytest
from shop.v1.payments_pb2 import ChargeRequest, GetPaymentRequest
from shop.v1.payments_pb2_grpc import PaymentServiceStub

from services.payments.outage import Outage
from tests.services.shop import Stubs


def a_charge(amount_cents: int = 500, order_id: str = "order-1", currency: str = "EUR") -> ChargeRequest:
    return ChargeRequest(order_id=order_id, amount_cents=amount_cents, currency=currency)


async def test_a_repeated_charge_is_one_payment_at_any_instance(shop: Stubs) -> None:
    other = PaymentServiceStub(await shop.shop.payments())
    answers = await asyncio.gather(*(stub.Charge(a_charge()) for stub in (shop.payments, other) for _ in range(5)))
    assert len({answer.payment_id for answer in answers}) == 1


async def test_a_declined_payment_stays_declined_and_is_no_payment(shop: Stubs) -> None:
    for amount in (1_000_001, 500):
        with pytest.raises(grpc.aio.AioRpcError) as declined:
            await shop.payments.Charge(a_charge(amount))
        assert declined.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await shop.payments.GetPayment(GetPaymentRequest(order_id="order-1"))
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_order_is_not_charged_another_amount(shop: Stubs) -> None:
    await shop.payments.Charge(a_charge(500))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await shop.payments.Charge(a_charge(600))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await shop.payments.GetPayment(GetPaymentRequest(order_id="order-1"))).amount_cents == 500


@pytest.mark.parametrize("request_", [a_charge(0), a_charge(order_id=""), a_charge(currency="euro"), a_charge(-5)])
async def test_a_bad_charge_is_refused(shop: Stubs, request_: ChargeRequest) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await shop.payments.Charge(request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_pretended_outage_answers_unavailable_until_it_ends(shop: Stubs) -> None:
    shop.shop.outage.switch(True)
    for call in (shop.payments.Charge(a_charge()), shop.payments.GetPayment(GetPaymentRequest(order_id="order-1"))):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    shop.shop.outage.switch(False)
    assert (await shop.payments.Charge(a_charge())).payment_id


async def test_the_outage_obeys_signals() -> None:
    switched: asyncio.Queue[bool] = asyncio.Queue()

    class Told(Outage):
        def switch(self, active: bool) -> None:
            super().switch(active)
            switched.put_nowait(self.active)

    outage = Told()
    outage.listen()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert await asyncio.wait_for(switched.get(), 30) is True
        os.kill(os.getpid(), signal.SIGUSR2)
        assert await asyncio.wait_for(switched.get(), 30) is False
    finally:
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGUSR1)
        loop.remove_signal_handler(signal.SIGUSR2)
