"""How many certificates a second one control plane signs on one core."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mesh.v1.certificate_pb2 import SignCertificateRequest, SignCertificateResponse
from mesh.v1.certificate_pb2_grpc import CertificateServiceStub

from benchmarks.certificates_plane import SERVICE
from benchmarks.figures import Figure
from benchmarks.processes import Child, child
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal

GOAL = 500.0
"""Certificates a second."""
AT_ONCE = 32
"""Callers at once."""
CHANNELS = 4

_OPTIONS = (
    ("grpc.ssl_target_name_override", Principal.control_plane(DEFAULT_TRUST_DOMAIN).dns_name),
    ("grpc.use_local_subchannel_pool", 1),
)


class _Keys:
    """Workloads' keys, and their requests for signing, which are made before anything is measured."""

    def __init__(self, count: int) -> None:
        self.keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(count)]
        self.requests = [
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))
            .sign(key, hashes.SHA256())
            .public_bytes(serialization.Encoding.DER)
            for key in self.keys
        ]


async def _round(
    plane: Child, channels: Sequence[grpc.aio.Channel], requests: Sequence[SignCertificateRequest]
) -> tuple[float, float, SignCertificateResponse]:
    """Certificates a second, milliseconds of CPU for each, and the last certificate."""
    waiting = list(requests)
    answers: list[SignCertificateResponse] = []

    async def caller(channel: grpc.aio.Channel) -> None:
        stub = CertificateServiceStub(channel)
        while waiting:
            answers.append(await stub.SignCertificate(waiting.pop(), timeout=60))

    before, started = await plane.ask(0), time.monotonic()
    await asyncio.gather(*(caller(channels[number % len(channels)]) for number in range(AT_ONCE)))
    elapsed = time.monotonic() - started
    used = await plane.ask(0) - before
    return len(answers) / elapsed, used / len(answers) * 1000, answers[-1]


async def issuance(quick: bool) -> list[Figure]:
    """First certificates by a join token, and renewals over mutual TLS; on connections that are there."""
    rounds, count = (3, 300) if quick else (10, 1000)
    core = max(os.sched_getaffinity(0))
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(child("benchmarks.certificates_plane", core))
        enrolment, mesh, token, encoded = plane.ready
        roots = base64.b64decode(encoded)
        credentials = grpc.ssl_channel_credentials(roots)
        enrolling = [
            await stack.enter_async_context(grpc.aio.secure_channel(enrolment, credentials, _OPTIONS))
            for _ in range(CHANNELS)
        ]

        def first(made: _Keys) -> list[SignCertificateRequest]:
            return [
                SignCertificateRequest(certificate_signing_request=each, service=SERVICE, join_token=token)
                for each in made.requests
            ]

        # The first caller's certificate is what renewals are made with; it also warms up.
        alone = _Keys(1)
        _, _, answer = await _round(plane, enrolling, first(alone))
        own = grpc.ssl_channel_credentials(roots, _pem(alone.keys[0]), _chain(answer))
        renewing = [
            await stack.enter_async_context(grpc.aio.secure_channel(mesh, own, _OPTIONS)) for _ in range(CHANNELS)
        ]
        measured: dict[str, list[tuple[float, float]]] = {"first": [], "renewed": []}
        for _ in range(rounds):
            made = _Keys(count)
            again = [SignCertificateRequest(certificate_signing_request=each) for each in made.requests]
            for name, channels, requests in (("first", enrolling, first(made)), ("renewed", renewing, again)):
                rate, cpu, _ = await _round(plane, channels, requests)
                measured[name].append((rate, cpu))
    about = {"first": "first certificates by a join token", "renewed": "renewals over mutual TLS"}
    figures = [
        Figure.of_rounds(
            "certificates.rate",
            [rate for rate, _ in measured["first"]],
            "1/s",
            f"{about['first']}, one control plane on one core, {AT_ONCE} callers",
            GOAL,
            at_least=True,
        ),
        Figure.of_rounds(
            "certificates.renewals", [rate for rate, _ in measured["renewed"]], "1/s", f"{about['renewed']}, the same"
        ),
    ]
    for name, label in (("first", "rate"), ("renewed", "renewals")):
        cpu_figures = [cpu for _, cpu in measured[name]]
        figures.append(
            Figure.of_rounds(
                f"certificates.{label}.cpu", cpu_figures, "ms", f"{about[name]}: CPU of the control plane for each"
            )
        )
    return figures


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _chain(answer: SignCertificateResponse) -> bytes:
    return b"".join(
        x509.load_der_x509_certificate(each).public_bytes(serialization.Encoding.PEM)
        for each in answer.certificate_chain
    )
