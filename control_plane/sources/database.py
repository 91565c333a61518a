"""The SQLite file of the embedded registry and of its policies: one file, one thread, one writer process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from control_plane.files import lock_directory
from control_plane.sources import StoreUnavailableError
from control_plane.sqlite_file import connect
from mesh_client.core.errors import ConfigError

FILE_NAME = "registry.sqlite"

_SCHEMA = (
    """
CREATE TABLE leases (
    service TEXT NOT NULL,
    endpoint_id TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    token_hash BLOB NOT NULL,
    peer TEXT NOT NULL,
    drained INTEGER NOT NULL,
    PRIMARY KEY (service, endpoint_id)
) WITHOUT ROWID;
CREATE TABLE policies (service TEXT PRIMARY KEY, document BLOB NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE last_version (only INTEGER PRIMARY KEY CHECK (only = 1), version INTEGER NOT NULL);
INSERT INTO last_version VALUES (1, 0);
""",
    # Policies of more than one kind.
    """
CREATE TABLE documents (
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    document BLOB NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE TABLE last_versions (kind TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO documents SELECT 'policies', service, document, version FROM policies;
INSERT INTO last_versions SELECT 'policies', version FROM last_version WHERE version > 0;
DROP TABLE policies;
DROP TABLE last_version;
""",
    # Leases are a workload's.
    """
ALTER TABLE leases ADD COLUMN workload TEXT NOT NULL DEFAULT '';
""",
)

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Database:
    """Runs work on the file ``registry.sqlite`` in a thread of its own, each piece in one transaction.

    A file that SQLite finds damaged is moved aside, with an error in the log, and a fresh one is begun: endpoints come
    back by themselves, and policies at the next start, as far as they were good (`last_good`).

    Args:
        directory: made when missing. None keeps everything in memory.
        lock_timeout: seconds to wait for another process that still has the directory.
    """

    def __init__(self, directory: Path | None, *, lock_timeout: float = 5.0) -> None:
        self._directory = directory
        self._lock_timeout = lock_timeout
        self._lock: IO[bytes] | None = None
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mesh-registry")

    @property
    def path(self) -> Path | None:
        """The file, or None in memory."""
        return None if self._directory is None else self._directory / FILE_NAME

    async def open(self) -> None:
        """Opens the file; `run` does so too when that was not done before.

        Raises:
            ConfigError: the directory cannot be used, another process uses it, or a newer version wrote the file.
        """
        await self._in_thread(self._opened)

    async def run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """What ``work`` returns, after its transaction is committed; it is rolled back when ``work`` raises.

        Raises:
            ConfigError: as `open`.
            StoreUnavailableError: SQLite failed, such as for a full disk.
        """
        return await self._in_thread(partial(self._run, work))

    async def close(self) -> None:
        """Finishes what was asked before, and closes the file. The database cannot be used afterwards."""
        await self._in_thread(self._close)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        # What was asked is done even when nobody waits for it any more: a cancelled future would take its work with it.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            connection = self._opened()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return work(connection)
        except sqlite3.Error as error:
            if _is_damage(error):
                self._move_aside(str(error))
            raise StoreUnavailableError(f"{self.path or 'the database in memory'}: {error}") from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            if self._directory is not None:
                self._take_directory(self._directory)
            try:
                self._connection = self._connect()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise ConfigError(f"{self.path} cannot be used: {error}") from error
                self._move_aside(str(error))
                self._connection = self._connect()
        return self._connection

    def _take_directory(self, directory: Path) -> None:
        if self._lock is not None:
            return
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data directory {directory} cannot be used: {error.strerror}") from error
        self._lock = lock_directory(directory, "registry.lock", self._lock_timeout)

    def _connect(self) -> sqlite3.Connection:
        if self.path is not None:
            _keep_to_ourselves(self.path)
        return connect(self.path, _SCHEMA)

    def _move_aside(self, problem: str) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self.path is None:
            return
        aside = self.path.with_name(f"{FILE_NAME}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns()}")
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(FILE_NAME + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        _logger.error(
            "%s is damaged (%s): moved to %s and begun afresh; instances register again by themselves, see whether "
            "stored policies have to be applied again",
            self.path,
            problem,
            aside.name,
        )

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _keep_to_ourselves(path: Path) -> None:
    """Makes the file for this user alone; who could write it could allow themselves whatever policies forbid."""
    with contextlib.suppress(OSError):  # whatever is wrong, SQLite says so
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if path.stat().st_mode & 0o022:
            raise ConfigError(f"others may write {path}, which holds policies: chmod 600 {path}")


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # Raised by ourselves for a failed check.
        return type(error) is sqlite3.DatabaseError
    return code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
