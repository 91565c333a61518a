"""What operators do: join tokens, rotation of the trust root, revocation, and their own credentials."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import authority_pb2 as pb
from mesh.v1.certificate_pb2 import SignCertificateRequest

from control_plane.identity import store as store_module
from control_plane.identity.operators import MAX_LIFETIME, create_operator
from control_plane.identity.options import IdentityOptions
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.identity import Principal
from tests.control_plane.identities import TIMEOUT, Plane, Watch, Workload, new_key, opened, plane, request_for, until

if TYPE_CHECKING:
    from mesh.v1.authority_pb2_grpc import AuthorityServiceAsyncStub


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Plane]:
    async with plane(IdentityOptions(data_dir=tmp_path / "data")) as made:
        yield made


@pytest.fixture
async def operator(served: Plane, tmp_path: Path) -> Workload:
    return await served.operator(tmp_path)


@pytest.fixture
async def admin(served: Plane, operator: Workload) -> AsyncIterator[AuthorityServiceAsyncStub]:
    async with served.operators(operator) as stub:
        yield stub


async def status(admin: AuthorityServiceAsyncStub) -> pb.GetCertificateAuthorityResponse:
    return await admin.GetCertificateAuthority(pb.GetCertificateAuthorityRequest(), timeout=TIMEOUT)


async def rotate(
    admin: AuthorityServiceAsyncStub, step: pb.RotationStep.ValueType, *, force: bool = False
) -> pb.GetCertificateAuthorityResponse:
    request = pb.RotateTrustRootRequest(step=step, force=force)
    return (await admin.RotateTrustRoot(request, timeout=TIMEOUT)).authority


async def refused(admin: AuthorityServiceAsyncStub, step: pb.RotationStep.ValueType) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rotate(admin, step)
    return caught.value


# -- join tokens


async def test_a_token_is_made_listed_used_and_revoked(
    served: Plane, admin: AuthorityServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = time.time()
    created = await admin.CreateJoinToken(
        pb.CreateJoinTokenRequest(service="orders", ttl=Duration(seconds=120), uses=2), timeout=TIMEOUT
    )
    assert created.details.created_by == "spiffe://mesh.internal/operator/alice"
    assert (created.details.uses, created.details.uses_left) == (2, 2)
    assert before + 120 <= created.details.expires.seconds <= time.time() + 121
    async with served.enrolment() as stub:
        await stub.SignCertificate(
            SignCertificateRequest(
                certificate_signing_request=request_for(new_key()), service="orders", join_token=created.token
            ),
            timeout=TIMEOUT,
        )
    (listed,) = (await admin.ListJoinTokens(pb.ListJoinTokensRequest(), timeout=TIMEOUT)).tokens
    assert (listed.id, listed.service, listed.uses_left) == (created.details.id, "orders", 1)
    await admin.RevokeJoinToken(pb.RevokeJoinTokenRequest(id=listed.id), timeout=TIMEOUT)
    assert not (await admin.ListJoinTokens(pb.ListJoinTokensRequest(), timeout=TIMEOUT)).tokens
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.RevokeJoinToken(pb.RevokeJoinTokenRequest(id=listed.id), timeout=TIMEOUT)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert f"created join token {listed.id} for orders" in caplog.text
    assert f"revoked join token {listed.id}" in caplog.text
    assert created.token.split(".")[1] not in caplog.text


async def test_a_token_is_for_one_use_and_an_hour_unless_asked_otherwise(admin: AuthorityServiceAsyncStub) -> None:
    before = time.time()
    created = await admin.CreateJoinToken(pb.CreateJoinTokenRequest(service="orders"), timeout=TIMEOUT)
    assert created.details.uses == 1
    assert before + 3600 <= created.details.expires.seconds <= time.time() + 3601
    for request in (
        pb.CreateJoinTokenRequest(service="control-plane.mesh"),
        pb.CreateJoinTokenRequest(service="orders", uses=0),
        pb.CreateJoinTokenRequest(service="orders", ttl=Duration(seconds=-5)),
        pb.CreateJoinTokenRequest(service="orders", ttl=Duration(seconds=40 * 86_400)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.CreateJoinToken(request, timeout=TIMEOUT)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_too_many_tokens_are_refused(admin: AuthorityServiceAsyncStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_TOKENS", 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.CreateJoinToken(pb.CreateJoinTokenRequest(service="orders"), timeout=TIMEOUT)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# -- rotation


async def test_a_root_is_rotated_without_cutting_anybody_off(
    served: Plane, admin: AuthorityServiceAsyncStub, operator: Workload, caplog: pytest.LogCaptureFixture
) -> None:
    workload = await served.join()
    async with served.mesh(workload) as stub:
        watch = Watch(stub)
        await watch.begin()
        before = await status(admin)
        (old,) = before.roots
        assert (old.signing, old.workloads, old.unconfirmed) == (True, 1, 0)

        added = await rotate(admin, pb.ROTATION_STEP_ADD)
        assert [(root.signing, root.unconfirmed) for root in added.roots] == [(True, 0), (False, 1)]
        new = added.roots[1].fingerprint
        error = await refused(admin, pb.ROTATION_STEP_OVERLAP)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert f"spiffe://mesh.internal/service/orders (workload {workload.id})" in str(error.details())
        assert (await refused(admin, pb.ROTATION_STEP_ADD)).code() is grpc.StatusCode.FAILED_PRECONDITION

        bundle = await watch.next()
        await watch.acknowledge(bundle.version)
        await until(lambda: _everybody_trusts(admin, new))
        overlapping = await rotate(admin, pb.ROTATION_STEP_OVERLAP)
        assert [root.signing for root in overlapping.roots] == [False, True]
        assert overlapping.bundle_version != added.bundle_version
        assert overlapping.issuer_expires.seconds >= before.issuer_expires.seconds

        # The workload trusts both roots, so both its old certificate and the control plane's new one hold.
        error = await refused(admin, pb.ROTATION_STEP_RETIRE)
        assert "lead up to the old root" in str(error.details())
        roots = served.authority.roots_pem
        renewed = await served.renew(Workload(workload.key, workload.chain, roots))
        assert renewed.id == workload.id
        # Whether the answer has come is known once the workload was seen with the new certificate.
        assert "lead up to the old root" in str((await refused(admin, pb.ROTATION_STEP_RETIRE)).details())
        async with served.mesh(renewed) as again:
            seen = Watch(again)
            await seen.begin()
            await seen.end()
        retired = await rotate(admin, pb.ROTATION_STEP_RETIRE)
        assert [root.fingerprint for root in retired.roots] == [new]
        await watch.end()
    await served.renew(renewed)
    # Whoever has the old root alone is out, and the operator with the old certificate too.
    for late in (workload, operator):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.renew(Workload(late.key, late.chain, served.authority.roots_pem))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caplog.text.count("took the rotation step") == 3
    directory = served.authority.options.data_dir
    assert directory is not None
    assert sorted(path.name.partition("-")[0] for path in (directory / "ca").iterdir()) == [
        "authority.json",
        "issuer",
        "root",
        "roots.pem",
        "tokens.key",
    ]


async def _everybody_trusts(admin: AuthorityServiceAsyncStub, root: str) -> bool:
    return all(each.unconfirmed == 0 for each in (await status(admin)).roots if each.fingerprint == root)


async def test_whoever_joins_during_a_rotation_holds_it_up_no_longer_than_it_must(
    served: Plane, admin: AuthorityServiceAsyncStub
) -> None:
    await rotate(admin, pb.ROTATION_STEP_ADD)
    # The bundle with both roots came with their certificates, and they were never seen since.
    await served.join()
    await rotate(admin, pb.ROTATION_STEP_OVERLAP)
    error = await refused(admin, pb.ROTATION_STEP_RETIRE)
    assert "lead up to the old root" in str(error.details())
    await served.join()
    (row,) = [root for root in (await status(admin)).roots if not root.signing]
    assert row.workloads == 1


async def test_a_step_can_be_forced_and_steps_have_an_order(served: Plane, admin: AuthorityServiceAsyncStub) -> None:
    await served.join()
    for step in (pb.ROTATION_STEP_OVERLAP, pb.ROTATION_STEP_RETIRE):
        assert "add is the first step" in str((await refused(admin, step)).details())
    assert (await refused(admin, pb.ROTATION_STEP_UNSPECIFIED)).code() is grpc.StatusCode.INVALID_ARGUMENT
    await rotate(admin, pb.ROTATION_STEP_ADD)
    await rotate(admin, pb.ROTATION_STEP_OVERLAP, force=True)
    final = await rotate(admin, pb.ROTATION_STEP_RETIRE, force=True)
    assert len(final.roots) == 1


async def test_operators_and_revoked_workloads_hold_no_rotation_up(
    served: Plane, admin: AuthorityServiceAsyncStub
) -> None:
    workload = await served.join()
    await rotate(admin, pb.ROTATION_STEP_ADD)
    await served.authority.revoke(workload_id=workload.id)
    await rotate(admin, pb.ROTATION_STEP_OVERLAP)
    await rotate(admin, pb.ROTATION_STEP_RETIRE)


# -- workloads


async def test_workloads_are_shown_and_revoked(served: Plane, admin: AuthorityServiceAsyncStub) -> None:
    one, two, three = await served.join(), await served.join(), await served.join("inventory")
    shown = {each.id: each for each in (await status(admin)).workloads}
    assert shown[one.id].spiffe_id == "spiffe://mesh.internal/service/orders"
    assert shown[one.id].expires.seconds == int(one.certificate.not_valid_after_utc.timestamp())
    assert not shown[one.id].revoked
    assert [each.attested_by for each in shown.values() if "operator" in each.spiffe_id] == ["operator"]

    async def revoke(**which: str) -> list[str]:
        answer = await admin.RevokeWorkload(pb.RevokeWorkloadRequest(**which), timeout=TIMEOUT)
        return list(answer.workload_ids)

    assert await revoke(workload_id=three.id) == [three.id]
    assert await revoke(service="orders") == sorted([one.id, two.id])
    assert {each.id for each in (await status(admin)).workloads if each.revoked} == {one.id, two.id, three.id}
    for which, code in (
        ({"workload_id": "0123456789abcdef"}, grpc.StatusCode.NOT_FOUND),
        ({"service": "payments"}, grpc.StatusCode.NOT_FOUND),
        ({}, grpc.StatusCode.NOT_FOUND),
        ({"service": "Orders"}, grpc.StatusCode.INVALID_ARGUMENT),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await revoke(**which)
        assert caught.value.code() is code
    # Those that enrol afterwards are others.
    await served.renew(await served.join())


async def test_an_operator_is_revoked_like_anybody(
    served: Plane, admin: AuthorityServiceAsyncStub, operator: Workload, tmp_path: Path
) -> None:
    other = await served.operator(tmp_path, "bob")
    await admin.RevokeWorkload(pb.RevokeWorkloadRequest(workload_id=other.id), timeout=TIMEOUT)
    async with served.operators(other) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status(stub)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    await status(admin)


async def test_an_operator_made_from_files_is_known_once_it_was_there(served: Plane) -> None:
    bob = served.forged(Principal.operator("mesh.internal", "bob"))
    async with served.operators(bob) as stub:
        shown = [each for each in (await status(stub)).workloads if each.id == bob.id]
    assert [(each.spiffe_id, each.attested_by) for each in shown] == [
        ("spiffe://mesh.internal/operator/bob", "operator")
    ]
    assert shown[0].root == served.authority.bundle.signing_root


async def test_requests_fail_in_words_when_the_store_does(
    served: Plane, admin: AuthorityServiceAsyncStub, caplog: pytest.LogCaptureFixture
) -> None:
    await served.authority.close()
    calls = (
        admin.CreateJoinToken(pb.CreateJoinTokenRequest(service="orders"), timeout=TIMEOUT),
        admin.ListJoinTokens(pb.ListJoinTokensRequest(), timeout=TIMEOUT),
        admin.RevokeJoinToken(pb.RevokeJoinTokenRequest(id="x"), timeout=TIMEOUT),
        admin.GetCertificateAuthority(pb.GetCertificateAuthorityRequest(), timeout=TIMEOUT),
        admin.RotateTrustRoot(pb.RotateTrustRootRequest(step=pb.ROTATION_STEP_RETIRE), timeout=TIMEOUT),
        admin.RevokeWorkload(pb.RevokeWorkloadRequest(workload_id="x"), timeout=TIMEOUT),
    )
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "log says why" in str(caught.value.details())
    assert "identity store is closed" in caplog.text


# -- operators' own credentials


async def test_credentials_are_made_beside_a_running_control_plane(served: Plane, tmp_path: Path) -> None:
    data = served.authority.options.data_dir
    assert data is not None
    directory = tmp_path / "credentials"
    files = create_operator(data, "carol", directory, now=time.time(), lifetime=3600.0)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in directory.iterdir()} == {"operator.key", "operator.pem", "roots.pem"}
    carol = Workload(files.key.read_bytes(), files.chain.read_bytes(), files.roots.read_bytes())
    assert carol.id == files.workload_id
    async with served.operators(carol) as stub:
        assert files.workload_id in {each.id for each in (await status(stub)).workloads}


async def test_credentials_that_cannot_be_made_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start the control plane first"):
        create_operator(tmp_path, "alice", tmp_path / "o", now=time.time())
    async with opened(IdentityOptions(data_dir=tmp_path / "data")) as authority:
        for name in ("", "Alice", "a/b", "x" * 64):
            with pytest.raises(InvalidValueError):
                await authority.create_operator(name, tmp_path / "o")
        for lifetime in (0.0, MAX_LIFETIME + 1, float("nan")):
            with pytest.raises(ConfigError, match="lifetime"):
                await authority.create_operator("alice", tmp_path / "o", lifetime=lifetime)
        (tmp_path / "open").mkdir(mode=0o755)
        with pytest.raises(ConfigError, match="chmod 700"):
            await authority.create_operator("alice", tmp_path / "open")
        (tmp_path / "o" / "operator.key" / "x").mkdir(parents=True)
        (tmp_path / "o").chmod(0o700)
        with pytest.raises(ConfigError, match="cannot be used"):
            await authority.create_operator("alice", tmp_path / "o")
        with pytest.raises(ConfigError, match="trust domain"):
            create_operator(tmp_path / "data", "a", tmp_path / "p", now=time.time(), trust_domain="other.example")
