"""The trust bundle on one stream, and the credentials that follow it."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from mesh.v1.authority_pb2 import ListJoinTokensRequest
from mesh.v1.certificate_pb2 import SignCertificateRequest

from control_plane.identity import own_identity
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.bundle_stream import MAX_UNACKNOWLEDGED, SentBundles
from control_plane.identity.ca import der, load_certificates, pem, root_of
from control_plane.identity.certificate_authority import CertificateAuthority
from control_plane.identity.certificates import MAX_CHAIN, peer_chain
from control_plane.identity.options import IdentityOptions
from control_plane.identity.own_identity import OwnIdentity
from mesh_client.core.identity import Principal
from tests.control_plane.identities import TIMEOUT, Plane, Watch, new_key, opened, plane, request_for


def bundle(number: int) -> TrustBundle:
    return TrustBundle.of("mesh.internal", [bytes([number])], "r")


def test_a_bundle_is_sent_once_and_confirmed_once() -> None:
    sent = SentBundles()
    assert sent.send(bundle(1))
    assert not sent.send(bundle(1))
    assert sent.acknowledge("") is None
    assert sent.acknowledge(bundle(2).version) is None
    assert sent.acknowledge(bundle(1).version) == bundle(1)
    assert sent.acknowledge(bundle(1).version) is None


def test_an_older_bundle_cannot_be_confirmed_after_a_newer_one() -> None:
    sent = SentBundles()
    for number in (1, 2, 3):
        sent.send(bundle(number))
    assert sent.acknowledge(bundle(2).version) == bundle(2)
    assert sent.acknowledge(bundle(1).version) is None
    assert sent.acknowledge(bundle(3).version) == bundle(3)


def test_what_was_in_force_before_can_be_again() -> None:
    sent = SentBundles()
    assert [sent.send(bundle(number)) for number in (1, 2, 1)] == [True] * 3
    assert sent.acknowledge(bundle(1).version) == bundle(1)
    assert sent.acknowledge(bundle(2).version) is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
def test_confirmations_are_bounded_by_what_was_sent(steps: list[tuple[bool, int]]) -> None:
    sent, sends, confirmations = SentBundles(), 0, 0
    for sends_one, number in steps:
        if sends_one:
            sends += sent.send(bundle(number))
        else:
            confirmations += sent.acknowledge(bundle(number).version) is not None
        assert confirmations <= sends
        assert len(sent._open) <= MAX_UNACKNOWLEDGED


@pytest.fixture
async def served() -> AsyncIterator[Plane]:
    async with plane() as made:
        yield made


async def test_an_acknowledgement_that_cannot_be_stored_ends_no_stream(
    served: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    workload, other = await served.join(), await served.join()
    async with served.mesh(workload) as stub, served.mesh(other) as others:
        watch = Watch(stub)
        first = await watch.begin()
        await served.authority.close()
        await watch.acknowledge(first.version)
        async with asyncio.timeout(TIMEOUT):
            while "an acknowledgement of spiffe://mesh.internal/service/orders" not in caplog.text:
                await asyncio.sleep(0.01)
        await watch.end()
        late = Watch(others)
        await late.begin()
        assert "is not remembered: the identity store is closed" in caplog.text
        await late.end()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SignCertificate(
                SignCertificateRequest(certificate_signing_request=request_for(new_key())), timeout=TIMEOUT
            )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_control_plane_s_certificate_is_not_renewed_by_anybody(served: Plane) -> None:
    forged = served.forged(Principal.control_plane("mesh.internal"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.renew(forged)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "control planes sign their own" in str(caught.value.details())


async def test_without_identities_there_is_nothing_to_renew_or_to_operate() -> None:
    """What an insecure server would do, should these services ever be added to one."""
    async with plane() as served:
        served.access._trust_domain = None
        workload = await served.join()
        async with served.operators(workload) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListJoinTokens(ListJoinTokensRequest(), timeout=TIMEOUT)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.renew(workload)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_certificates_of_a_connection_that_cannot_be_read_are_none() -> None:
    assert peer_chain({}) == []
    assert peer_chain({"x509_pem_cert": [b"a", b"b"]}) == []
    assert peer_chain({"x509_pem_cert": [b"nonsense"]}) == []


async def test_few_of_the_certificates_that_a_caller_shows_are_looked_at(served: Plane) -> None:
    workload = await served.join()
    leaf = workload.certificate
    others = [(await served.join()).certificate for _ in range(MAX_CHAIN)]
    found = peer_chain({"x509_pem_cert": [pem([leaf])], "x509_pem_cert_chain": [pem([leaf, *others])]})
    assert found == [leaf, *others[: MAX_CHAIN - 1]]
    # A version that there is not is no ValueError of cryptography's.
    content = der(others[0])
    position = content.index(bytes([0xA0, 3, 2, 1, 2])) + 4
    broken = ssl.DER_cert_to_PEM_cert(content[:position] + b"\x07" + content[position + 1 :]).encode()
    assert peer_chain({"x509_pem_cert": [pem([leaf])], "x509_pem_cert_chain": [broken]}) == []
    assert root_of([leaf, *load_certificates(workload.chain, "chain")], load_certificates(workload.roots, "roots"))


async def test_a_certificate_authority_has_to_be_opened() -> None:
    authority = CertificateAuthority(IdentityOptions())
    for use in (
        lambda: authority.bundle,
        lambda: authority.issuance,
        authority.mesh_credentials,
        authority.enrolment_credentials,
        lambda: authority.is_revoked("x"),
    ):
        with pytest.raises(RuntimeError, match="not open"):
            use()
    await authority.close()


async def test_a_port_s_context_is_made_anew_when_anything_changes_or_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened() as authority:
        state = authority._authority.state
        own = OwnIdentity("mesh.internal", 3600.0)
        now = time.time()
        assert own.refresh(state.issuer, state.trusted, now)
        fetch = own._fetcher(lambda shown: shown.mesh)
        assert fetch() is None
        assert not own.refresh(state.issuer, state.trusted, now + 1700.0)
        assert own.refresh(state.issuer, state.trusted, now + 1900.0)
        assert isinstance(fetch(), grpc.ServerCertificateConfiguration)
        assert fetch() is None
        more: tuple[x509.Certificate, ...] = (*state.trusted, *state.trusted)
        assert own.refresh(state.issuer, more, now + 1900.0)
        assert isinstance(fetch(), grpc.ServerCertificateConfiguration)
        monkeypatch.setattr(own_identity, "TICKET_LIFETIME", 0.0)
        always = own._fetcher(lambda shown: shown.enrolment)
        assert isinstance(always(), grpc.ServerCertificateConfiguration)


async def test_nobody_is_told_of_changes_any_more_than_once_unsubscribed(served: Plane) -> None:
    told: list[str] = []
    unsubscribe = served.authority.on_change(lambda: told.append(served.authority.bundle.version))
    await served.authority.add_root()
    unsubscribe()
    unsubscribe()
    await served.authority.overlap()
    assert len(told) == 1
