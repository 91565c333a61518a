"""`shop.v1.PaymentService`."""

from __future__ import annotations

import logging

import grpc
from shop.v1 import payments_pb2 as pb
from shop.v1.payments_pb2_grpc import PaymentServiceServicer

from services.payments.outage import Outage
from services.payments.store import PaymentStore

logger = logging.getLogger(__name__)

LIMIT_CENTS = 1_000_000
"""Charges above this are declined."""


class PaymentService(PaymentServiceServicer):
    """Charges orders. Repeating a charge is harmless, so callers retry it freely."""

    def __init__(self, payments: PaymentStore, outage: Outage) -> None:
        self._payments = payments
        self._outage = outage

    async def Charge(
        self, request: pb.ChargeRequest, context: grpc.aio.ServicerContext[pb.ChargeRequest, pb.ChargeResponse]
    ) -> pb.ChargeResponse:
        """Charges an order once, however often it is called."""
        if self._outage.active:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "payments pretends to be out of order")
        if not request.order_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "order_id is empty")
        if request.amount_cents < 1:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "amount_cents must be at least 1")
        if len(request.currency) != 3 or not request.currency.isalpha():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "currency must be an ISO 4217 code such as EUR")
        payment = await self._payments.charge(
            request.order_id, request.amount_cents, request.currency, limit_cents=LIMIT_CENTS
        )
        if payment.declined:
            logger.info("declined", extra={"order": request.order_id})
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the payment was declined")
        if (payment.amount_cents, payment.currency) != (request.amount_cents, request.currency):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the order was charged with another amount before")
        logger.info("charged", extra={"order": request.order_id, "payment": payment.payment_id})
        return pb.ChargeResponse(payment_id=payment.payment_id)

    async def Refund(
        self, request: pb.RefundRequest, context: grpc.aio.ServicerContext[pb.RefundRequest, pb.RefundResponse]
    ) -> pb.RefundResponse:
        """Gives the money of an order back, once, however often it is called."""
        if self._outage.active:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "payments pretends to be out of order")
        payment = await self._payments.refund(request.order_id)
        if payment is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"order {request.order_id} has no payment")
        logger.info("refunded", extra={"order": request.order_id, "payment": payment.payment_id})
        return pb.RefundResponse(payment_id=payment.payment_id)

    async def GetPayment(
        self,
        request: pb.GetPaymentRequest,
        context: grpc.aio.ServicerContext[pb.GetPaymentRequest, pb.GetPaymentResponse],
    ) -> pb.GetPaymentResponse:
        """The payment of an order."""
        if self._outage.active:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "payments pretends to be out of order")
        payment = await self._payments.find(request.order_id)
        if payment is None or payment.declined:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"order {request.order_id} has no payment")
        return pb.GetPaymentResponse(
            payment_id=payment.payment_id,
            amount_cents=payment.amount_cents,
            currency=payment.currency,
            refunded=payment.refunded,
        )
