"""Where issuers and roots come from: the directory of an own CA, and files that were given."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from control_plane import files
from control_plane.identity import ca
from control_plane.identity.errors import InvalidTokenError, RotationRefusedError, StoreUnavailableError
from control_plane.identity.given_authority import GivenAuthority
from control_plane.identity.operators import create_operator_from_files
from control_plane.identity.options import IdentityOptions
from control_plane.identity.own_authority import OwnAuthority
from control_plane.identity.rotation import Dependent
from mesh_client.core.errors import ConfigError
from tests.control_plane.identities import Clock, Workload, opened, plane

NOW = time.time()
DAY = 86_400.0
DOMAIN = "mesh.internal"


def own(directory: Path | None, now: float = NOW) -> OwnAuthority:
    authority = OwnAuthority(directory, DOMAIN)
    authority.open(now, ())
    return authority


def names(directory: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in directory.iterdir())


def workload(root: str, *trusted: str) -> Dependent:
    return Dependent("0123456789abcdef", "spiffe://mesh.internal/service/orders", frozenset({root}), frozenset(trusted))


# -- own


def test_an_authority_is_the_same_after_a_restart(tmp_path: Path) -> None:
    first = own(tmp_path)
    assert own(tmp_path).state.trusted == first.state.trusted
    first.add(NOW)
    assert own(tmp_path).state.trusted == first.state.trusted
    first.overlap(NOW, [], force=False)
    second = own(tmp_path)
    assert second.state.trusted == first.state.trusted
    assert second.state.issuer.certificate == first.state.issuer.certificate
    second.retire([], force=False)
    assert own(tmp_path).state.signing == second.state.signing == first.state.signing
    assert names(tmp_path) == ["authority.json", "issuer", "root"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_steps_that_are_refused_change_nothing(tmp_path: Path) -> None:
    authority = own(tmp_path)
    before = sorted(tmp_path.iterdir()), authority.state
    with pytest.raises(RotationRefusedError):
        authority.overlap(NOW, [], force=True)
    with pytest.raises(RotationRefusedError):
        authority.retire([], force=True)
    authority.add(NOW)
    (old, new) = map(ca.fingerprint, authority.state.trusted)
    with pytest.raises(RotationRefusedError):
        authority.add(NOW)
    with pytest.raises(RotationRefusedError):
        authority.overlap(NOW, [workload(old, old)], force=False)
    assert authority.state.issuer == before[1].issuer
    authority.overlap(NOW, [workload(old, old, new)], force=False)
    with pytest.raises(RotationRefusedError):
        authority.retire([workload(old, old, new)], force=False)
    assert len(authority.state.trusted) == 2


@pytest.mark.parametrize("writes", range(1, 12))
def test_a_crash_at_any_write_leaves_the_state_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Every write and removal is a point at which the process may be killed."""
    left = writes

    class Killed(BaseException):
        pass

    def counted(work: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            work(*arguments)

        return run

    for name in ("write_atomically", "remove"):
        monkeypatch.setattr(f"control_plane.identity.own_authority.{name}", counted(getattr(files, name)))
    seen: list[tuple[x509.Certificate, ...]] = []
    try:
        authority = own(tmp_path)
        seen.append(authority.state.trusted)
        authority.add(NOW)
        seen.append(authority.state.trusted)
        authority.overlap(NOW, [], force=False)
        authority.retire([], force=False)
        seen.append(authority.state.trusted)
    except Killed:
        pass
    monkeypatch.undo()
    after = own(tmp_path)
    assert names(tmp_path).count("issuer") == 1
    assert names(tmp_path).count("root") == len(after.state.trusted)
    if seen:  # it had begun
        assert set(after.state.trusted) & set(seen[-1])
    after.tick(NOW)


def test_a_key_that_a_restored_state_does_not_know_is_not_deleted(tmp_path: Path) -> None:
    authority = own(tmp_path)
    before = (tmp_path / "authority.json").read_bytes()
    authority.add(NOW)
    new = f"root-{ca.fingerprint(authority.state.trusted[1])[:16]}.key"
    content = (tmp_path / new).read_bytes()
    files.write_atomically(tmp_path / "authority.json", before)
    assert len(own(tmp_path).state.trusted) == 1
    assert (tmp_path / f"unused-{new}").read_bytes() == content
    assert not (tmp_path / new).exists()


def test_an_issuer_is_replaced_in_time_while_the_root_s_key_is_there(tmp_path: Path) -> None:
    authority = own(tmp_path)
    first = authority.state.issuer
    authority.tick(NOW + 0.4 * ca.ISSUER_LIFETIME)
    assert authority.state.issuer == first
    authority.tick(NOW + 0.6 * ca.ISSUER_LIFETIME)
    second = authority.state.issuer
    assert second.certificate != first.certificate
    assert second.root == first.root
    assert names(tmp_path) == ["authority.json", "issuer", "root"]
    (key,) = tmp_path.glob("root-*.key")
    key.rename(tmp_path / "away")
    authority.tick(NOW + 1.5 * ca.ISSUER_LIFETIME)
    assert authority.state.issuer == second
    assert own(tmp_path).state.issuer.certificate == second.certificate
    # An issuer that ends with its root cannot be replaced by a later one.
    late = own(None)
    late.tick(NOW + ca.ROOT_LIFETIME - 1.0)
    replaced = late.state.issuer
    late.tick(NOW + ca.ROOT_LIFETIME - 0.1)
    assert late.state.issuer == replaced


def test_the_new_root_s_key_has_to_be_there_for_the_overlap(tmp_path: Path) -> None:
    authority = own(tmp_path)
    authority.add(NOW)
    key = tmp_path / f"root-{ca.fingerprint(authority.state.trusted[1])[:16]}.key"
    content = key.read_bytes()
    key.unlink()
    with pytest.raises(RotationRefusedError, match="bring the key of the new root back"):
        authority.overlap(NOW, [], force=True)
    key.write_bytes(content)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        authority.overlap(NOW, [], force=True)
    key.chmod(0o600)
    authority.overlap(NOW, [], force=True)


def test_rotation_in_memory_needs_no_files() -> None:
    authority = own(None)
    before = authority.state
    assert not authority.pending
    authority.follow([])
    assert authority.state == before
    with pytest.raises(RuntimeError):
        _ = OwnAuthority(None, DOMAIN).state
    authority.add(NOW)
    authority.overlap(NOW, [], force=False)
    authority.retire([], force=False)
    assert len(authority.state.trusted) == 1


def _change_state(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "authority.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _truncate(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (path,) = directory.glob(name)
        path.write_bytes(path.read_bytes()[:-40])

    return change


def _link(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (path,) = directory.glob(name)
        path.rename(directory / "elsewhere")
        path.symlink_to(directory / "elsewhere")

    return change


def _replace_key(directory: Path) -> None:
    (path,) = directory.glob("issuer-*.key")
    path.write_bytes(ca.key_pem(ec.generate_private_key(ec.SECP256R1())))


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: next(directory.glob(name)).unlink()


def _open_up(name: str) -> Callable[[Path], None]:
    return lambda directory: next(directory.glob(name)).chmod(0o644)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate("authority.json"), "authority.json is damaged"),
        (_change_state(format=2), "another version"),
        (_change_state(trust_domain="other.example"), "of the trust domain 'other.example'"),
        (_change_state(roots=[]), "is damaged"),
        (_change_state(signing=None), "is damaged"),
        (_change_state(issuer=7), "is damaged"),
        (_change_state(issuer="-----BEGIN CERTIFICATE-----"), "authority.json"),
        (_truncate("issuer-*.key"), "no key that can be read"),
        (_remove("issuer-*.key"), "is missing: restore"),
        (_replace_key, "is not the key of its certificate"),
        (_link("issuer-*.key"), "is a link"),
        (_link("authority.json"), "is a link"),
        (_open_up("issuer-*.key"), "chmod 600"),
        (_open_up("authority.json"), "chmod 600"),
        (_remove("authority.json"), "authority.json is missing: restore it"),
        (_truncate("tokens.key"), "tokens.key holds no key"),
        (_link("tokens.key"), "is a link"),
        (lambda directory: (directory / "tokens.key").write_bytes(b""), "tokens.key holds no key"),
        (lambda directory: directory.chmod(0o755), "chmod 700"),
        (lambda directory: (directory / "roots.pem").chmod(0o666), "others may write"),
    ],
)
async def test_a_directory_that_is_damaged_or_unsafe_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    options = IdentityOptions(data_dir=tmp_path / "data")
    async with opened(options):
        pass
    damage(tmp_path / "data" / "ca")
    with pytest.raises(ConfigError, match=words):
        async with opened(options):
            pass


