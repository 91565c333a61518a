"""Renewals, the trust bundle, and who is let onto the mesh port at all."""

from __future__ import annotations

import asyncio
import dataclasses
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
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from mesh.v1.authority_pb2 import GetCertificateAuthorityRequest, ListJoinTokensRequest
from mesh.v1.certificate_pb2 import SignCertificateRequest
from mesh.v1.certificate_pb2_grpc import CertificateServiceStub

from control_plane.access import Caller
from control_plane.identity import own_identity
from control_plane.identity.ca import pem
from control_plane.identity.certificates import MAX_STREAMS
from control_plane.identity.errors import RevokedError
from mesh_client.core.identity import Principal
from tests.certificates import Certificate, TestAuthority
from tests.control_plane.identities import TIMEOUT, Plane, Watch, Workload, new_key, plane, request_for, signed, until


@pytest.fixture
async def served() -> AsyncIterator[Plane]:
    async with plane() as made:
        yield made


async def renewal(served: Plane, workload: Workload, **fields: object) -> grpc.aio.AioRpcError:
    """How a renewal is refused."""
    request = SignCertificateRequest(**{"certificate_signing_request": request_for(new_key()), **fields})  # type: ignore[arg-type] # of the message
    async with served.mesh(workload) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SignCertificate(request, timeout=TIMEOUT)
    return caught.value


async def handshake_fails(served: Plane, credentials: grpc.ChannelCredentials) -> None:
    async with served.channel(served.mesh_port, credentials) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CertificateServiceStub(channel).SignCertificate(SignCertificateRequest(), timeout=TIMEOUT)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# -- who is let in


async def test_nobody_is_let_in_without_a_certificate_of_the_mesh(served: Plane) -> None:
    roots = served.authority.roots_pem
    stranger = TestAuthority()

    def shown(certificate: Certificate) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(roots, certificate.key, certificate.chain)

    await handshake_fails(served, grpc.ssl_channel_credentials(roots))
    await handshake_fails(served, shown(stranger.service("orders")))
    await handshake_fails(served, shown(stranger.control_plane()))
    plain = grpc.aio.insecure_channel(f"127.0.0.1:{served.mesh_port}")
    async with plain:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CertificateServiceStub(plain).SignCertificate(SignCertificateRequest(), timeout=TIMEOUT)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_workload_s_certificate_signs_nobody(served: Plane) -> None:
    workload = await served.join()
    middle = x509.load_pem_x509_certificate(workload.chain)
    below = TestAuthority()
    key = load_pem_private_key(workload.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    below._key = key
    below._certificate = middle
    forged = below.service("orders")
    await handshake_fails(
        served, grpc.ssl_channel_credentials(workload.roots, forged.key, forged.chain + workload.chain)
    )


async def test_certificates_that_are_not_good_now_or_here_fail_in_the_handshake(served: Plane) -> None:
    one, two = await served.join(), await served.join()
    orders = Principal.service("mesh.internal", "orders")
    for bad in (
        served.forged(orders, ends=-1.0),
        served.forged(orders, starts=3600.0),
        # The root's name constraints forbid its issuers another trust domain.
        served.forged(Principal.service("other.example", "orders")),
        served.forged(Principal.operator("mesh.internal.other.example", "alice")),
        dataclasses.replace(one, key=two.key),
    ):
        await handshake_fails(served, bad.credentials)
    assert await _renews(served, served.forged(orders)) is grpc.StatusCode.OK


async def test_a_session_that_is_resumed_shows_a_certificate_again_before_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC's session tickets are good for two days, and stand for a certificate that may have ended.
    async with plane() as served:
        assert await asyncio.to_thread(_resumes, served, await served.join(), tmp_path)
    monkeypatch.setattr(own_identity, "TICKET_LIFETIME", 0.0)
    async with plane() as served:
        assert not await asyncio.to_thread(_resumes, served, await served.join(), tmp_path)


def _resumes(served: Plane, workload: Workload, directory: Path) -> bool:
    (directory / "chain").write_bytes(workload.chain)
    (directory / "key").write_bytes(workload.key)
    context = ssl.create_default_context(cadata=workload.roots.decode())
    context.load_cert_chain(directory / "chain", directory / "key")
    context.set_alpn_protocols(["h2"])
    session: ssl.SSLSession | None = None
    for resumed in (False, True):
        with socket.create_connection(("127.0.0.1", served.mesh_port), TIMEOUT) as plain:
            with context.wrap_socket(plain, server_hostname=served.name, session=session) as connection:
                connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
                assert connection.recv(1)  # tickets come with the first bytes
                if resumed:
                    return bool(connection.session_reused)
                session = connection.session
    raise AssertionError


async def test_a_client_that_pins_another_root_does_not_talk_to_this_control_plane(served: Plane) -> None:
    async with plane() as other:
        workload = await served.join()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.renew(workload)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_trust_domain_below_the_same_root_is_refused(served: Plane) -> None:
    # A root that was given as a file may have no name constraints.
    workload = await served.join()
    assert await _renews(served, workload) is grpc.StatusCode.OK
    served.access._trust_domain = "other.example"
    assert (await renewal(served, workload)).code() is grpc.StatusCode.PERMISSION_DENIED


async def _renews(served: Plane, workload: Workload) -> grpc.StatusCode:
    async with served.mesh(workload) as stub:
        call = stub.SignCertificate(
            SignCertificateRequest(certificate_signing_request=request_for(new_key())), timeout=TIMEOUT
        )
        return await call.code()


# -- renewal


async def test_a_renewal_is_for_the_same_principal_and_workload(served: Plane) -> None:
    workload = await served.join()
    renewed = await served.renew(workload)
    assert renewed.id == workload.id
    assert renewed.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName) == (
        workload.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    )
    (known,) = (await served.authority.status()).workloads
    assert known.serial == f"{renewed.certificate.serial_number:x}"
    assert known.attested_by.startswith("join token ")


