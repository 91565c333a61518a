"""A workload's identity against a real certificate authority: joining, renewal, trust bundle, rotation, revocation."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from mesh_client.core.errors import ConfigError, IdentityError
from mesh_client.core.identity import Principal
from mesh_client.identity.certificates import caller_of, fingerprint, from_pem
from mesh_client.identity.workload import WorkloadIdentity
from mesh_client.transport_choice import make_transport
from tests.integration.identity_rig import IdentityRig, messages, open_rig, until

ORDERS = Principal.service("mesh.internal", "orders")


@pytest.fixture
async def rig() -> AsyncIterator[IdentityRig]:
    async with open_rig() as made:
        yield made


def serial(identity: WorkloadIdentity) -> str:
    return identity.state(time.time()).serial


def warning(identity: WorkloadIdentity) -> str:
    return identity.state(time.time()).warning


async def test_a_workload_joins_with_a_token_that_is_all_it_has(rig: IdentityRig) -> None:
    async with rig.joined() as identity:
        state = identity.state(time.time())
    assert identity.principal == ORDERS
    assert identity.generation == 1
    assert (identity.problem, identity.failing) == ("", False)
    assert state.spiffe_id == "spiffe://mesh.internal/service/orders"
    assert state.root == fingerprint(rig.authority.bundle.roots[0])
    assert (state.last_error, state.warning, state.bundle_version) == ("", "", rig.authority.bundle.version)
    assert state.expires is not None
    assert 86_300 < state.expires - time.time() < 86_500
    assert identity.describe(time.time()) == "certificate valid for 23 h"
    (workload,) = (await rig.authority.status()).workloads
    assert (workload.id, workload.spiffe_id) == (state.workload_id, ORDERS.spiffe_id)


async def test_other_programs_get_what_they_need_to_speak_in_a_workloads_name_and_its_key_is_not_printed(
    rig: IdentityRig,
) -> None:
    async with rig.joined() as identity:
        pem = identity.pem()
        assert from_pem(pem.roots) == rig.authority.bundle.roots
        (leaf, *_) = from_pem(pem.certificate)
        caller = caller_of(pem.certificate)
        assert caller is not None
        assert caller.principal == ORDERS
        key = serialization.load_pem_private_key(pem.key, None)
        assert key.public_key() == x509.load_der_x509_certificate(leaf).public_key()
        assert repr(pem) == "PemCredentials()"
    nobody = rig.identity(rig.settings(token=await rig.token()))
    with pytest.raises(IdentityError, match="no certificate yet"):
        nobody.pem()


async def test_a_bundle_is_acknowledged_once_it_is_in_force_where_credentials_are_handed_on_to(
    rig: IdentityRig,
) -> None:
    entered, applied = asyncio.Event(), asyncio.Event()

    async def handed_on() -> None:
        entered.set()
        await applied.wait()

    identity = rig.identity(rig.settings(token=await rig.token()))
    identity.confirm_after(handed_on)
    applied.set()
    await identity.start()
    await identity.ready()
    await rig.authority.confirmed()
    applied.clear()
    entered.clear()
    await rig.authority.add_root()
    async with asyncio.timeout(20):
        await entered.wait()
        assert identity.state(0.0).bundle_version == rig.authority.bundle.version
        confirmed = asyncio.ensure_future(rig.authority.confirmed())
        done, _ = await asyncio.wait({confirmed}, timeout=0.1)
        assert not done
        applied.set()
        await confirmed
    await identity.stop()


async def test_a_failure_to_hand_credentials_on_is_said_and_confirms_nothing(
    rig: IdentityRig, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails() -> None:
        raise OSError("the disk is full")

    identity = rig.identity(rig.settings(token=await rig.token()))
    end = identity.confirm_after(fails)
    await identity.start()
    await identity.ready()
    async with asyncio.timeout(20):
        while "handing on credentials failed" not in caplog.text:
            await asyncio.sleep(0.01)
    end()
    await identity.stop()


async def test_the_trust_roots_may_come_from_a_file_and_then_no_others_are_believed(
    rig: IdentityRig, tmp_path: Path
) -> None:
    roots = tmp_path / "roots.pem"
    roots.write_bytes(rig.authority.roots_pem)
    async with rig.joined(trust_roots=roots) as identity:
        assert identity.generation == 1
    async with open_rig() as other:
        roots.write_bytes(other.authority.roots_pem)
        identity = rig.identity(rig.settings(token=await rig.token(), trust_roots=roots))
        await identity.start()
        await until(identity, lambda: identity.failing)
        assert "the control plane is not from an authority that this process trusts" in identity.problem
        await identity.stop()


async def test_all_that_a_process_opens_has_one_identity(rig: IdentityRig) -> None:
    settings = rig.settings(token=await rig.token(uses=1))
    first, second = make_transport(settings), make_transport(settings)
    await asyncio.gather(first.start(), second.start())
    await asyncio.gather(first.ready(), second.ready())
    assert first.identity is second.identity
    await first.stop()
    assert second.problem == ""
    await second.stop()


async def test_a_certificate_is_renewed_before_it_ends_with_another_key_and_the_workload_stays_the_same() -> None:
    async with open_rig(leaf_lifetime=7.0) as rig, rig.joined() as identity:
        before, configuration = identity.state(time.time()), identity.server_configuration()
        credentials = identity.channel_credentials()
        await until(identity, lambda: identity.generation == 2)
        after = identity.state(time.time())
        assert after.workload_id == before.workload_id
        assert after.serial != before.serial
        assert before.expires is not None
        assert time.time() < before.expires
        assert identity.server_configuration() is not configuration
        assert identity.channel_credentials() is not credentials


async def test_credentials_stay_the_same_objects_between_changes(rig: IdentityRig) -> None:
    async with rig.joined() as identity:
        assert identity.channel_credentials() is identity.channel_credentials()
        assert identity.server_configuration() is identity.server_configuration()


async def test_the_root_is_rotated_while_the_workload_runs(tmp_path: Path) -> None:
    async with open_rig(tmp_path, leaf_lifetime=10.0) as rig, rig.joined() as identity:
        authority = rig.authority
        old = identity.state(time.time()).root

        await authority.add_root()
        await until(identity, lambda: identity.state(0.0).bundle_version == authority.bundle.version)
        assert identity.generation == 2
        assert identity.state(time.time()).root == old
        await authority.confirmed()

        await authority.overlap()
        await until(identity, lambda: identity.state(0.0).root not in ("", old))
        await authority.confirmed()

        await authority.retire()
        await until(identity, lambda: identity.state(0.0).bundle_version == authority.bundle.version)
        assert len(authority.bundle.roots) == 1
        assert identity.state(time.time()).root == fingerprint(authority.bundle.roots[0])
        assert warning(identity) == ""


async def test_revoked_workloads_are_known_and_nothing_reconnects_for_them(rig: IdentityRig) -> None:
    async with rig.joined() as orders, rig.joined("billing") as billing:
        changed: list[int] = []
        unsubscribe = orders.on_change(lambda: changed.append(orders.generation))
        revoked = billing.state(time.time()).workload_id
        await rig.authority.revoke(workload_id=revoked)
        await until(orders, lambda: orders.revoked == {revoked})
        assert set(changed) == {1}
        unsubscribe()


async def test_a_revoked_workload_is_not_renewed_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async with open_rig(leaf_lifetime=7.0) as rig, rig.joined() as identity:
        workload = identity.state(time.time()).workload_id
        await rig.authority.revoke(workload_id=workload)
        await until(identity, lambda: "cannot be renewed" in warning(identity))
        assert "revoked" in identity.state(time.time()).last_error
        assert identity.state(time.time()).workload_id == workload
    assert any("certificate" in message and "revoked" in message for message in messages(caplog))


# -- kept on disk


async def test_a_workload_that_starts_again_needs_no_token(rig: IdentityRig, tmp_path: Path) -> None:
    directory = tmp_path / "identity"
    async with rig.joined(identity_dir=directory) as identity:
        first = identity.state(time.time())
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {
        "identity.json": 0o600,
        "lock": 0o600,
    }
    await rig.close_enrolment()
    again = rig.identity(rig.settings(identity_dir=directory))
    await again.start()
    assert (again.generation, again.problem) == (1, "")
    assert again.state(time.time()).serial == first.serial
    await again.stop()


async def test_what_changes_is_on_disk_before_it_is_acknowledged(rig: IdentityRig, tmp_path: Path) -> None:
    async with rig.joined(identity_dir=tmp_path / "identity"):
        await rig.authority.add_root()
        await rig.authority.confirmed()
        await rig.close_mesh()
        again = rig.identity(rig.settings(identity_dir=tmp_path / "copy"))
        (tmp_path / "copy").mkdir(mode=0o700)
        (tmp_path / "identity" / "identity.json").rename(tmp_path / "copy" / "identity.json")
        await again.start()
        assert again.state(time.time()).bundle_version == rig.authority.bundle.version
        await again.stop()


async def test_a_directory_is_for_one_process(rig: IdentityRig, tmp_path: Path) -> None:
    async with rig.joined(identity_dir=tmp_path / "identity"):
        other = rig.identity(rig.settings(identity_dir=tmp_path / "identity", token=await rig.token()))
        with pytest.raises(ConfigError, match="used by another process; give each process a directory of its own"):
            await other.start()
    await other.start()
    await other.stop()


async def test_a_directory_is_for_one_service(rig: IdentityRig, tmp_path: Path) -> None:
    async with rig.joined("billing", identity_dir=tmp_path / "identity"):
        pass
    other = rig.identity(rig.settings(identity_dir=tmp_path / "identity", token=await rig.token()))
    with pytest.raises(
        ConfigError, match="holds the identity of spiffe://mesh.internal/service/billing, not of orders"
    ):
        await other.start()


async def test_a_damaged_identity_is_set_aside_and_the_workload_joins_again(
    rig: IdentityRig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "identity"
    async with rig.joined(identity_dir=directory) as identity:
        first = serial(identity)
    document = json.loads((directory / "identity.json").read_text())
    document["private_key"] = document["private_key"].replace("A", "B")
    (directory / "identity.json").write_text(json.dumps(document))
    async with rig.joined(identity_dir=directory) as identity:
        assert serial(identity) != first
    assert (directory / "identity.damaged").exists()
    assert any("damaged and set aside" in message for message in messages(caplog))
    assert not any("PRIVATE" in message for message in messages(caplog, logging.DEBUG))


async def test_an_expired_stored_identity_without_a_token_is_of_no_use(tmp_path: Path) -> None:
    async with open_rig(leaf_lifetime=3.0) as rig:
        settings = rig.settings(identity_dir=tmp_path / "identity")
        async with rig.joined(identity_dir=tmp_path / "identity"):
            pass
        later = rig.identity(settings, clock=lambda: time.time() + 60.0)
        with pytest.raises(ConfigError, match="holds no identity that is still good, and there is no join token"):
            await later.start()


async def test_a_disk_that_cannot_be_written_costs_the_next_start_not_this_one(
    rig: IdentityRig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "identity"
    identity = rig.identity(rig.settings(token=await rig.token(), identity_dir=directory))
    await identity.start()
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    await identity.ready()
    await until(identity, lambda: identity.state(0.0).bundle_version != "")
    await identity.stop()
    assert any("cannot be saved" in message for message in messages(caplog))


# -- while the control plane is away


async def test_a_control_plane_that_is_away_past_half_of_a_life_is_warned_of_and_nothing_breaks(
    rig: IdentityRig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    offset = 0.0
    settings = rig.settings(token=await rig.token())
    identity = rig.identity(settings, clock=lambda: time.time() + offset)
    await identity.start()
    await identity.ready()
    await rig.authority.confirmed()
    offset = 0.55 * 86_400.0
    await rig.close_mesh()
    await until(identity, lambda: identity.state(0.0).last_error != "")
    now = time.time() + offset
    assert identity.problem == ""
    assert "expires in 10 h and cannot be renewed: " in identity.state(now).warning
    assert "expires in 10 h and cannot be renewed: " in identity.describe(now)
    assert any("expires in 10 h and cannot be renewed" in message for message in messages(caplog))
    await rig.open_mesh()
    await until(identity, lambda: identity.state(now).warning == "")
    assert any("renewed again" in message for message in messages(caplog, logging.INFO))
    await identity.stop()


async def test_an_expired_certificate_is_replaced_by_joining_again_once_that_is_possible(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_rig(leaf_lifetime=3.0) as rig:
        async with rig.joined(token=await rig.token(uses=2)) as identity:
            first = identity.state(time.time())
            await rig.close_enrolment()
            await rig.close_mesh()
            await until(identity, lambda: "expired" in warning(identity))
            assert "nobody accepts it" in identity.describe(time.time())
            assert identity.problem == ""
            await rig.open_enrolment()
            await rig.open_mesh()
            await until(identity, lambda: identity.state(0.0).workload_id != first.workload_id)
            await until(identity, lambda: warning(identity) == "")
    errors = messages(caplog, logging.ERROR)
    assert any("expired" in message for message in errors), errors


async def test_an_expired_certificate_without_a_token_says_what_to_do(tmp_path: Path) -> None:
    # Good for long enough that it still is when the workload starts again.
    async with open_rig(leaf_lifetime=6.0) as rig:
        async with rig.joined(identity_dir=tmp_path / "identity"):
            pass
        identity = rig.identity(rig.settings(identity_dir=tmp_path / "identity"))
        await rig.close_mesh()
        await identity.start()
        await until(identity, lambda: "no join token" in identity.state(0.0).last_error)
        assert "restart with a new one" in identity.describe(time.time() + 10.0)
        await identity.stop()


async def test_a_clock_that_is_behind_is_told(rig: IdentityRig, caplog: pytest.LogCaptureFixture) -> None:
    settings = rig.settings(token=await rig.token())
    identity = WorkloadIdentity(settings, rng=Random(1), clock=lambda: time.time() - 7200.0)
    await identity.start()
    await identity.ready()
    assert (
        "valid in 118 min by this host's clock, which is probably behind"
        in identity.state(time.time() - 7200.0).warning
    )
    await identity.stop()
    assert any("clock is at least 118 min behind" in message for message in messages(caplog))


async def test_there_is_an_error_before_there_is_a_certificate(rig: IdentityRig) -> None:
    identity = rig.identity(rig.settings(token=await rig.token()))
    assert "has no certificate yet" in identity.problem
    assert not identity.failing
    assert identity.revoked == frozenset()
    assert identity.state(0.0).warning == identity.describe(0.0) == identity.problem
    with pytest.raises(IdentityError, match="no certificate yet"):
        identity.channel_credentials()
    with pytest.raises(IdentityError, match="no certificate yet"):
        identity.server_configuration()
