"""What Consul says of a token, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mesh.v1.certificate_pb2 import SignCertificateRequest

from control_plane.identity import attestation
from control_plane.identity.attestation import ATTEMPTS, ConsulAttestation, check_self
from control_plane.identity.errors import AttestationUnavailableError, InvalidTokenError, WrongServiceError
from control_plane.identity.options import IdentityOptions
from control_plane.sources.consul_http import ConsulAddress
from tests.control_plane.identities import TIMEOUT, new_key, plane, request_for, signed
from tests.control_plane.scripted_consul import ScriptedConsul, scripted_consul

SECRET = "6b86b273-ff34-4fce-9d6b-804eff5a3f57"
ACCESSOR = "d4735e3a-265e-46ee-a03f-59718b9b5d03"
PATH = "/v1/acl/token/self"


def described(**changes: Any) -> dict[str, Any]:
    identities = [{"ServiceName": "orders", "Datacenters": None}]
    return {"AccessorID": ACCESSOR, "SecretID": SECRET, "ServiceIdentities": identities, **changes}


@pytest.fixture
async def consul() -> AsyncIterator[ScriptedConsul]:
    async with scripted_consul() as made:
        yield made


def test_a_service_identity_attests_exactly_its_service() -> None:
    assert check_self(described(), SECRET, "orders") == ACCESSOR
    several = [{"ServiceName": "inventory"}, "nonsense", {"ServiceName": "orders", "Datacenters": []}]
    assert check_self(described(ServiceIdentities=several), SECRET, "orders") == ACCESSOR


@pytest.mark.parametrize("name", ["order", "orders-2", "Orders", "orders ", "", None, ["orders"], "*"])
def test_a_name_that_is_nearly_the_service_s_attests_nothing(name: object) -> None:
    with pytest.raises(WrongServiceError):
        check_self(described(ServiceIdentities=[{"ServiceName": name}]), SECRET, "orders")


@pytest.mark.parametrize(
    "changes",
    [
        {"SecretID": "other"},
        {"SecretID": None},
        {"AccessorID": "00000000-0000-0000-0000-000000000002"},
        {"AccessorID": "x\ny"},
        {"AccessorID": None},
        {"ServiceIdentities": None},
        {"ServiceIdentities": []},
        {"ServiceIdentities": {"ServiceName": "orders"}},
        {"ServiceIdentities": ["orders"]},
        {"ServiceIdentities": [{"ServiceName": "orders", "Datacenters": ["dc2"]}]},
        # What roles, policies and nodes give is no identity.
        {"ServiceIdentities": None, "Roles": [{"Name": "orders"}], "Policies": [{"Name": "global-management"}]},
    ],
)
def test_a_token_without_a_service_identity_of_its_own_attests_nothing(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidTokenError):
        check_self(described(**changes), SECRET, "orders")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from([SECRET, ACCESSOR, "orders"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["AccessorID", "SecretID", "ServiceIdentities", "ServiceName", "Datacenters"]), inner
        )
    ),
)


@given(_JSON)
def test_any_other_answer_attests_nothing(answer: object) -> None:
    try:
        accessor = check_self(answer, SECRET, "orders")
    except (InvalidTokenError, WrongServiceError):
        return
    assert isinstance(answer, dict)
    assert answer["SecretID"] == SECRET
    assert answer["AccessorID"] == accessor
    assert any(each["ServiceName"] == "orders" for each in answer["ServiceIdentities"] if isinstance(each, dict))


@pytest.mark.parametrize("secret", ["", "anonymous", SECRET.upper(), f"{SECRET}\r\nX-Header: 1", f" {SECRET}"])
async def test_what_cannot_be_a_token_is_not_even_asked_about(consul: ScriptedConsul, secret: str) -> None:
    with pytest.raises(InvalidTokenError):
        await ConsulAttestation([consul.address]).attest(secret, "orders")
    assert consul.requests == []


async def test_a_token_that_is_unknown_at_first_is_asked_about_again(
    consul: ScriptedConsul, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attestation, "RETRY_DELAY", 0.0)
    consul.answer(PATH, "ACL not found", status=403)
    with pytest.raises(InvalidTokenError, match="does not know"):
        await ConsulAttestation([consul.address]).attest(SECRET, "orders")
    assert len(consul.requests) == ATTEMPTS
    monkeypatch.setattr(attestation, "RETRY_DELAY", 0.2)
    asking = asyncio.create_task(ConsulAttestation([consul.address]).attest(SECRET, "orders"))
    await consul.until_asked(1)
    consul.answer(PATH, described())
    assert await asking == f"consul token {ACCESSOR}"


async def test_an_agent_that_is_not_there_is_left_for_the_next_one(consul: ScriptedConsul) -> None:
    consul.answer(PATH, described())
    nobody = ConsulAddress("127.0.0.1", 9)
    assert await ConsulAttestation([nobody, consul.address]).attest(SECRET, "orders")
    with pytest.raises(AttestationUnavailableError):
        await ConsulAttestation([nobody]).attest(SECRET, "orders")
    consul.answer(PATH, "no leader", status=500)
    with pytest.raises(AttestationUnavailableError) as caught:
        await ConsulAttestation([consul.address]).attest(SECRET, "orders")
    assert SECRET not in str(caught.value)


async def test_a_consul_token_gets_a_certificate_and_stays_out_of_the_log(
    consul: ScriptedConsul, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="control_plane")
    consul.answer(PATH, described())
    key = new_key()

    def request(service: str, csr: bytes = request_for(key)) -> SignCertificateRequest:
        return SignCertificateRequest(certificate_signing_request=csr, service=service, consul_token=SECRET)

    async with plane(IdentityOptions(consul=f"consul://{consul.address}")) as served:
        async with served.enrolment() as stub:
            workload = signed(key, await stub.SignCertificate(request("orders"), timeout=TIMEOUT))
            codes = []
            for bad in (request("inventory"), request("orders", b"x")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.SignCertificate(bad, timeout=TIMEOUT)
                codes.append(caught.value.code())
            consul.answer(PATH, "no leader", status=500)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SignCertificate(request("orders"), timeout=TIMEOUT)
            codes.append(caught.value.code())
        assert codes == [
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.UNAVAILABLE,
        ]
        (known,) = (await served.authority.status()).workloads
    assert (known.id, known.attested_by) == (workload.id, f"consul token {ACCESSOR}")
    assert f"attested_by='consul token {ACCESSOR}'" in caplog.text
    assert SECRET not in caplog.text
