"""The embedded registry's file, leases in it, and policies in it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from control_plane.events import EndpointDrained, PolicyDeleted, PolicyStored
from control_plane.sources import NotStoredError, StoreUnavailableError, VersionConflictError
from control_plane.sources.database import _SCHEMA, Database
from control_plane.sources.embedded import EmbeddedSource
from control_plane.sources.embedded_policies import EmbeddedPolicyStore
from control_plane.sources.leases import LeaseHeldError, endpoint_to_json
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import ConfigError
from mesh_client.core.model import Endpoint, Health
from tests.control_plane.recording import recorded

ONE = Endpoint("a-1", "10.0.0.1", 80)
TWO = Endpoint("a-2", "10.0.0.2", 80)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(tmp_path)
    yield made
    await made.close()


def rows(directory: Path, table: str = "leases") -> int:
    with closing(sqlite3.connect(directory / "registry.sqlite")) as connection:
        return int(connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


async def execute(database: Database, statement: str) -> None:
    def work(connection: sqlite3.Connection) -> None:
        connection.execute(statement)

    await database.run(work)


# -- the file


async def test_work_is_done_or_undone_whole(database: Database) -> None:
    def half(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO last_versions VALUES ('policies', 7)")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.run(half)
    rows = await database.run(lambda connection: connection.execute("SELECT * FROM last_versions").fetchall())
    assert rows == []


async def test_a_mistake_in_a_statement_is_an_unavailable_store_and_no_damage(database: Database) -> None:
    with pytest.raises(StoreUnavailableError, match="no such table"):
        await execute(database, "DELETE FROM nobody")
    assert await database.run(lambda connection: connection.execute("SELECT 1").fetchone()) == (1,)


async def test_in_memory_nothing_is_written() -> None:
    database = Database(None)
    assert database.path is None
    store = EmbeddedPolicyStore(database)
    await store.put("a", b"1", "")
    assert [stored.name for stored in await store.list()] == ["a"]
    await database.close()


async def test_a_damaged_file_is_moved_aside_and_begun_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "registry.sqlite").write_bytes(b"this is not a database, and never was one" * 200)
    database = Database(tmp_path)
    await database.open()
    await EmbeddedPolicyStore(database).put("a", b"1", "")
    await database.close()
    assert len(list(tmp_path.glob("registry.sqlite.damaged-*"))) == 1
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "is damaged" in record.message
    assert "applied again" in record.message


async def test_a_file_that_is_damaged_inside_is_moved_aside(tmp_path: Path) -> None:
    first = Database(tmp_path)
    store = EmbeddedPolicyStore(first)
    for number in range(200):
        await store.put(f"a{number}", b"x" * 500, "")
    await first.close()
    path = tmp_path / "registry.sqlite"
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    second = Database(tmp_path)
    await second.open()
    assert await EmbeddedPolicyStore(second).list() == []
    await second.close()
    assert len(list(tmp_path.glob("registry.sqlite.damaged-*"))) == 1


async def test_a_file_that_is_damaged_under_way_is_moved_aside_and_registrations_are_written_again(
    tmp_path: Path,
) -> None:
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source) as recording:
        stream = await source.register("a", ONE, "", "peer")
        await source.confirmed()
        with closing(sqlite3.connect(tmp_path / "registry.sqlite")) as vandal:
            vandal.executescript(
                "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 9999 WHERE name = 'leases'; "
                "PRAGMA schema_version = 1234;"
            )
        await source.register("a", TWO, "", "peer")
        await source.confirmed()
        await recording.until(lambda: "cannot be stored" in recording.detail)
        await recording.until(lambda: recording.connected)
        assert recording.ids("a") == {"a-1", "a-2"}
        assert rows(tmp_path) == 2
        source.broken(stream)
    await database.close()


async def test_two_control_planes_do_not_share_a_directory(tmp_path: Path, database: Database) -> None:
    await database.open()
    second = Database(tmp_path, lock_timeout=0.05)
    with pytest.raises(ConfigError, match="in use by another control plane"):
        await second.open()
    await second.close()


async def test_a_successor_waits_for_its_predecessor(tmp_path: Path) -> None:
    first, second = Database(tmp_path), Database(tmp_path, lock_timeout=10.0)
    await first.open()
    opening = asyncio.ensure_future(second.open())
    await first.close()
    await opening
    await second.close()


async def test_a_directory_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    database = Database(tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match="cannot be used"):
        await database.open()
    await database.close()


async def test_a_file_that_is_a_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").mkdir()
    database = Database(tmp_path)
    with pytest.raises(ConfigError, match="cannot be used"):
        await database.open()
    await database.close()


async def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "registry.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    database = Database(tmp_path)
    with pytest.raises(ConfigError, match="newer version"):
        await database.open()
    await database.close()
    assert not list(tmp_path.glob("*.damaged-*"))


async def test_policies_of_a_file_that_an_older_version_wrote_are_taken_over(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "registry.sqlite")) as connection:
        connection.executescript(_SCHEMA[0])
        connection.execute("INSERT INTO policies VALUES ('orders', 'service: orders', 7)")
        connection.execute("UPDATE last_version SET version = 9")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    database = Database(tmp_path)
    store, edges = EmbeddedPolicyStore(database), EmbeddedPolicyStore(database, EdgePolicy)
    assert [(item.name, item.version) for item in await store.list()] == [("orders", "7")]
    assert (await store.put("orders", b"1", "7")).version == "10"
    assert not await store.is_fresh()
    assert await edges.is_fresh()
    await database.close()
    again = Database(tmp_path)
    assert [item.version for item in await EmbeddedPolicyStore(again).list()] == ["10"]
    await again.close()


# -- leases


async def test_leases_of_a_file_that_an_older_version_wrote_are_any_workload_s_until_one_has_registered(
    tmp_path: Path,
) -> None:
    with closing(sqlite3.connect(tmp_path / "registry.sqlite")) as connection:
        connection.executescript(f"{_SCHEMA[0]}{_SCHEMA[1]} PRAGMA user_version = 2;")
        connection.execute("INSERT INTO leases VALUES ('a', 'a-1', ?, x'00', 'peer', 0)", (endpoint_to_json(ONE),))
        connection.commit()
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source):
        await source.confirmed()
        assert source.is_of("a", "a-1", "w1", "")
        stream = await source.register("a", ONE, "", "peer", "w1")
        assert source.is_of("a", "a-1", "w1", "")
        assert source.is_of("a", "a-1", "w2", stream.token)
        assert not source.is_of("a", "a-1", "w2", "")
        assert source.is_of("a", "unknown", "w2", "")
    await database.close()


async def test_a_restart_forgets_nobody_who_comes_back(tmp_path: Path) -> None:
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source):
        kept = await source.register("a", ONE, "", "peer")
        await source.register("a", TWO, "", "peer")
        await source.confirmed()
    await database.close()

    database = Database(tmp_path)
    source = EmbeddedSource(database, restart_grace=2.0)
    async with recorded(source) as recording:
        await recording.until(lambda: recording.connected)
        assert recording.ids("a") == {"a-1", "a-2"}
        returned = await source.register("a", ONE, kept.token, "peer")
        assert returned.token == kept.token
        await recording.until(lambda: recording.ids("a") == {"a-1"})
    await database.close()
    assert rows(tmp_path) == 1


async def test_a_drained_endpoint_is_still_drained_after_a_restart(tmp_path: Path) -> None:
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source) as recording:
        await source.register("a", ONE, "", "peer")
        source.drain("a", "a-1")
        assert EndpointDrained("a", "a-1") in recording.events
        source.drain("a", "unknown")
    await database.close()
    database = Database(tmp_path)
    async with recorded(EmbeddedSource(database)) as recording:
        await recording.until(lambda: recording.connected)
        assert recording.services["a"]["a-1"].health is Health.DRAINING
    await database.close()


async def test_what_happens_right_before_the_end_is_written(tmp_path: Path) -> None:
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source):
        stream = await source.register("a", ONE, "", "peer")
        await source.confirmed()
        source.closed(stream)
    await database.close()
    assert rows(tmp_path) == 0


async def test_rows_that_make_no_sense_are_skipped_and_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source):
        await source.register("a", ONE, "", "peer")
    await execute(database, "INSERT INTO leases VALUES ('b', 'x', 'nonsense', x'00', '', 0, '')")
    await database.close()
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source) as recording:
        await recording.until(lambda: recording.connected)
        assert set(recording.services) == {"a"}
        await source.register("a", TWO, "", "peer")
        await source.confirmed()
    await database.close()
    assert rows(tmp_path) == 2
    assert "stored registration x of b is skipped" in caplog.text


async def test_a_broken_stream_is_removed_after_the_grace(database: Database) -> None:
    source = EmbeddedSource(database, lease_grace=0.05)
    async with recorded(source) as recording:
        stream = await source.register("a", ONE, "", "peer")
        source.broken(stream)
        assert recording.ids("a") == {"a-1"}
        await recording.until(lambda: "a" not in recording.services)


async def test_a_stream_that_was_taken_over_has_no_say_any_more(database: Database) -> None:
    source = EmbeddedSource(database)
    async with recorded(source) as recording:
        old = await source.register("a", ONE, "", "peer")
        with pytest.raises(LeaseHeldError):
            await source.register("a", ONE, "wrong", "peer")
        new = await source.register("a", ONE, old.token, "peer")
        assert old.ended.is_set()
        source.update(old, Endpoint("a-1", "10.0.0.9", 80))
        source.broken(old)
        source.closed(old)
        assert recording.services["a"]["a-1"] == ONE
        source.update(new, Endpoint("a-1", "10.0.0.9", 80))
        assert recording.services["a"]["a-1"].address == "10.0.0.9"


async def test_a_store_that_cannot_be_read_at_first_is_read_later(tmp_path: Path) -> None:
    database = Database(tmp_path)
    await execute(database, "ALTER TABLE leases RENAME TO hidden")
    await execute(database, "ALTER TABLE documents RENAME TO covered")
    async with recorded(EmbeddedSource(database)) as leases, recorded(EmbeddedPolicyStore(database)) as policies:
        await leases.until(lambda: "no such table" in leases.detail)
        await policies.until(lambda: "no such table" in policies.detail)
        await execute(database, "ALTER TABLE hidden RENAME TO leases")
        await execute(database, "ALTER TABLE covered RENAME TO documents")
        await leases.until(lambda: leases.connected)
        await policies.until(lambda: policies.connected)
    await database.close()


async def test_a_store_that_cannot_be_written_does_not_stop_registrations(tmp_path: Path) -> None:
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source) as recording:
        await recording.until(lambda: recording.connected)
        await execute(database, "ALTER TABLE leases RENAME TO hidden")
        await source.register("a", ONE, "", "peer")
        await source.confirmed()
        assert recording.ids("a") == {"a-1"}
        await recording.until(lambda: "cannot be stored" in recording.detail)
        await execute(database, "ALTER TABLE hidden RENAME TO leases")
        await recording.until(lambda: recording.connected)
        assert rows(tmp_path) == 1
    await database.close()


async def test_a_store_that_cannot_be_written_at_the_end_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(tmp_path)
    source = EmbeddedSource(database)
    async with recorded(source) as recording:
        stream = await source.register("a", ONE, "", "peer")
        await source.confirmed()
        await execute(database, "DROP TABLE leases")
        source.update(stream, Endpoint("a-1", "10.0.0.9", 80))
        await recording.until(lambda: "cannot be stored" in recording.detail)
    await database.close()
    assert "the last changes of registrations are not stored" in caplog.text


# -- policies


async def test_policies_are_stored_compared_and_deleted(database: Database) -> None:
    store = EmbeddedPolicyStore(database)
    first = await store.put("orders", b"1", "")
    assert await store.get("orders") == first
    with pytest.raises(VersionConflictError, match="expected no policy, but version 1 is stored"):
        await store.put("orders", b"2", "")
    with pytest.raises(VersionConflictError, match="expected version 9, but none is stored"):
        await store.put("payments", b"2", "9")
    second = await store.put("orders", b"2", first.version)
    with pytest.raises(VersionConflictError):
        await store.delete("orders", first.version)
    assert await store.list() == [second]
    await store.delete("orders", second.version)
    with pytest.raises(NotStoredError):
        await store.delete("orders", None)
    assert await store.get("orders") is None


async def test_a_version_is_never_given_twice(database: Database) -> None:
    store = EmbeddedPolicyStore(database)
    first = await store.put("orders", b"1", None)
    await store.delete("orders", None)
    second = await store.put("orders", b"1", None)
    assert first.version != second.version


async def test_policies_of_another_kind_are_others(database: Database) -> None:
    services, edges = EmbeddedPolicyStore(database), EmbeddedPolicyStore(database, EdgePolicy)
    async with recorded(services) as of_services, recorded(edges) as of_edges:
        await of_services.until(lambda: of_services.connected)
        await of_edges.until(lambda: of_edges.connected)
        await services.put("public", b"service: public", "")
        assert await edges.is_fresh()
        with pytest.raises(NotStoredError, match="no policy is stored for edge public"):
            await edges.delete("public", None)
        stored = await edges.put("public", b"edge: public", "")
        assert (stored.version, await edges.get("public"), await edges.list()) == ("1", stored, [stored])
        with pytest.raises(VersionConflictError, match="policy of edge public: expected version 7"):
            await edges.delete("public", "7")
        await services.delete("public", None)
        assert await edges.list() == [stored]
    assert (of_services.policies, of_edges.policies) == ({}, {"public": b"edge: public"})
    assert (services.name, edges.name) == ("embedded-policies", "embedded-edge-policies")


async def test_changes_are_said_in_order_and_stored_policies_at_the_start(database: Database) -> None:
    store = EmbeddedPolicyStore(database)
    before = await store.put("a", b"0", None)
    async with recorded(store) as recording:
        await recording.until(lambda: recording.connected)
        versions = [stored.version for stored in await asyncio.gather(*(store.put("b", b"x", None) for _ in range(20)))]
        await store.delete("b", None)
        said = [event for event in recording.events if isinstance(event, PolicyStored | PolicyDeleted)]
    assert said[0] == PolicyStored("a", b"0", before.version)
    assert [event.stored_version for event in said if isinstance(event, PolicyStored)][1:] == sorted(versions, key=int)
    assert said[-1] == PolicyDeleted("b")


async def test_a_registration_that_comes_while_another_is_written_is_written_too(
    tmp_path: Path, database: Database
) -> None:
    source = EmbeddedSource(database)
    async with recorded(source) as recording:
        await recording.until(lambda: recording.connected)

        async def one(number: int) -> None:
            await source.register("a", Endpoint(f"a-{number}", "10.0.0.1", 80), "", "peer")
            await source.confirmed()
            assert rows(tmp_path) >= 1

        await asyncio.gather(*(one(number) for number in range(50)))
        assert rows(tmp_path) == 50
        abandoned = asyncio.ensure_future(one(99))
        await asyncio.sleep(0)
        abandoned.cancel()
        await one(100)
        assert rows(tmp_path) == 52


async def test_a_write_is_said_even_when_its_caller_gave_up(database: Database) -> None:
    store = EmbeddedPolicyStore(database)
    async with recorded(store) as recording:
        await recording.until(lambda: recording.connected)
        writing = asyncio.ensure_future(store.put("a", b"1", None))
        await asyncio.sleep(0)
        writing.cancel()
        await recording.until(lambda: recording.policies == {"a": b"1"})
