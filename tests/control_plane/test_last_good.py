"""Policies that were good outlive a restart of the control plane; files that were not are done without."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from control_plane.events import PolicyDeleted, PolicyStored, SourceConnected
from control_plane.sources import StoreUnavailableError
from control_plane.sources.database import Database
from control_plane.sources.embedded_policies import EmbeddedPolicyStore
from control_plane.sources.last_good import LastGoodPolicies
from mesh_client.core.edge_policy import EdgePolicy
from tests.control_plane.recording import Recording, recorded

FILE_NAME = "last-good-policies.json"
GOOD = b"service: orders\ntimeout: 1s\n"
BETTER = b"service: orders\ntimeout: 2s\n"
BAD = b"service: orders\ntimeout: never\n"
CONNECTED = SourceConnected("embedded-policies")


@asynccontextmanager
async def stored(**documents: bytes) -> AsyncIterator[EmbeddedPolicyStore]:
    """A store that holds these, whatever it held before."""
    database = Database(None)
    await database.open()
    try:
        store = EmbeddedPolicyStore(database)
        for service, document in documents.items():
            await store.put(service, document, None)
        yield store
    finally:
        await database.close()


async def events(directory: Path, **documents: bytes) -> list[object]:
    """What a control plane is told when it starts and these are stored."""
    async with stored(**documents) as store, recorded(LastGoodPolicies(store, directory)) as recording:
        await recording.until(lambda: recording.connected)
        return list(recording.events)


async def test_a_bad_policy_that_is_stored_at_the_start_follows_the_good_one_of_before(tmp_path: Path) -> None:
    await events(tmp_path, orders=GOOD)
    told = await events(tmp_path, orders=BAD)
    assert told == [PolicyStored("orders", GOOD, ""), PolicyStored("orders", BAD, "1"), CONNECTED]
    assert (await events(tmp_path, orders=BAD))[0] == PolicyStored("orders", GOOD, "")


async def test_a_policy_that_was_deleted_meanwhile_is_deleted(tmp_path: Path) -> None:
    await events(tmp_path, orders=GOOD, payments=b"service: payments")
    told = await events(tmp_path, payments=b"service: payments")
    assert told[-2:] == [PolicyDeleted("orders"), CONNECTED]
    assert await events(tmp_path) == [
        PolicyStored("payments", b"service: payments", ""),
        PolicyDeleted("payments"),
        CONNECTED,
    ]
    assert await events(tmp_path) == [CONNECTED]


async def test_it_goes_by_the_name_of_its_store(tmp_path: Path) -> None:
    async with stored() as store:
        assert LastGoodPolicies(store, tmp_path).name == "embedded-policies"


async def test_changes_are_kept_while_it_runs(tmp_path: Path) -> None:
    async with stored(orders=GOOD) as store:
        policies = LastGoodPolicies(store, tmp_path)
        async with recorded(policies) as recording:
            await recording.until(lambda: recording.connected)
            for document in (BETTER, BAD):
                await policies.put("orders", document, None)
            await written(tmp_path, recording, "2s")
            await policies.put("payments", b"service: payments", "")
            await policies.delete("orders", None)
            assert await policies.get("orders") is None
            (left,) = await policies.list()
            assert left.name == "payments"
    assert (await events(tmp_path))[0] == PolicyStored("payments", b"service: payments", "")


async def written(directory: Path, recording: Recording, text: str) -> None:
    """Returns when the file says this."""
    async with asyncio.timeout(20.0):
        while not (directory / FILE_NAME).exists() or text not in (directory / FILE_NAME).read_text():
            await asyncio.sleep(0.005)
    assert recording.connected


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff", b"7", b'{"orders": "\\ud800"}'], ids=["empty", "list", "binary", "number", "text"]
)
async def test_a_damaged_file_is_done_without(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    assert await events(tmp_path, orders=GOOD) == [PolicyStored("orders", GOOD, "1"), CONNECTED]
    assert f"{FILE_NAME} is ignored" in caplog.text
    assert (await events(tmp_path))[0] == PolicyStored("orders", GOOD, "")


async def test_what_is_not_good_any_more_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"orders": "service: orders\\ntimeout: never", "No Name": "", "payments": 7}')
    assert await events(tmp_path) == [CONNECTED]


async def test_a_directory_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert await events(tmp_path / "file", orders=GOOD) == [PolicyStored("orders", GOOD, "1"), CONNECTED]
    assert "cannot be kept" in caplog.text
    (tmp_path / FILE_NAME).mkdir()
    assert await events(tmp_path, orders=GOOD) == [PolicyStored("orders", GOOD, "1"), CONNECTED]
    assert {path.name for path in tmp_path.iterdir()} == {"file", FILE_NAME}


async def test_what_was_good_is_stored_again_in_a_file_that_was_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a damaged file would open to everybody what policies had closed."""
    await events(tmp_path, orders=GOOD)
    async with (
        stored() as store,
        recorded(LastGoodPolicies(store, tmp_path, store.is_fresh)) as recording,
    ):
        await recording.until(lambda: recording.connected)
        assert recording.events == [PolicyStored("orders", GOOD, ""), PolicyStored("orders", GOOD, "1"), CONNECTED]
        assert await store.get("orders") is not None
        assert "embedded-policies were lost: those that were good before are stored again (orders)" in caplog.text
        await store.delete("orders", None)
        assert not await store.is_fresh()
    # A deletion is one: the file has held policies.
    assert await events(tmp_path) == [CONNECTED]


async def both(directory: Path, edge: bytes | None = None) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What a control plane whose file was lost knows of policies of both kinds, once it has stored this one."""
    database = Database(None)
    await database.open()
    services, edges = EmbeddedPolicyStore(database), EmbeddedPolicyStore(database, EdgePolicy)
    async with (
        recorded(LastGoodPolicies(services, directory, services.is_fresh)) as of_services,
        recorded(LastGoodPolicies(edges, directory, edges.is_fresh)) as of_edges,
    ):
        await of_services.until(lambda: of_services.connected)
        await of_edges.until(lambda: of_edges.connected)
        if edge is not None:
            await edges.put("public", edge, "")
    await database.close()
    return of_services.policies, of_edges.policies


async def test_policies_of_edges_are_kept_beside_and_come_back_too(tmp_path: Path) -> None:
    edge = b"edge: public\nservices: {a.B: {upstream: b}}\n"
    await events(tmp_path, orders=GOOD)
    assert await both(tmp_path, edge) == ({"orders": GOOD}, {"public": edge})
    assert await both(tmp_path) == ({"orders": GOOD}, {"public": edge})
    assert {path.name for path in tmp_path.iterdir()} == {FILE_NAME, "last-good-edge-policies.json"}


async def test_a_store_that_cannot_say_whether_it_was_lost_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control_plane.sources.last_good.RETRY_DELAY", 0.0)
    await events(tmp_path, orders=GOOD)
    asked = 0
    async with stored() as store:

        async def is_fresh() -> bool:
            nonlocal asked
            asked += 1
            if asked == 1:
                raise StoreUnavailableError("the disk is away")
            return await store.is_fresh()

        async with recorded(LastGoodPolicies(store, tmp_path, is_fresh)) as recording:
            await recording.until(lambda: recording.connected)
            assert PolicyStored("orders", GOOD, "1") in recording.events
    assert asked == 2
