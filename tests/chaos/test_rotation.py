"""Certificates and roots that are replaced under load, between real processes: no call fails, nothing restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest
from mesh.v1 import authority_pb2 as pb

from tests import leaks
from tests.chaos.secure_mesh import PATIENCE, Load, SecureMesh, identity_of, serials

SERVERS = ("inventory-1", "inventory-2")
CALLS = 10_000
ADD, OVERLAP, RETIRE = pb.ROTATION_STEP_ADD, pb.ROTATION_STEP_OVERLAP, pb.ROTATION_STEP_RETIRE


def unrenewed(before: dict[str, str], now: pb.GetCertificateAuthorityResponse) -> set[str]:
    """Workloads that still have the certificate that they had."""
    found = serials(now)
    assert found.keys() == before.keys(), "a workload joined again"
    return {each for each in before if before[each] == found[each]}


async def renewed(secure: SecureMesh, before: dict[str, str]) -> dict[str, str]:
    """Returns when every workload has another certificate than it had: which."""
    return serials(await secure.until_authority(lambda found: not unrenewed(before, found)))


def signing(authority: pb.GetCertificateAuthorityResponse) -> str:
    """The root that new certificates lead up to."""
    (found,) = (root.fingerprint for root in authority.roots if root.signing)
    return found


async def refusal(secure: SecureMesh, step: pb.RotationStep.ValueType) -> str:
    """Why a step of a rotation is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await secure.rotate(step)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    return caught.value.details() or ""


async def test_no_call_of_10000_fails_while_certificates_are_renewed_on_both_ends(tmp_path: Path) -> None:
    async with SecureMesh(tmp_path, leaf_lifetime=7.0) as secure:
        await secure.start_servers(*SERVERS)
        async with Load(await secure.connect()) as load:
            first = serials(await secure.authority())
            assert len(first) == 3
            await load.reaches(CALLS)
            await renewed(secure, first)
            await load.goes_on(100)
            assert load.streamed > 0
        assert all(secure.processes[name].running for name in SERVERS)


async def test_no_call_of_10000_fails_while_the_trust_root_is_replaced(tmp_path: Path) -> None:
    async with SecureMesh(tmp_path, leaf_lifetime=7.0) as secure:
        await secure.start_servers(*SERVERS)
        mesh = await secure.connect()
        async with Load(mesh) as load:
            before = await secure.authority()
            await load.reaches(CALLS // 4)
            added = await secure.rotate(ADD)
            assert len(added.roots) == 2
            await load.goes_on(100)
            await secure.rotate_when_ready(OVERLAP)
            await load.reaches(CALLS // 2)
            retired = await secure.rotate_when_ready(RETIRE)
            await load.reaches(CALLS)
        assert [root.fingerprint for root in retired.roots] == [signing(retired)] != [signing(before)]
        assert serials(retired).keys() == serials(before).keys(), "a workload joined again"
        assert identity_of(mesh).root == signing(retired)


async def test_connections_with_old_credentials_are_closed_once_their_calls_have_ended(tmp_path: Path) -> None:
    async with SecureMesh(tmp_path, leaf_lifetime=6.0) as secure:
        await secure.start_servers(*SERVERS)
        mesh = await secure.connect()
        async with Load(mesh, workers=2, pause=0.01, stream=False) as load:
            await renewed(secure, serials(await secure.authority()))
            await load.goes_on(20)
            # One to each server, one for discovery, one for the trust bundle.
            async with asyncio.timeout(PATIENCE):
                while len(leaks.open_channels()) > len(SERVERS) + 2:
                    await load.goes_on(2)


async def test_nothing_is_signed_by_a_root_that_a_workload_has_not_confirmed_and_none_is_retired_that_one_needs(
    tmp_path: Path,
) -> None:
    async with SecureMesh(tmp_path, leaf_lifetime=40.0) as secure:
        await secure.start_servers(*SERVERS)
        await secure.start_servers("hanging", service="billing")
        (hanging,) = (each.id for each in (await secure.authority()).workloads if each.spiffe_id.endswith("/billing"))
        async with Load(await secure.connect(), workers=2, pause=0.01) as load:
            assert "add is the first step" in await refusal(secure, OVERLAP)
            secure.processes["hanging"].freeze()
            await secure.rotate(ADD)
            words = "1 workloads have not confirmed that they trust the new root"
            # The others have confirmed by and by; the one that hangs never does.
            await secure.until_authority(lambda found: found.roots[1].unconfirmed == 1)
            said = await refusal(secure, OVERLAP)
            assert said.startswith(f"{words}: spiffe://mesh.internal/service/billing (workload {hanging})")
            await load.goes_on(20)

            secure.processes["hanging"].thaw()
            await secure.until_authority(lambda found: found.roots[1].unconfirmed == 0)
            secure.processes["hanging"].freeze()
            await secure.rotate(OVERLAP)
            old = (await secure.authority()).roots[0]
            assert not old.signing
            await secure.until_authority(lambda found: found.roots[0].workloads == 1)
            said = await refusal(secure, RETIRE)
            assert said.startswith("1 workloads have certificates that lead up to the old root: ")
            assert f"spiffe://mesh.internal/service/billing (workload {hanging})" in said
            await load.goes_on(20)

            forced = await secure.rotate(RETIRE, force=True)
            assert old.fingerprint not in [root.fingerprint for root in forced.roots]
            await load.goes_on(200)
            # Who was cut off comes back by its join token, if that is good still.
            secure.processes["hanging"].thaw()
            await secure.until_authority(
                lambda found: any(
                    each.spiffe_id.endswith("/billing") and each.root == signing(found) for each in found.workloads
                )
            )
            assert secure.processes["hanging"].running


async def test_a_rotation_goes_on_where_it_was_when_the_control_plane_was_killed_in_the_middle(tmp_path: Path) -> None:
    # Longer than a control plane takes to start again on a busy machine: whoever's certificate ends has to join again.
    async with SecureMesh(tmp_path, leaf_lifetime=30.0) as secure:
        await secure.start_servers(*SERVERS)
        async with Load(await secure.connect(), workers=4, pause=0.002) as load:
            before = await secure.authority()
            for step in (ADD, OVERLAP, RETIRE):
                left = await secure.rotate_when_ready(step)
                await secure.kill_control_plane()
                await load.goes_on(100)
                await secure.start_control_plane()
                found = await secure.authority()
                assert [(root.fingerprint, root.signing) for root in found.roots] == [
                    (root.fingerprint, root.signing) for root in left.roots
                ]
            await load.goes_on(200)
            assert serials(await secure.authority()).keys() == serials(before).keys(), "a workload joined again"
