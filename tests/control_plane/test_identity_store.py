"""The file of join tokens and workloads."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from control_plane.identity import store as store_module
from control_plane.identity.errors import InvalidTokenError, RevokedError, StoreUnavailableError, TooManyTokensError
from control_plane.identity.records import TokenRecord, WorkloadRecord
from control_plane.identity.store import FILE_NAME, KEEP, KEEP_REVOKED, IdentityStore, note_beside
from control_plane.identity.store_schema import SCHEMA
from mesh_client.core.errors import ConfigError

NOW = 1_000.0
TOKEN = TokenRecord("t1", "orders", 2_000, 2, 2, "spiffe://mesh.internal/operator/alice")
ORDERS = "spiffe://mesh.internal/service/orders"


def workload(number: int, expires: float = 2_000.0) -> WorkloadRecord:
    return WorkloadRecord(f"{number:016x}", ORDERS, f"{number:x}", expires, "r1", "join token t1")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[IdentityStore]:
    made = IdentityStore(tmp_path)
    await made.open()
    yield made
    await made.close()


async def test_tokens_are_listed_until_they_end_or_are_revoked(store: IdentityStore) -> None:
    sooner = replace(TOKEN, id="t2", expires=1_500)
    await store.add_token(TOKEN, NOW)
    await store.add_token(sooner, NOW)
    assert await store.tokens(NOW) == [sooner, TOKEN]
    assert await store.tokens(1_500.0) == [TOKEN]
    assert await store.revoke_token("t1")
    assert not await store.revoke_token("t1")
    assert not await store.revoke_token("t3")
    assert await store.tokens(NOW) == [sooner]


async def test_a_use_is_spent_with_each_workload(store: IdentityStore) -> None:
    await store.add_token(TOKEN, NOW)
    await store.join(workload(1), "t1", "orders", NOW)
    assert await store.tokens(NOW) == [replace(TOKEN, uses_left=1)]
    await store.join(workload(2), "t1", "orders", NOW)
    with pytest.raises(InvalidTokenError):
        await store.join(workload(3), "t1", "orders", NOW)
    assert [each.id for each in await store.workloads(NOW)] == [workload(1).id, workload(2).id]


async def test_the_same_workload_joins_again_without_spending(store: IdentityStore) -> None:
    await store.add_token(replace(TOKEN, uses_left=1), NOW)
    await store.join(workload(1), "t1", "orders", NOW)
    await store.join(replace(workload(1), serial="ff"), "t1", "orders", NOW)
    assert [each.serial for each in await store.workloads(NOW)] == ["ff"]
    await store.revoke("id", workload(1).id, NOW)
    with pytest.raises(RevokedError):
        await store.join(workload(1), "t1", "orders", NOW)
    await store.revoke_token("t1")
    with pytest.raises(InvalidTokenError):
        await store.join(workload(1), "t1", "orders", NOW)


async def test_uses_hold_however_many_ask_at_once(store: IdentityStore) -> None:
    await store.add_token(replace(TOKEN, uses=7, uses_left=7), NOW)
    answers = await asyncio.gather(
        *(store.join(workload(number), "t1", "orders", NOW) for number in range(50)), return_exceptions=True
    )
    assert sum(answer is None for answer in answers) == 7
    assert len(await store.workloads(NOW)) == 7


@pytest.mark.parametrize(
    ("token_id", "service", "now"), [("t9", "orders", NOW), ("t1", "inventory", NOW), ("t1", "orders", 2_000.0)]
)
async def test_a_token_that_is_not_good_joins_nobody(
    store: IdentityStore, token_id: str, service: str, now: float
) -> None:
    await store.add_token(TOKEN, NOW)
    with pytest.raises(InvalidTokenError):
        await store.join(workload(1), token_id, service, now)
    assert await store.workloads(NOW) == []
    assert await store.tokens(NOW) == [TOKEN]


async def test_a_use_is_not_spent_when_the_workload_cannot_be_stored(store: IdentityStore, tmp_path: Path) -> None:
    await store.add_token(TOKEN, NOW)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON workloads BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
        )
    with pytest.raises(StoreUnavailableError, match="the disk is full"):
        await store.join(workload(1), "t1", "orders", NOW)
    assert await store.tokens(NOW) == [TOKEN]


async def test_the_number_of_tokens_is_bounded(store: IdentityStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_TOKENS", 1)
    await store.add_token(TOKEN, NOW)
    with pytest.raises(TooManyTokensError):
        await store.add_token(replace(TOKEN, id="t2"), NOW)
    await store.add_token(replace(TOKEN, id="t3", expires=3_000), 2_000.0)


async def test_a_renewal_keeps_what_was_confirmed(store: IdentityStore) -> None:
    await store.add_workload(workload(1))
    await store.confirm(workload(1).id, "v1", ["r1", "r2"])
    await store.renew(replace(workload(1, 3_000.0), serial="ff", root="r2", attested_by="certificate"))
    (found,) = await store.workloads(NOW)
    assert found == replace(
        workload(1, 3_000.0), serial="ff", root="r2", bundle_version="v1", trusted=frozenset({"r1", "r2"})
    )


async def test_workloads_are_remembered_with_the_root_that_they_were_seen_with(store: IdentityStore) -> None:
    await store.note(replace(workload(1), seen_root="r1"))
    await store.note(replace(workload(1), serial="ff", seen_root="r2"))
    await store.renew(workload(2))
    assert [(each.serial, each.seen_root) for each in await store.workloads(NOW)] == [("1", "r2"), ("2", "")]
    await store.confirm("unknown", "v1", ["r1"])
    assert len(await store.workloads(NOW)) == 2


async def test_nobody_renews_as_another_principal_or_after_a_revocation(store: IdentityStore) -> None:
    await store.add_workload(workload(1))
    with pytest.raises(RevokedError):
        await store.renew(replace(workload(1), spiffe_id="spiffe://mesh.internal/service/inventory"))
    assert await store.revoke("id", workload(1).id, NOW) == [workload(1).id]
    with pytest.raises(RevokedError):
        await store.renew(workload(1, 3_000.0))
    (found,) = await store.workloads(NOW)
    assert (found.revoked, found.expires) == (True, 2_000.0)


async def test_a_service_s_workloads_are_revoked_until_their_last_certificate_ends(store: IdentityStore) -> None:
    for number in (1, 2):
        await store.add_workload(workload(number))
    await store.renew(workload(2, 5_000.0))
    await store.renew(workload(2, 1_500.0))  # a shorter one since: the longer one may still be used
    await store.add_workload(replace(workload(3), spiffe_id="spiffe://mesh.internal/service/inventory"))
    ids = [workload(1).id, workload(2).id]
    assert await store.revoke("spiffe_id", ORDERS, NOW) == ids
    assert await store.revoke("spiffe_id", ORDERS, NOW) == ids
    assert await store.revoked(NOW) == set(ids)
    assert await store.revoked(4_000.0) == {workload(2).id}
    assert await store.revoke("spiffe_id", ORDERS, 9_000.0) == []
    assert await store.revoke("id", "unknown", NOW) == []


async def test_what_attested_a_revoked_workload_and_its_key_attest_nobody_any_more(store: IdentityStore) -> None:
    first = replace(workload(1), attested_by="consul token a1", key="k1")
    await store.add_workload(first)
    await store.renew(replace(first, attested_by="certificate", key="k2"))
    await store.add_workload(replace(workload(2), attested_by="consul token a1", key="k3"))  # not revoked yet
    await store.revoke("id", first.id, NOW)
    with pytest.raises(RevokedError, match=f"workload {first.id}, which joined by consul token a1, .* delete it"):
        await store.add_workload(replace(workload(3), attested_by="consul token a1", key="k4"))
    with pytest.raises(RevokedError, match="make a new key"):
        await store.add_workload(replace(workload(3), attested_by="consul token a2", key="k2"))
    await store.add_token(TOKEN, NOW)
    with pytest.raises(RevokedError, match="make a new key"):
        await store.join(replace(workload(3), key="k2"), "t1", "orders", NOW)
    assert await store.tokens(NOW) == [TOKEN]
    await store.add_workload(replace(workload(3), attested_by="consul token a2", key="k4"))
    # The other workload of the token is not revoked with it.
    await store.renew(replace(workload(2, 3_000.0), key="k5"))


async def test_a_file_of_the_first_version_goes_on(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"{SCHEMA[0]} PRAGMA user_version = 1;")
        connection.execute(
            "INSERT INTO workloads (id, spiffe_id, serial, expires, last_expiry, root, attested_by, revoked) "
            "VALUES ('w1', ?, '1', 2000, 2000, 'r1', 'consul token a1', 1)",
            (ORDERS,),
        )
        connection.commit()
    path.chmod(0o600)
    store = IdentityStore(tmp_path)
    await store.open()
    with pytest.raises(RevokedError, match="workload w1, which joined by consul token a1"):
        await store.add_workload(replace(workload(1), attested_by="consul token a1", key="k1"))
    await store.add_workload(replace(workload(1), attested_by="consul token a2", key="k1"))
    await store.close()


async def test_what_ended_long_ago_is_forgotten_but_revocations_much_later(store: IdentityStore) -> None:
    await store.add_token(TOKEN, NOW)
    for number in (1, 2):
        await store.add_workload(workload(number))
    await store.revoke("id", workload(1).id, NOW)
    await store.forget(2_000.0 + KEEP)
    # A clock that is set back again finds the token worthless and the workload revoked.
    assert await store.tokens(NOW) == []
    with pytest.raises(InvalidTokenError):
        await store.join(workload(4), "t1", "orders", NOW)
    assert await store.revoked(NOW) == {workload(1).id}
    assert len(await store.workloads(NOW)) == 1
    await store.forget(2_000.0 + KEEP_REVOKED)
    assert await store.workloads(NOW) == []


async def test_everything_is_there_after_a_restart_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = IdentityStore(tmp_path)
    await first.open()
    await first.add_token(TOKEN, NOW)
    await first.join(workload(1), "t1", "orders", NOW)
    await first.revoke("id", workload(1).id, NOW)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    await first.close()
    second = IdentityStore(tmp_path)
    await second.open()
    assert await second.tokens(NOW) == [replace(TOKEN, uses_left=1)]
    assert await second.revoked(NOW) == {workload(1).id}
    await second.close()


async def test_a_closed_store_refuses() -> None:
    closed = IdentityStore(None)
    with pytest.raises(StoreUnavailableError, match="not open"):
        await closed.tokens(NOW)
    await closed.close()
    await closed.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        await closed.tokens(NOW)


async def fails_to_open(directory: Path, words: str) -> None:
    store = IdentityStore(directory)
    with pytest.raises(ConfigError, match=words):
        await store.open()
    await store.close()


async def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(b"not a database at all, but long enough to be one" * 50)
    path.chmod(0o600)
    before = path.read_bytes()
    await fails_to_open(tmp_path, "is damaged .*forgets revocations")
    assert path.read_bytes() == before


async def test_a_page_that_is_damaged_is_noticed(tmp_path: Path) -> None:
    store = IdentityStore(tmp_path)
    await store.open()
    for number in range(200):
        await store.add_workload(workload(number))
    await store.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    content[8192 : 8192 + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    await fails_to_open(tmp_path, "is damaged")


async def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("PRAGMA user_version = 3")
    (tmp_path / FILE_NAME).chmod(0o600)
    await fails_to_open(tmp_path, "newer version")


async def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.touch(0o644)
    path.chmod(0o644)
    await fails_to_open(tmp_path, "chmod 600")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    await fails_to_open(tmp_path, "is not a file of this user")
    await fails_to_open(tmp_path / "missing", "cannot be used")


async def test_an_operator_is_noted_beside_a_running_control_plane(store: IdentityStore, tmp_path: Path) -> None:
    note_beside(tmp_path, workload(1))
    assert [each.id for each in await store.workloads(NOW)] == [workload(1).id]
    with pytest.raises(ConfigError, match="start the control plane first"):
        note_beside(tmp_path / "elsewhere", workload(1))
    with pytest.raises(ConfigError, match="cannot be used"):
        note_beside(tmp_path, workload(1))


async def test_work_that_nobody_waits_for_any_more_is_finished(store: IdentityStore) -> None:
    await store.add_token(TOKEN, NOW)
    joining = asyncio.create_task(store.join(workload(1), "t1", "orders", NOW))
    await asyncio.sleep(0)
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    assert len(await store.workloads(NOW)) == 1
