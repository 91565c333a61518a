"""The directory that holds a workload's identity: whose it must be, and what becomes of it when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Principal
from mesh_client.identity.certificates import Credential, TrustBundle, accept, from_pem
from mesh_client.identity.store import IdentityStore
from tests.certificates import TestAuthority
from tests.integration.scripted_authority import bundle_of

ORDERS = Principal.service("mesh.internal", "orders")
AUTHORITY = TestAuthority()
BUNDLE = TrustBundle.from_proto(bundle_of(AUTHORITY, revoked_workloads=["b", "a"]))


def credential() -> Credential:
    certificate = AUTHORITY.service("orders")
    return accept(certificate.key, from_pem(certificate.chain), BUNDLE, ORDERS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "below" / "identity"


@pytest.fixture
def store(directory: Path) -> Iterator[IdentityStore]:
    made = IdentityStore(directory, "orders", None)
    made.open()
    yield made
    made.close()


def test_it_gives_back_what_it_was_given(store: IdentityStore) -> None:
    assert store.load() is None
    kept = credential()
    store.save(kept, BUNDLE)
    assert store.load() == (kept, BUNDLE)
    assert b"PRIVATE" not in repr(store.load()).encode()


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_directory_that_others_can_look_into_is_refused(directory: Path, mode: int) -> None:
    directory.mkdir(parents=True)
    directory.chmod(mode)
    with pytest.raises(ConfigError, match="can be read or written by others; chmod 700 it"):
        IdentityStore(directory, "orders", None).open()


def test_a_directory_of_another_user_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir(mode=0o700, parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(ConfigError, match="belongs to another user"):
        IdentityStore(directory, "orders", None).open()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used: "):
        IdentityStore(tmp_path / "file" / "identity", "orders", None).open()


def test_a_lock_that_leads_elsewhere_is_not_followed(directory: Path, tmp_path: Path) -> None:
    directory.mkdir(mode=0o700, parents=True)
    (directory / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be used: "):
        IdentityStore(directory, "orders", None).open()
    assert not (tmp_path / "elsewhere").exists()


def test_a_key_that_others_can_read_is_refused_not_mended(store: IdentityStore, directory: Path) -> None:
    store.save(credential(), BUNDLE)
    (directory / "identity.json").chmod(0o640)
    with pytest.raises(ConfigError, match="can be read or written by others; chmod 600 it, and make a new secret"):
        store.load()


def test_a_file_that_cannot_be_read_is_refused(store: IdentityStore, directory: Path) -> None:
    (directory / "identity.json").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="cannot be read: "):
        store.load()


def test_another_process_cannot_have_the_directory_until_this_one_is_gone(directory: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from mesh_client.identity.store import IdentityStore; "
        "IdentityStore(Path(sys.argv[1]), 'orders', None).open(); print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", hold, str(directory)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        store = IdentityStore(directory, "orders", None)
        with pytest.raises(ConfigError, match="used by another process"):
            store.open()
        holder.kill()
        holder.wait()
    store.open()
    store.close()


def changed(document: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**document, **changes})


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"spiffe_id": "orders"},
        {"spiffe_id": None},
        {"private_key": "key"},
        {"private_key": AUTHORITY.service("orders").key.decode()},
        {"certificate_chain": ""},
        {"certificate_chain": TestAuthority().service("orders").chain.decode()},
        {"certificate_chain": AUTHORITY.roots.decode()},
        {"trust_bundle": "*"},
        {"trust_bundle": "////"},
        {"trust_bundle": ""},
    ],
)
def test_a_damaged_identity_is_set_aside(store: IdentityStore, directory: Path, change: dict[str, Any]) -> None:
    store.save(credential(), BUNDLE)
    file = directory / "identity.json"
    file.write_text(changed(json.loads(file.read_text()), **change))
    assert store.load() is None
    assert not file.exists()
    assert (directory / "identity.damaged").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"{}"])
def test_a_file_that_is_something_else_is_set_aside(store: IdentityStore, directory: Path, content: bytes) -> None:
    file = directory / "identity.json"
    file.write_bytes(content)
    file.chmod(0o600)
    assert store.load() is None
    assert (directory / "identity.damaged").exists()


@given(content=st.binary(max_size=300) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps))
def test_no_content_breaks_it(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    store = IdentityStore(tmp_path_factory.mktemp("identity"), "orders", None)
    file = store.directory / "identity.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    file.chmod(0o600)
    assert store.load() is None


def test_another_services_or_another_meshs_identity_is_left_where_it_is(store: IdentityStore, directory: Path) -> None:
    store.save(credential(), BUNDLE)
    for other in (IdentityStore(directory, "billing", None), IdentityStore(directory, "orders", "other.example")):
        with pytest.raises(ConfigError, match="holds the identity of spiffe://mesh.internal/service/orders, not of"):
            other.load()
    assert store.load() is not None


def test_what_could_not_be_written_leaves_what_was_there(
    store: IdentityStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = credential()
    store.save(kept, BUNDLE)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(credential(), BUNDLE)
    assert store.load() == (kept, BUNDLE)
    assert {path.name for path in directory.iterdir()} == {"identity.json", "lock"}


def test_closing_twice_is_harmless(store: IdentityStore) -> None:
    store.close()
    store.close()
