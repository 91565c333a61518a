"""A SQLite file that all instances of one service share."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")

BUSY_TIMEOUT = 5.0
"""Seconds that a transaction waits for its turn while other instances write."""


class Database:
    """Runs short transactions in a thread of its own, so that the event loop never waits for the disk.

    Write-ahead logging lets instances read while one writes. A transaction that was begun is finished even when the
    coroutine that waits for it is cancelled: what is in the file is always whole.

        async with Database(path, SCHEMA) as database:
            await database.write(lambda connection: connection.execute("INSERT ..."))
    """

    def __init__(self, path: Path, schema: str) -> None:
        """``schema`` is run by each instance at its start, so it creates only what is not there."""
        self._path = path
        self._schema = schema
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._connection: sqlite3.Connection | None = None

    async def __aenter__(self) -> Self:
        self._connection = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._opened().close)
        self._thread.shutdown(wait=False)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What ``work`` returns, run on one consistent view of the file."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._transaction, "BEGIN", work)

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What ``work`` returns, run alone: all of its writes happen or, when it raises, none."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._transaction, "BEGIN IMMEDIATE", work
        )

    def _transaction(self, begin: str, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._opened()
        connection.execute(begin)
        try:
            result = work(connection)
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return result

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("the database is not open; use `async with`")
        return self._connection

    def _open(self) -> sqlite3.Connection:
        give_up = time.monotonic() + BUSY_TIMEOUT
        while True:
            connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
            connection.row_factory = sqlite3.Row
            try:
                # Siblings that start at the same moment collide here, and SQLite does not wait its timeout for this.
                connection.execute("PRAGMA journal_mode = WAL")
                # With WAL this loses nothing when a process is killed, only when the whole machine is.
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.executescript(f"BEGIN IMMEDIATE; {self._schema} COMMIT;")
            except sqlite3.OperationalError:
                connection.close()
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.02)
            else:
                return connection