async def test_a_state_whose_issuer_is_below_another_root_is_refused(tmp_path: Path) -> None:
    authority = own(tmp_path)
    authority.add(NOW)
    document = json.loads((tmp_path / "authority.json").read_text())
    document["signing"], document["next"] = document["next"], document["signing"]
    (tmp_path / "authority.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="not below the signing root"):
        own(tmp_path)


async def test_two_control_planes_do_not_share_a_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = IdentityOptions(data_dir=tmp_path / "data")
    monkeypatch.setattr(files.lock_directory, "__defaults__", (0.05,))
    async with opened(options):
        with pytest.raises(ConfigError, match="in use by another control plane"):
            async with opened(options):
                pass
    async with opened(options):
        pass


async def test_identities_outlive_a_control_plane_that_is_killed(tmp_path: Path) -> None:
    """A whole process, killed while it signs; the next one knows everybody."""
    program = """
import asyncio, sys
from pathlib import Path
from tests.control_plane.identities import plane
from control_plane.identity.options import IdentityOptions

async def main() -> None:
    async with plane(IdentityOptions(data_dir=Path(sys.argv[1]))) as served:
        while True:
            print((await served.join()).id, flush=True)

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path / "data"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    seen = [(await process.stdout.readline()).decode().strip() for _ in range(5)]
    process.kill()
    rest = (await process.stdout.read()).decode().split("\n")
    await process.wait()
    async with opened(IdentityOptions(data_dir=tmp_path / "data")) as authority:
        known = {each.id for each in (await authority.status()).workloads}
    assert {*seen, *filter(None, rest[:-1])} <= known


async def test_a_data_directory_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        async with opened(IdentityOptions(data_dir=tmp_path / "file")):
            pass
    (tmp_path / "data" / "ca" / "roots.pem").mkdir(parents=True, mode=0o700)
    (tmp_path / "data").chmod(0o700)
    (tmp_path / "data" / "ca").chmod(0o700)
    with pytest.raises(ConfigError):
        async with opened(IdentityOptions(data_dir=tmp_path / "data")):
            pass


async def test_a_start_long_after_the_issuer_ended_says_what_to_look_at(tmp_path: Path) -> None:
    options = IdentityOptions(data_dir=tmp_path / "data")
    async with opened(options):
        pass
    clock = Clock()
    clock.ahead = -10 * DAY
    with pytest.raises(ConfigError, match="is the clock right"):
        async with opened(options, clock):
            pass


# -- given as files


@dataclasses.dataclass
class Given:
    """An offline root with intermediates, as files."""

    directory: Path

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        return self.directory / "ca.pem", self.directory / "ca.key", self.directory / "roots.pem"

    def options(self, data_dir: Path | None = None) -> IdentityOptions:
        certificate, key, roots = self.paths
        return IdentityOptions(data_dir=data_dir, ca_certificate=certificate, ca_key=key, ca_roots=roots)

    def authority(self) -> GivenAuthority:
        return GivenAuthority(*self.paths)

    def write(self, issuer: ca.Issuer, *roots: x509.Certificate) -> None:
        files.write_atomically(self.directory / "ca.key", ca.key_pem(issuer.key))
        files.write_atomically(self.directory / "ca.pem", ca.pem([issuer.certificate]), 0o644)
        files.write_atomically(self.directory / "roots.pem", ca.pem(roots or [issuer.root]), 0o644)


def offline(label: str = "offline", now: float = NOW) -> Callable[[], ca.Issuer]:
    """What makes intermediates below a root whose key is elsewhere."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    root = ca.make_root(DOMAIN, label, root_key, x509.random_serial_number(), now)
    return lambda: ca.make_issuer(
        DOMAIN, label, root, root_key, ec.generate_private_key(ec.SECP256R1()), x509.random_serial_number(), now
    )


@pytest.fixture
def given(tmp_path: Path) -> Given:
    directory = tmp_path / "given"
    directory.mkdir(mode=0o700)
    return Given(directory)


async def test_an_intermediate_signs_and_is_replaced_while_everything_runs(given: Given, tmp_path: Path) -> None:
    intermediate = offline()
    given.write(intermediate())
    async with plane(given.options(tmp_path / "data")) as served:
        workload = await served.join()
        status = await served.authority.status()
        assert status.kind == "intermediate"
        assert not list((tmp_path / "data" / "ca").glob("root-*.key"))
        second = intermediate()
        given.write(second)
        await served.authority.maintain()
        renewed = await served.renew(workload)
        assert ca.load_certificates(renewed.chain, "chain")[1] == second.certificate
        with pytest.raises(RotationRefusedError, match="given as files"):
            await served.authority.add_root()
        created = create_operator_from_files(*given.paths, "alice", tmp_path / "o", now=time.time())
        alice = Workload(created.key.read_bytes(), created.chain.read_bytes(), created.roots.read_bytes())
        assert (await served.renew(alice)).id == created.workload_id


async def test_control_planes_below_one_root_renew_each_other_s_workloads(given: Given, tmp_path: Path) -> None:
    intermediate = offline()
    given.write(intermediate())
    second = Given(tmp_path / "second")
    second.directory.mkdir(mode=0o700)
    second.write(intermediate())
    async with plane(given.options(tmp_path / "a")) as here, plane(second.options(tmp_path / "b")) as there:
        token = await here.token()
        workload = await here.join()
        moved = await there.renew(workload)
        assert moved.id == workload.id
        (known,) = (await there.authority.status()).workloads
        assert (known.id, known.attested_by) == (workload.id, "certificate")
        await here.renew(moved)
        # Join tokens and revocations are each control plane's own.
        with pytest.raises(InvalidTokenError, match="did not sign"):
            await there.authority.issuance.by_token(token, "orders", b"", "x")
        await there.authority.revoke(workload_id=workload.id)
        with pytest.raises(grpc.aio.AioRpcError):
            await there.renew(moved)
        await here.renew(moved)


async def test_new_files_that_are_broken_or_half_written_change_nothing(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    intermediate = offline()
    given.write(intermediate())
    authority = given.authority()
    authority.open(NOW, ())
    before = authority.state
    for name in ("ca.pem", "ca.key", "roots.pem"):
        path = given.directory / name
        content = path.read_bytes()
        for broken in (b"", content[:-40], b"nonsense"):
            path.write_bytes(broken)
            with pytest.raises(ConfigError):
                authority.tick(NOW)
            authority.tick(NOW)  # said once
            assert authority.state == before
        path.unlink()
        with pytest.raises(ConfigError):
            authority.tick(NOW)
        files.write_atomically(path, content)
    # A key that does not belong to the certificate yet.
    files.write_atomically(given.directory / "ca.key", ca.key_pem(intermediate().key))
    with pytest.raises(ConfigError, match="is not the key"):
        authority.tick(NOW)
    given.write(intermediate())
    authority.tick(NOW)
    authority.follow([])
    assert not authority.pending
    assert authority.state.issuer.certificate != before.issuer.certificate


def test_a_root_is_changed_by_files_without_cutting_anybody_off(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    old, new = offline("old")(), offline("new")()
    names_of = {"old": ca.fingerprint(old.root), "new": ca.fingerprint(new.root)}
    given.write(old)
    authority = given.authority()
    authority.open(NOW, ())
    given.write(new, old.root, new.root)
    somebody = workload(names_of["old"], names_of["old"])
    authority.tick(NOW)
    assert authority.pending
    authority.follow([somebody])
    assert authority.state.trusted == (old.root, new.root)
    assert authority.state.issuer.certificate == old.certificate
    authority.tick(NOW)
    assert authority.pending
    authority.follow([somebody])
    assert caplog.text.count("have not confirmed that they trust the new root") == 1
    somebody = workload(names_of["old"], *names_of.values())
    authority.tick(NOW)
    assert authority.pending
    authority.follow([somebody])
    assert authority.state.issuer.certificate == new.certificate
    given.write(new)
    authority.tick(NOW)
    assert authority.pending
    authority.follow([somebody])
    assert authority.state.trusted == (old.root, new.root)
    assert "have certificates that lead up to the old root" in caplog.text
    # A restart in between remembers what was trusted.
    restarted = given.authority()
    restarted.open(NOW, authority.state.trusted)
    restarted.tick(NOW)
    assert restarted.pending
    restarted.follow([somebody])
    assert restarted.state.trusted == (old.root, new.root)
    for each in (authority, restarted):
        each.tick(NOW)
        assert each.pending
        each.follow([workload(names_of["new"], names_of["new"])])
        assert each.state.trusted == (new.root,)


def test_steps_with_files_can_be_forced(given: Given) -> None:
    old, new = offline("old")(), offline("new")()
    somebody = workload(ca.fingerprint(old.root), ca.fingerprint(old.root))
    given.write(old)
    authority = given.authority()
    authority.open(NOW, ())
    with pytest.raises(RotationRefusedError, match="replace"):
        authority.overlap(NOW, [], force=True)
    with pytest.raises(RotationRefusedError, match="no other roots"):
        authority.retire([], force=True)
    given.write(new)
    authority.tick(NOW)
    assert authority.pending
    authority.follow([somebody])
    assert authority.state.issuer.certificate == old.certificate
    with pytest.raises(RotationRefusedError, match="signs still"):
        authority.retire([somebody], force=True)
    with pytest.raises(RotationRefusedError, match="have not confirmed"):
        authority.overlap(NOW, [somebody], force=False)
    authority.overlap(NOW, [somebody], force=True)
    authority.retire([somebody], force=True)
    assert authority.state.trusted == (new.root,)


def test_files_that_are_not_safe_or_have_ended_are_refused(given: Given) -> None:
    with pytest.raises(RuntimeError):
        _ = given.authority().state
    with pytest.raises(ConfigError, match="cannot be read"):
        given.authority().open(NOW, ())
    issuer = offline()()
    given.write(issuer)
    with pytest.raises(ConfigError, match="has ended"):
        given.authority().open(NOW + 2 * ca.ISSUER_LIFETIME, ())
    (given.directory / "ca.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        given.authority().open(NOW, ())
    (given.directory / "ca.key").chmod(0o600)
    (given.directory / "roots.pem").chmod(0o666)
    with pytest.raises(ConfigError, match="others may write"):
        given.authority().open(NOW, ())


async def test_an_issuer_that_nobody_replaces_is_warned_of(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    given.write(offline()())
    clock = Clock()
    async with opened(given.options(), clock) as authority:
        await authority.maintain()
        assert "certificates can be signed" not in caplog.text
        clock.ahead = ca.ISSUER_LIFETIME - 30 * DAY
        for _ in range(2):
            await authority.maintain()
        assert caplog.text.count("for another 30.0 days only: have a new intermediate signed") == 1
        clock.ahead = ca.ISSUER_LIFETIME - 2 * DAY
        await authority.maintain()
    assert [record.levelname for record in caplog.records if "can be signed" in record.message] == ["WARNING", "ERROR"]


async def test_maintenance_goes_on_after_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = IdentityOptions(data_dir=tmp_path / "data", leaf_lifetime=2.0)
    async with opened(options) as authority:
        before = authority._own.leaf
        (tmp_path / "data" / "ca" / "roots.pem").chmod(0o666)
        async with asyncio.timeout(30):
            while "cannot do its work: others may write" not in caplog.text or authority._own.leaf == before:
                await asyncio.sleep(0.01)


async def test_a_store_that_fails_forgets_nobody_who_was_revoked(tmp_path: Path) -> None:
    async with plane(IdentityOptions(data_dir=tmp_path / "data")) as served:
        workload = await served.join()
        await served.authority.revoke(workload_id=workload.id)
        before = served.authority._own.leaf
        await served.authority.close()
        served.clock.ahead = 13 * 3600.0
        with pytest.raises(StoreUnavailableError):
            await served.authority.maintain()
        assert served.authority.is_revoked(workload.id)
        assert served.authority._own.leaf != before


def test_a_process_of_another_user_cannot_read_anything(tmp_path: Path) -> None:
    own(tmp_path)
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())
    assert all(path.stat().st_uid == os.geteuid() for path in tmp_path.iterdir())
