"""Joining where the enrolment port is gone, slow, lying, refusing or broken: nothing is believed, all is explained."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh_client.core.errors import IdentityError
from mesh_client.core.identity import Principal
from mesh_client.identity import bundle_watch, enrolment
from mesh_client.identity.certificates import TrustBundle, from_pem
from mesh_client.identity.settings import identity_settings
from mesh_client.identity.workload import WorkloadIdentity
from tests.certificates import TestAuthority
from tests.integration.identity_rig import PATIENCE, at_once, messages, until
from tests.integration.scripted_authority import (
    ORDERS,
    Context,
    Request,
    Response,
    Scripted,
    Sign,
    bundle_of,
    join_token,
    mute,
    public_key,
    serving,
    shows,
    signed,
)

NOWHERE = "127.0.0.1:1"


@pytest.fixture
def authority() -> TestAuthority:
    return TestAuthority()


def honest(authority: TestAuthority, **options: Any) -> Scripted:
    async def sign(request: Request, context: Context) -> Response:
        return signed(authority, request, **options)

    return Scripted(sign)


def refusing(code: grpc.StatusCode, details: str, trailing: tuple[tuple[str, str], ...] = ()) -> Scripted:
    async def sign(request: Request, context: Context) -> Response:
        await context.abort(code, details, trailing)

    return Scripted(sign)


def at_the_control_plane(authority: TestAuthority) -> grpc.ServerCredentials:
    return shows(authority.control_plane(), authority.roots)


@asynccontextmanager
async def joining(*addresses: str, retry: Any = at_once, **options: Any) -> AsyncIterator[WorkloadIdentity]:
    settings = identity_settings("orders", (NOWHERE,), enrolment=addresses, insecure=False, **options)
    assert settings is not None
    identity = WorkloadIdentity(settings, rng=Random(3), retry=retry)
    await identity.start()
    try:
        yield identity
    finally:
        await identity.stop()


async def problem(*addresses: str, **options: Any) -> str:
    """What is said once everybody has been asked."""
    async with joining(*addresses, **options) as identity:
        await until(identity, lambda: identity.failing)
        assert identity.generation == 0
        return identity.problem


async def test_a_port_that_is_gone_is_named_and_tried_again_until_it_is_there(authority: TestAuthority) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        gone = f"127.0.0.1:{taken.getsockname()[1]}"
        async with serving(honest(authority), at_the_control_plane(authority)) as address:
            async with joining(gone, token=join_token(authority)) as identity:
                await until(identity, lambda: identity.failing)
                assert f"{gone}: " in identity.problem
            async with joining(gone, address, token=join_token(authority)) as identity:
                await identity.ready()
                assert identity.principal == ORDERS


async def test_a_port_that_says_nothing_is_not_waited_for_long(
    authority: TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ANSWER_TIMEOUT", 0.2)
    async with mute() as address:
        assert "no TLS handshake within 0.2 s" in await problem(address, token=join_token(authority))


async def test_a_control_plane_that_does_not_answer_is_not_waited_for_long(
    authority: TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "ANSWER_TIMEOUT", 0.3)

    async def never(request: Request, context: Context) -> Response:
        await asyncio.Event().wait()
        return Response()

    async with serving(Scripted(never), at_the_control_plane(authority)) as address:
        async with joining(address, token=join_token(authority)) as identity:
            # On a busy machine the handshake may take too long first.
            await until(identity, lambda: "no answer within 0.3 s" in identity.problem)


async def test_a_port_with_another_root_is_not_asked(authority: TestAuthority) -> None:
    liar = TestAuthority()
    servicer = honest(liar)
    async with serving(servicer, at_the_control_plane(liar)) as address:
        said = await problem(address, token=join_token(authority))
    assert "presents none of the trust roots that the join token names, so it was not believed" in said
    assert servicer.requests == []


async def test_a_port_that_presents_the_root_without_having_its_key_is_not_asked(authority: TestAuthority) -> None:
    liar = TestAuthority()
    servicer = honest(liar)
    async with serving(servicer, shows(liar.control_plane(), authority.roots)) as address:
        said = await problem(address, token=join_token(authority))
    assert "not from an authority that this process trusts" in said
    assert servicer.requests == []


async def test_a_workload_of_the_mesh_cannot_pose_as_its_control_plane(authority: TestAuthority) -> None:
    servicer = honest(authority)
    async with serving(servicer, shows(authority.service("billing"), authority.roots)) as address:
        said = await problem(address, token=join_token(authority))
    assert "holds a certificate of somebody else than the control plane" in said
    assert servicer.requests == []


async def test_the_control_plane_of_another_trust_domain_is_not_ours(authority: TestAuthority) -> None:
    other = authority.issue(Principal.control_plane("other.internal"))
    servicer = honest(authority)
    async with serving(servicer, shows(other, authority.roots)) as address:
        assert "somebody else than the control plane" in await problem(address, token=join_token(authority))
    assert servicer.requests == []


@pytest.mark.parametrize(
    ("starts", "ends", "said"),
    [(-3600.0, -60.0, "control plane has expired"), (3600.0, 7200.0, "not valid yet, and it was refused; this host")],
)
async def test_a_control_plane_out_of_its_time_is_refused(
    authority: TestAuthority, starts: float, ends: float, said: str
) -> None:
    certificate = authority.issue(Principal.control_plane("mesh.internal"), starts=starts, ends=ends)
    servicer = honest(authority)
    async with serving(servicer, shows(certificate, authority.roots)) as address:
        assert said in await problem(address, token=join_token(authority))
    assert servicer.requests == []


async def test_plaintext_is_never_spoken(authority: TestAuthority, tmp_path: Path) -> None:
    servicer = honest(authority)
    roots = tmp_path / "roots.pem"
    roots.write_bytes(authority.roots)
    async with serving(servicer, None) as address:
        assert f"{address}: " in await problem(address, token=join_token(authority))
        assert "speaks plaintext" in await problem(address, token=join_token(authority), trust_roots=roots)
    assert servicer.requests == []


async def test_a_refused_token_is_told_with_the_reason_and_not_tried_in_a_loop(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[bool] = []
    tried = asyncio.Event()

    def retry(failures: int, rng: Random, *, refused: bool) -> float:
        waits.append(refused)
        tried.set()
        return 3600.0

    token = join_token(authority, ttl=-7200.0)
    servicer = refusing(grpc.StatusCode.UNAUTHENTICATED, "the attestation does not hold")
    async with serving(servicer, at_the_control_plane(authority)) as address:
        async with joining(address, token=token, retry=retry) as identity:
            with pytest.raises(IdentityError, match="refused: UNAUTHENTICATED: the attestation does not hold"):
                await identity.ready()
            await tried.wait()
            assert "by this host's clock the join token expired 2 h ago" in identity.problem
    assert waits == [True]
    assert len(servicer.requests) == 1
    (warning,) = messages(caplog)
    assert "refused" in warning
    assert token not in caplog.text
    assert "c2VjcmV0" not in caplog.text


async def test_one_control_plane_that_refuses_does_not_hide_another_that_may_come_back(
    authority: TestAuthority,
) -> None:
    waits: list[bool] = []

    def retry(failures: int, rng: Random, *, refused: bool) -> float:
        waits.append(refused)
        return 3600.0

    servicer = refusing(grpc.StatusCode.PERMISSION_DENIED, "no")
    async with serving(servicer, at_the_control_plane(authority)) as address:
        async with joining(address, NOWHERE, token=join_token(authority), retry=retry) as identity:
            await until(identity, lambda: identity.failing)
            assert "PERMISSION_DENIED: no" in identity.problem
            assert f"{NOWHERE}: " in identity.problem
    assert waits == [False]


async def test_a_busy_control_plane_is_left_alone_for_as_long_as_it_asks(authority: TestAuthority) -> None:
    loop = asyncio.get_running_loop()
    asked: list[float] = []

    async def sign(request: Request, context: Context) -> Response:
        asked.append(loop.time())
        if len(asked) == 1:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too often", (("grpc-retry-pushback-ms", "300"),))
        return signed(authority, request)

    servicer = Scripted(sign)
    async with serving(servicer, at_the_control_plane(authority)) as address:
        async with joining(address, token=join_token(authority)) as identity:
            await until(identity, lambda: identity.failing)
            assert "is busy: too often" in identity.problem
            await until(identity, lambda: not identity.problem)
    assert asked[1] - asked[0] > 0.25


async def test_an_answer_that_got_lost_is_asked_for_again_with_the_same_key(authority: TestAuthority) -> None:
    keys: list[bytes] = []

    async def sign(request: Request, context: Context) -> Response:
        keys.append(public_key(request))
        if len(keys) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
        return signed(authority, request)

    async with serving(Scripted(sign), at_the_control_plane(authority)) as address:
        async with joining(address, token=join_token(authority)) as identity:
            await until(identity, lambda: not identity.problem)
    assert keys[0] == keys[1]


async def test_a_token_file_is_read_each_time(authority: TestAuthority, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(join_token(authority, ttl=1.0) + "\n")
    file.chmod(0o600)
    good = join_token(authority, ttl=999.0)

    async def sign(request: Request, context: Context) -> Response:
        if request.join_token != good:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
        return signed(authority, request)

    async with serving(Scripted(sign), at_the_control_plane(authority)) as address:
        async with joining(address, token_file=file) as identity:
            await until(identity, lambda: identity.failing)
            file.write_text("something else")
            await until(identity, lambda: "no join token" in identity.problem)
            file.write_text(good)
            await until(identity, lambda: not identity.problem)


async def spoilt(answer: Sign, authority: TestAuthority) -> str:
    async with serving(Scripted(answer), at_the_control_plane(authority)) as address:
        return await problem(address, token=join_token(authority))


async def test_a_certificate_for_somebody_else_is_not_taken(authority: TestAuthority) -> None:
    async def sign(request: Request, context: Context) -> Response:
        return signed(authority, request, Principal.service("mesh.internal", "billing"))

    said = await spoilt(sign, authority)
    assert "is for spiffe://mesh.internal/service/billing" in said
    assert "not for spiffe://mesh.internal/service/orders" in said


async def test_a_certificate_for_another_key_is_not_taken(authority: TestAuthority) -> None:
    async def sign(request: Request, context: Context) -> Response:
        return Response(
            certificate_chain=from_pem(authority.service("orders").chain), trust_bundle=bundle_of(authority)
        )

    assert "the certificate is for another key" in await spoilt(sign, authority)


async def test_a_certificate_that_leads_nowhere_is_not_taken(authority: TestAuthority) -> None:
    async def sign(request: Request, context: Context) -> Response:
        response = signed(TestAuthority(), request)
        response.trust_bundle.CopyFrom(bundle_of(authority))
        return response

    assert "leads up to none of the roots" in await spoilt(sign, authority)


@pytest.mark.parametrize(
    ("bundle", "said"),
    [
        ({"trust_domain": "other.internal"}, "none of the roots that are trusted"),
        ({"trust_domain": "-"}, "the trust bundle is malformed"),
        ({"roots": [b"root"]}, "the trust bundle is malformed"),
        ({"roots": []}, "holds no root"),
    ],
)
async def test_a_trust_bundle_that_makes_no_sense_is_not_taken(
    authority: TestAuthority, bundle: dict[str, Any], said: str
) -> None:
    async def sign(request: Request, context: Context) -> Response:
        response = signed(authority, request)
        response.trust_bundle.CopyFrom(bundle_of(authority, **bundle))
        return response

    assert said in await spoilt(sign, authority)


@pytest.mark.parametrize("chain", [[], [b"certificate"], [b"certificate"] * 9])
async def test_a_chain_that_makes_no_sense_is_not_taken(authority: TestAuthority, chain: list[bytes]) -> None:
    async def sign(request: Request, context: Context) -> Response:
        return Response(certificate_chain=chain, trust_bundle=bundle_of(authority))

    said = await spoilt(sign, authority)
    assert "malformed" in said or "expected 1 to 8" in said


async def test_a_defect_of_ours_does_not_end_the_attempts(
    authority: TestAuthority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, broken = enrolment.enrol, [True]

    async def enrol(*arguments: Any) -> Any:
        if broken.pop() if broken else False:
            raise RuntimeError("defect")
        return await whole(*arguments)

    monkeypatch.setattr("mesh_client.identity.authority_client.enrol", enrol)
    async with serving(honest(authority), at_the_control_plane(authority)) as address:
        async with joining(address, token=join_token(authority)) as identity:
            await until(identity, lambda: identity.generation == 1)
    assert any("getting a certificate for" in message for message in messages(caplog, logging.ERROR))


# -- the Consul token


async def test_a_consul_token_attests_and_the_roots_come_from_a_file(
    authority: TestAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(authority.roots)
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "secret-of-consul")
    servicer = honest(authority)
    async with serving(servicer, at_the_control_plane(authority)) as address:
        async with joining(address, attestation="consul", trust_roots=roots) as identity:
            await identity.ready()
    (request,) = servicer.requests
    assert (request.consul_token, request.service, request.join_token) == ("secret-of-consul", "orders", "")


# -- the trust bundle


async def test_bundles_that_make_no_sense_are_neither_taken_nor_acknowledged(
    authority: TestAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    enrolling, watching = honest(authority), honest(authority)
    watching.bundle = bundle_of(authority, trust_domain="other.internal", version="v2")
    mesh = authority.control_plane().server_credentials(authority.roots)
    async with serving(enrolling, at_the_control_plane(authority)) as address, serving(watching, mesh) as target:
        settings = identity_settings(
            "orders", (target,), enrolment=address, token=join_token(authority), insecure=False
        )
        assert settings is not None
        identity = WorkloadIdentity(settings, rng=Random(3), retry=at_once)
        await identity.start()
        await until(identity, lambda: "is for other.internal" in identity.state(0.0).last_error)
        assert identity.state(0.0).bundle_version == "v1"
        async with asyncio.timeout(PATIENCE):  # what the workload says may be read after what it is told has come
            while not watching.acknowledged:
                watching.changed.clear()
                await watching.changed.wait()
        assert {request.version for request in watching.acknowledged} == {"v1"}
        watching.bundle = bundle_of(authority, version="v3", revoked_workloads=["0123456789abcdef"])
        await until(identity, lambda: identity.revoked == {"0123456789abcdef"})
        while watching.acknowledged[-1].version != "v3":
            watching.changed.clear()
            await watching.changed.wait()
        assert watching.acknowledged[-1].certificate_expires.seconds > 0
        await identity.stop()


async def test_a_control_plane_that_sends_no_bundle_is_not_waited_for_long(
    authority: TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_watch, "FIRST_RESPONSE_TIMEOUT", 0.2)
    enrolling, watching = honest(authority), honest(authority)
    mesh = authority.control_plane().server_credentials(authority.roots)
    async with serving(enrolling, at_the_control_plane(authority)) as address, serving(watching, mesh) as target:
        settings = identity_settings(
            "orders", (target,), enrolment=address, token=join_token(authority), insecure=False
        )
        assert settings is not None
        identity = WorkloadIdentity(settings, rng=Random(3), retry=at_once)
        await identity.start()
        await until(identity, lambda: "no trust bundle within 0.2 s" in identity.state(0.0).last_error)
        await identity.stop()


def test_a_bundle_survives_its_way(authority: TestAuthority) -> None:
    message = bundle_of(authority, revoked_workloads=["a", "b"])
    assert TrustBundle.from_proto(message).to_proto() == message


async def first_error(identity: WorkloadIdentity) -> str:
    await identity.start()
    await until(identity, lambda: identity.state(0.0).last_error != "")
    error = identity.state(0.0).last_error
    await identity.stop()
    return error


async def test_a_refusal_that_crosses_our_request_is_told_in_the_control_planes_words(authority: TestAuthority) -> None:
    enrolling, watching = honest(authority), honest(authority)
    watching.refusal = "the workload has been revoked"
    mesh = authority.control_plane().server_credentials(authority.roots)
    async with serving(enrolling, at_the_control_plane(authority)) as address, serving(watching, mesh) as target:
        settings = identity_settings(
            "orders", (target,), enrolment=address, token=join_token(authority), insecure=False
        )
        assert settings is not None
        for _ in range(10):
            error = await first_error(WorkloadIdentity(settings, rng=Random(3), retry=at_once))
            assert error == f"{target} refused: PERMISSION_DENIED: the workload has been revoked"
