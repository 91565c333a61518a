"""First certificates, on a real port, as an attacker would ask for them too."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from mesh.v1.certificate_pb2 import SignCertificateRequest

from control_plane.identity import tokens
from control_plane.identity.errors import StoreUnavailableError
from control_plane.identity.options import IdentityOptions
from control_plane.identity.tokens import JoinToken, parse_payload
from mesh_client.core.errors import ConfigError, InvalidValueError
from tests.control_plane.identities import TIMEOUT, Plane, Watch, new_key, opened, plane, request_for, signed

REFUSED = "the attestation is not accepted; the control plane's log says why"


@pytest.fixture
async def served() -> AsyncIterator[Plane]:
    async with plane() as made:
        yield made


async def refusal(served: Plane, request: SignCertificateRequest) -> grpc.aio.AioRpcError:
    async with served.enrolment() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SignCertificate(request, timeout=TIMEOUT)
    return caught.value


def asking(token: str, service: str = "orders", request: bytes | None = None) -> SignCertificateRequest:
    return SignCertificateRequest(
        certificate_signing_request=request_for(new_key()) if request is None else request,
        service=service,
        join_token=token,
    )


async def test_a_token_gets_a_certificate_that_the_mesh_port_takes(
    served: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    token = await served.token()
    key = new_key()
    async with served.enrolment() as stub:
        answer = await stub.SignCertificate(asking(token, request=request_for(key)), timeout=TIMEOUT)
    workload = signed(key, answer)
    assert answer.trust_bundle.trust_domain == "mesh.internal"
    assert answer.trust_bundle.version == served.authority.bundle.version
    assert len(answer.certificate_chain) == 2
    assert (await served.renew(workload, "orders")).id == workload.id

    issued, renewed = (record.getMessage() for record in caplog.records if record.name.endswith(".audit"))
    attested_by = (await served.authority.status()).workloads[0].attested_by
    for word in (
        "issued principal=spiffe://mesh.internal/service/orders",
        f"workload={workload.id}",
        f"serial={workload.certificate.serial_number:x}",
        f"expires={workload.certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        f"attested_by='{attested_by}'",
        "peer=ipv4:127.0.0.1:",
    ):
        assert word in issued
    assert f"attested_by='certificate {workload.certificate.serial_number:x}'" in renewed
    assert token.split(".")[1] not in caplog.text
    assert token.split(".")[2] not in caplog.text


async def test_whatever_the_request_asks_for_only_the_attested_identity_is_signed(served: Plane) -> None:
    key = new_key()
    greedy = request_for(
        key,
        x509.BasicConstraints(ca=True, path_length=5),
        x509.SubjectAlternativeName(
            [
                x509.UniformResourceIdentifier("spiffe://mesh.internal/operator/root"),
                x509.UniformResourceIdentifier("spiffe://mesh.internal/mesh/control-plane"),
                x509.DNSName("control-plane.mesh.mesh.internal"),
                x509.DNSName("*.mesh.internal"),
            ]
        ),
        x509.KeyUsage(True, True, True, True, True, True, True, False, False),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]),
        x509.NameConstraints([x509.DNSName("example.com")], None),
        subject=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "0000000000000000")]),
    )
    async with served.enrolment() as stub:
        answer = await stub.SignCertificate(asking(await served.token(), request=greedy), timeout=TIMEOUT)
    certificate = signed(key, answer).certificate
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [each.value for each in names] == [
        "spiffe://mesh.internal/service/orders",
        "orders.mesh.internal",
        f"{certificate.subject.rfc4514_string().removeprefix('CN=')}.workload.mesh.internal",
    ]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.subject.rfc4514_string() != "CN=0000000000000000"
    assert len(certificate.extensions) == 6


@pytest.mark.parametrize(
    "csr",
    [
        b"",
        b"nonsense",
        request_for(ec.generate_private_key(ec.SECP384R1())),
        request_for(new_key())[:-1] + b"\0",
        request_for(new_key(), x509.SubjectAlternativeName([x509.DNSName("a" * 60 + f"{n}.b") for n in range(99)])),
    ],
    ids=["empty", "nonsense", "P-384", "forged", "large"],
)
async def test_a_bad_request_is_refused_and_spends_nothing(served: Plane, csr: bytes) -> None:
    token = await served.token()
    assert (await refusal(served, asking(token, request=csr))).code() is grpc.StatusCode.INVALID_ARGUMENT
    async with served.enrolment() as stub:
        await stub.SignCertificate(asking(token), timeout=TIMEOUT)


async def test_tokens_that_do_not_hold_are_refused_without_saying_why(
    served: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    spent, revoked, ended, good = [await served.token() for _ in range(4)]
    async with served.enrolment() as stub:
        await stub.SignCertificate(asking(spent), timeout=TIMEOUT)
    listed = await served.authority.tokens()
    payload = revoked.split(".")[1]
    token_id = next(each.id for each in listed if each.id in str(parse(payload)))
    assert await served.authority.revoke_token(token_id)
    async with opened() as other:
        foreign = (await other.create_token("orders", 3600.0, 1, "x")).text
    middle = good.rindex(".") + 40
    tampered = good[:middle] + ("B" if good[middle] == "A" else "A") + good[middle + 1 :]
    answers = [await refusal(served, asking(bad)) for bad in (spent, revoked, foreign, tampered, "mesh1", "")]
    served.clock.ahead = 3601.0
    answers.append(await refusal(served, asking(ended)))
    answers.append(await refusal(served, SignCertificateRequest(service="orders", consul_token="0" * 36)))
    answers.append(await refusal(served, SignCertificateRequest(service="orders")))
    assert {(answer.code(), answer.details()) for answer in answers} == {(grpc.StatusCode.UNAUTHENTICATED, REFUSED)}
    # The log says what was wrong, and shows no token.
    assert caplog.text.count("no certificate for ipv4:127.0.0.1") == len(answers)
    assert "has ended" in caplog.text
    assert "did not sign" in caplog.text
    for token in (spent, revoked, ended, good, foreign):
        assert token.split(".")[1] not in caplog.text


def parse(payload: str) -> object:

    return parse_payload(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))


@pytest.mark.parametrize("service", ["orders", "control-plane", "operator"])
async def test_a_token_never_becomes_another_service(served: Plane, service: str) -> None:
    token = await served.token("inventory")
    error = await refusal(served, asking(token, service))
    assert (error.code(), error.details()) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "the attestation is for another service",
    )
    for name in ("", "Inventory", "inventory.", "inventory\0", "mesh/control-plane", "../operator/x", "a" * 64):
        assert (await refusal(served, asking(token, name))).code() is grpc.StatusCode.INVALID_ARGUMENT
    workload = await served.join("inventory")
    assert "spiffe://mesh.internal/service/inventory" in str(
        [
            each.value
            for each in workload.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        ]
    )


async def test_a_service_called_control_plane_is_not_the_control_plane(served: Plane) -> None:
    workload = await served.join("control-plane")
    names = workload.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [each.value for each in names] == [
        "spiffe://mesh.internal/service/control-plane",
        "control-plane.mesh.internal",
        f"{workload.workload_id}.workload.mesh.internal",
    ]
    assert served.name == "control-plane.mesh.mesh.internal"


async def test_uses_hold_under_concurrent_requests(served: Plane) -> None:
    token = await served.token(uses=5)
    async with served.enrolment() as stub:
        answers = await asyncio.gather(
            *(stub.SignCertificate(asking(token), timeout=TIMEOUT) for _ in range(40)), return_exceptions=True
        )
    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(answers) - len(refused) == 5
    assert {answer.code() for answer in refused} == {grpc.StatusCode.UNAUTHENTICATED}
    assert len((await served.authority.status()).workloads) == 5


async def test_whoever_asks_again_with_the_same_key_is_the_same_workload(served: Plane) -> None:
    token, key = await served.token(), new_key()
    async with served.enrolment() as stub:
        first, second = [
            signed(key, await stub.SignCertificate(asking(token, request=request_for(key)), timeout=TIMEOUT))
            for _ in range(2)
        ]
    assert first.id == second.id
    assert first.certificate.serial_number != second.certificate.serial_number
    assert len((await served.authority.status()).workloads) == 1
    await served.authority.revoke(workload_id=first.id)
    error = await refusal(served, asking(token, request=request_for(key)))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_caller_that_asks_too_often_is_told_when_to_come_back() -> None:
    async with plane(IdentityOptions(enrolments_per_second=0.02)) as served:
        assert (await refusal(served, asking("nonsense"))).code() is grpc.StatusCode.UNAUTHENTICATED
        error = await refusal(served, asking("nonsense"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        pushback = int(str(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]))
        assert 40_000 <= pushback <= 50_000


async def test_the_trust_bundle_is_not_on_the_enrolment_port(served: Plane) -> None:
    async with served.enrolment() as stub:
        assert await Watch(stub).code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_client_that_has_the_root_s_hash_alone_finds_the_root(served: Plane) -> None:
    token = await served.token()
    (known,) = served.authority.bundle.fingerprints
    assert known in str(parse(token.split(".")[1]))

    def fetch() -> list[bytes]:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with socket.create_connection(("127.0.0.1", served.enrolment_port), TIMEOUT) as plain:
            with context.wrap_socket(plain) as connection:
                chain = connection._sslobj.get_unverified_chain()  # type: ignore[attr-defined] # public from 3.13 on
        return [each if isinstance(each, bytes) else ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in chain]

    chain = await asyncio.to_thread(fetch)
    assert [hashlib.sha256(each).hexdigest() for each in chain][-1] == known


async def test_a_token_names_the_root_that_is_shown_however_many_there_are(
    served: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await served.authority.add_root()
    await served.authority.overlap()
    assert len(named(await served.token())) == 2
    monkeypatch.setattr(tokens, "MAX_ROOTS", 1)
    assert named(await served.token()) == (served.authority.bundle.signing_root,)


def named(token: str) -> tuple[str, ...]:
    found = parse(token.split(".")[1])
    assert isinstance(found, JoinToken)
    return found.roots


async def test_nothing_is_signed_when_the_clock_is_far_off(served: Plane, caplog: pytest.LogCaptureFixture) -> None:
    token = await served.token(ttl=86_400.0)
    served.clock.ahead = -2 * 86_400.0
    error = await refusal(served, asking(token))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "and that is not now" in caplog.text
    served.clock.ahead = 0.0
    async with served.enrolment() as stub:
        await stub.SignCertificate(asking(token), timeout=TIMEOUT)


async def test_tokens_have_limits(served: Plane) -> None:
    create = served.authority.create_token
    for service, ttl, uses in (("Orders", 60.0, 1), ("orders", 59.0, 1), ("orders", 2.6e6, 1), ("orders", 60.0, 0)):
        with pytest.raises(InvalidValueError):
            await create(service, ttl, uses, "x")
    with pytest.raises(InvalidValueError):
        await create("orders", float("nan"), 1, "x")
    assert "mesh1" not in repr(await create("orders", 60.0, 100_000, "x"))


async def test_a_store_that_fails_gives_no_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with plane(IdentityOptions(data_dir=tmp_path)) as served:
        token = await served.token()
        await served.authority.close()
        error = await refusal(served, asking(token))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "identity store is closed" in caplog.text
        with pytest.raises(StoreUnavailableError):
            await served.authority.tokens()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"leaf_lifetime": 0.5}, "leaf_lifetime"),
        ({"ca_key": Path("ca.key")}, "all three or none"),
        ({"enrolments_per_second": 0.0}, "enrolments_per_second"),
        ({"renewals_per_second": float("nan")}, "renewals_per_second"),
        ({"consul": "http://x"}, "consul://"),
        ({"trust_domain": "UPPER"}, "trust domain"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises((ConfigError, InvalidValueError), match=words):
        IdentityOptions(**options)  # type: ignore[arg-type] # each has its own type