async def test_nobody_renews_as_somebody_else(served: Plane, caplog: pytest.LogCaptureFixture) -> None:
    workload = await served.join("inventory")
    assert (await renewal(served, workload, service="orders")).code() is grpc.StatusCode.PERMISSION_DENIED
    assert "asked for a certificate of another service" in caplog.text
    token = await served.token("orders")
    assert (await renewal(served, workload, join_token=token)).code() is grpc.StatusCode.INVALID_ARGUMENT
    # The names that a request asks for are not looked at here either.
    key = new_key()
    greedy = request_for(key, x509.SubjectAlternativeName([x509.DNSName("orders.mesh.internal")]))
    async with served.mesh(workload) as stub:
        answer = await stub.SignCertificate(SignCertificateRequest(certificate_signing_request=greedy), timeout=TIMEOUT)
    names = signed(key, answer).certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [each.value for each in names] == [
        "spiffe://mesh.internal/service/inventory",
        "inventory.mesh.internal",
        f"{workload.workload_id}.workload.mesh.internal",
    ]
    assert (await renewal(served, workload, certificate_signing_request=b"x")).code() is (
        grpc.StatusCode.INVALID_ARGUMENT
    )


async def test_a_revoked_workload_does_not_renew_and_its_streams_are_cut(
    served: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    workload, other = await served.join(), await served.join()
    async with served.mesh(workload) as stub, served.mesh(other) as spared:
        watch, kept = Watch(stub), Watch(spared)
        await watch.begin()
        await kept.begin()
        assert await served.authority.revoke(workload_id=workload.id) == [workload.id]
        assert await watch.code() is grpc.StatusCode.PERMISSION_DENIED
        assert list((await kept.next()).revoked_workloads) == [workload.id]
        await kept.end()
    assert served.authority.is_revoked(workload.id)
    error = await renewal(served, workload)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "the workload has been revoked" in str(error.details())
    assert "the workload has been revoked" in caplog.text
    # A certificate from before the last renewal is the same workload's.
    renewed = await served.renew(other)
    await served.authority.revoke(service="orders")
    for each in (other, renewed):
        assert (await renewal(served, each)).code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_revocation_while_a_renewal_is_under_way_wins(served: Plane) -> None:
    workload = await served.join()
    caller = (await served.authority.status()).workloads[0]
    issuance = served.authority.issuance
    who = Caller(Principal.parse(caller.spiffe_id), caller.id)
    await served.authority.revoke(workload_id=workload.id)
    chain = x509.load_pem_x509_certificates(workload.chain)
    with pytest.raises(RevokedError):
        await issuance.renew(who, chain, request_for(new_key()), "ipv4:127.0.0.1:1")


async def test_a_connection_whose_root_was_retired_gets_nothing_below_the_new_one(served: Plane) -> None:
    workload = await served.join()
    request = SignCertificateRequest(certificate_signing_request=request_for(new_key()))
    await served.authority.add_root()
    async with served.mesh(workload) as before:
        await before.SignCertificate(request, timeout=TIMEOUT)
        await served.authority.overlap(force=True)
        await before.SignCertificate(request, timeout=TIMEOUT)
        # It shows the new issuer too, which did not sign its own certificate.
        new = served.authority._authority.state.issuer.certificate
        shown = dataclasses.replace(workload, chain=workload.chain + pem([new]), roots=served.authority.roots_pem)
        async with served.mesh(shown) as padded:
            await padded.SignCertificate(request, timeout=TIMEOUT)
            await served.authority.retire(force=True)
            for stub in (before, padded):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.SignCertificate(request, timeout=TIMEOUT)
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
                assert "below no root that is trusted now" in str(caught.value.details())


async def test_a_certificate_that_ended_on_an_open_connection_is_not_renewed(served: Plane) -> None:
    workload = await served.join()
    served.clock.ahead = 86_401.0
    error = await renewal(served, workload)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "has ended: enrol again" in str(error.details())


async def test_renewals_are_limited_for_each_workload(served: Plane) -> None:
    one, two = await served.join(), await served.join()
    request = SignCertificateRequest(certificate_signing_request=request_for(new_key()))
    async with served.mesh(one) as stub:
        answers = await asyncio.gather(
            *(stub.SignCertificate(request, timeout=TIMEOUT) for _ in range(15)), return_exceptions=True
        )
    refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {answer.code() for answer in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert 1 <= len(refused) <= 5
    assert all("grpc-retry-pushback-ms" in dict(answer.trailing_metadata()) for answer in refused)
    await served.renew(two)


async def test_an_operator_s_time_is_not_extended(served: Plane, tmp_path: Path) -> None:
    operator = await served.operator(tmp_path)
    renewed = await served.renew(operator)
    assert renewed.id == operator.id
    assert renewed.certificate.not_valid_after_utc == operator.certificate.not_valid_after_utc
    assert (await renewal(served, operator, service="orders")).code() is grpc.StatusCode.PERMISSION_DENIED


# -- the trust bundle


async def test_the_bundle_comes_at_once_and_at_each_change_and_is_confirmed(served: Plane) -> None:
    workload = await served.join()
    async with served.mesh(workload) as stub:
        watch = Watch(stub)
        first = await watch.begin()
        assert first.version == served.authority.bundle.version
        assert len(first.roots) == 1
        await served.authority.add_root()
        second = await watch.next()
        assert len(second.roots) == 2
        assert second.signing_root == first.signing_root
        # What was never sent on this stream confirms nothing.
        await watch.acknowledge("0123456789abcdef")
        await watch.acknowledge(second.version)
        await until(lambda: _confirmed(served, workload.id, second.version))
        await watch.acknowledge(second.version)
        await watch.end()


async def _confirmed(served: Plane, workload_id: str, version: str) -> bool:
    return any(
        each.id == workload_id and each.bundle_version == version
        for each in (await served.authority.status()).workloads
    )


async def test_a_bundle_that_was_confirmed_late_counts(served: Plane) -> None:
    workload = await served.join()
    async with served.mesh(workload) as stub:
        watch = Watch(stub)
        first = await watch.begin(served.authority.bundle.version)
        await served.authority.add_root()
        second = await watch.next()
        await watch.acknowledge(first.version)
        await until(lambda: _confirmed(served, workload.id, first.version))
        assert (await served.authority.status()).dependents[0].trusted == frozenset(
            served.authority.bundle.fingerprints[:1]
        )
        await watch.acknowledge(second.version)
        await until(lambda: _confirmed(served, workload.id, second.version))
        await watch.end()


async def test_a_workload_may_not_open_any_number_of_streams(served: Plane) -> None:
    workload = await served.join()
    async with served.mesh(workload) as stub:
        watches = [Watch(stub) for _ in range(MAX_STREAMS)]
        for watch in watches:
            await watch.begin()
        assert await Watch(stub).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for watch in watches:
            await watch.end()
        again = Watch(stub)
        await again.begin()
        await again.end()


async def test_a_client_that_goes_away_leaves_nothing_behind(served: Plane) -> None:
    workload = await served.join()
    async with served.mesh(workload) as stub:
        call = stub.WatchTrustBundle(timeout=TIMEOUT)
        await call.read()
        call.cancel()
    await until(lambda: _nobody_listens(served))


async def _nobody_listens(served: Plane) -> bool:
    return len(served.authority._trust._callbacks) == 1


# -- operators' API


async def test_workloads_are_no_operators(served: Plane, caplog: pytest.LogCaptureFixture) -> None:
    workload = await served.join("operator")
    async with served.operators(workload) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListJoinTokens(ListJoinTokensRequest(), timeout=TIMEOUT)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetCertificateAuthority(GetCertificateAuthorityRequest(), timeout=TIMEOUT)
    assert "spiffe://mesh.internal/service/operator may not see the certificate authority" in str(
        caught.value.details()
    )
    assert "refused: spiffe://mesh.internal/service/operator" in caplog.text


async def test_the_own_certificate_is_renewed_without_a_restart(
    served: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    workload = await served.join()
    before = served.authority._own.leaf
    served.clock.ahead = 13 * 3600.0
    await served.authority.maintain()
    after = served.authority._own.leaf
    assert before is not None
    assert after is not None
    assert before.serial != after.serial
    served.clock.ahead = 0.0  # a clock that was set back: the certificate would not be valid yet
    await served.authority.maintain()
    assert served.authority._own.leaf not in (before, after)
    await served.renew(workload)
