"""Settings, logs and the shared file."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest

from services.common.database import Database
from services.common.settings import Settings

SCHEMA = "CREATE TABLE IF NOT EXISTS things (name TEXT PRIMARY KEY);"


def insert(name: str, connection: sqlite3.Connection) -> None:
    connection.execute("INSERT INTO things VALUES (?)", (name,))


def names(connection: sqlite3.Connection) -> list[str]:
    return [row["name"] for row in connection.execute("SELECT name FROM things ORDER BY name")]


async def test_many_instances_open_one_new_file_at_once_and_all_write(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        databases = await asyncio.gather(
            *(stack.enter_async_context(Database(tmp_path / "file.sqlite", SCHEMA)) for _ in range(8))
        )
        await asyncio.gather(*(database.write(partial(insert, str(index))) for index, database in enumerate(databases)))
        assert await databases[0].read(names) == [str(index) for index in range(8)]


async def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def work(connection: sqlite3.Connection) -> None:
        insert("half", connection)
        raise LookupError

    async with Database(tmp_path / "file.sqlite", SCHEMA) as database:
        with pytest.raises(LookupError):
            await database.write(work)
        assert await database.read(names) == []


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.sqlite"
    path.write_bytes(b"something else" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        async with Database(path, SCHEMA):
            pass


async def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        async with Database(tmp_path / "no" / "such" / "file", SCHEMA):
            pass


async def test_opening_waits_for_a_sibling_that_holds_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.sqlite"
    sibling = sqlite3.connect(path, isolation_level=None)
    sibling.execute("BEGIN EXCLUSIVE")
    database = Database(path, SCHEMA)
    opening = asyncio.create_task(database.__aenter__())
    done, _ = await asyncio.wait({opening}, timeout=0.1)
    assert not done
    sibling.close()
    await opening
    async with database:
        assert await database.read(names) == []


async def test_a_file_that_stays_locked_is_given_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.database.BUSY_TIMEOUT", 0.05)
    path = tmp_path / "file.sqlite"
    sibling = sqlite3.connect(path, isolation_level=None)
    sibling.execute("BEGIN EXCLUSIVE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        async with Database(path, SCHEMA):
            pass
    sibling.close()


async def test_a_database_that_is_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Database(tmp_path / "file.sqlite", SCHEMA).read(names)


def test_settings_have_defaults() -> None:
    settings = Settings.from_environment("orders", {})
    assert settings == Settings(Path("orders.sqlite"), "127.0.0.1:0", f"orders-{os.getpid()}", 1)


def test_settings_come_from_the_environment() -> None:
    environment = {
        "SHOP_DATABASE": "/data/shop.sqlite",
        "SHOP_ADDRESS": "127.0.0.1:7000",
        "SHOP_INSTANCE": "orders-7",
        "SHOP_WEIGHT": "3",
    }
    settings = Settings.from_environment("orders", environment)
    assert settings == Settings(Path("/data/shop.sqlite"), "127.0.0.1:7000", "orders-7", 3)


@pytest.mark.parametrize("weight", ["0", "1001", "-1", "many", ""])
def test_a_bad_weight_is_refused_by_name(weight: str) -> None:
    with pytest.raises(ValueError, match="SHOP_WEIGHT"):
        Settings.from_environment("orders", {"SHOP_WEIGHT": weight})
