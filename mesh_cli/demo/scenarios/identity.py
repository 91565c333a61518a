"""Callers without an identity, and one with the wrong one."""

from __future__ import annotations

import asyncio
import uuid

import grpc
import grpc.aio
from shop.v1.payments_pb2 import ChargeRequest
from shop.v1.payments_pb2_grpc import PaymentServiceStub

import mesh_client
from mesh_cli.demo.promises import Promise, exactly
from mesh_cli.demo.stage import Stage
from mesh_cli.demo.system import STRANGER, Instance
from mesh_client.core.identity import Principal
from mesh_client.identity.certificates import to_pem
from mesh_client.transport import authenticating_options, open_channel

_TIMEOUT = 10.0
_METHOD = "shop.v1.PaymentService/Charge"


class Strangers:
    """Calls in plaintext, without a certificate, and with the certificate of a service that may not call payments."""

    title = "Everybody proves who they are, and may what the policy says"

    async def play(self, stage: Stage) -> list[Promise]:
        """Nobody but who may gets through."""
        stage.view.tell("every instance is called in plaintext, and with TLS but without a certificate")
        served = 0
        for instance in stage.system.instances:
            served += sum(
                await asyncio.gather(self._in_plaintext(instance), self._without_certificate(stage, instance))
            )
        stage.view.tell(f"{STRANGER}, a service of the mesh with a certificate of its own, wants to charge a customer")
        allowed, words = await self._as_a_stranger(stage)
        return [
            exactly(
                "identity.refused",
                "calls in plaintext or without a certificate that an instance served",
                served,
                0,
                f"of {2 * len(stage.system.instances)}",
                "mutual TLS on every connection",
            ),
            exactly(
                "identity.denied",
                f"calls of {STRANGER} to payments, which the policy does not allow, that were served",
                allowed,
                0,
                "calls",
                words,
            ),
        ]

    async def _in_plaintext(self, instance: Instance) -> bool:
        async with open_channel(instance.address) as channel:
            return await _serves(channel)

    async def _without_certificate(self, stage: Stage, instance: Instance) -> bool:
        bundle = stage.system.identities.credentials().bundle
        name = Principal.service(bundle.trust_domain, instance.service).dns_name
        credentials = grpc.ssl_channel_credentials(to_pem(bundle.roots))
        async with grpc.aio.secure_channel(instance.address, credentials, authenticating_options(name)) as channel:
            return await _serves(channel)

    async def _as_a_stranger(self, stage: Stage) -> tuple[int, str]:
        system = stage.system
        async with mesh_client.connect(
            system.address,
            service=STRANGER,
            enrolment=system.enrolment_address,
            token_file=system.identities.token_file(STRANGER),
            insecure=False,
            cache_dir="",
        ) as mesh:
            payments = PaymentServiceStub(mesh.channel("payments"))
            request = ChargeRequest(order_id=f"stranger-{uuid.uuid4().hex}", amount_cents=100, currency="EUR")
            try:
                await payments.Charge(request, timeout=_TIMEOUT)
            except grpc.aio.AioRpcError as error:
                words = f"{error.code().name}: {error.details()}"
                named = error.code() is grpc.StatusCode.PERMISSION_DENIED and STRANGER in words and _METHOD in words
                return (0 if named else 1), words
        return 1, "it was served"


async def _serves(channel: grpc.aio.Channel) -> bool:
    """Whether whoever is there answers at all, be it with an error of its own."""
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_METHOD}")
    try:
        await method(b"", timeout=_TIMEOUT)
    except grpc.aio.AioRpcError as error:
        return error.code() is not grpc.StatusCode.UNAVAILABLE
    return True
