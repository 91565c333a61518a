"""The SQLite file of join tokens and workloads. Everything that counts is decided within one transaction."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from control_plane.identity.errors import InvalidTokenError, RevokedError, StoreUnavailableError, TooManyTokensError
from control_plane.identity.records import TokenRecord, WorkloadRecord
from control_plane.identity.store_schema import SCHEMA
from control_plane.sqlite_file import connect
from mesh_client.core.errors import ConfigError

FILE_NAME = "identity.sqlite"
MAX_TOKENS = 10_000
"""Join tokens that may be good at once."""
KEEP = 7 * 86_400.0
"""Seconds for which ended tokens and workloads are remembered."""
KEEP_REVOKED = 400 * 86_400.0
"""The same for revoked workloads: a clock that is set forward and back again must not bring them back."""

_INSERT = (
    "INSERT INTO workloads (id, spiffe_id, serial, expires, last_expiry, root, attested_by, trusted, seen_root, key) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_GOOD = "SELECT 1 FROM join_tokens WHERE id = ? AND service = ? AND revoked = 0 AND expires > ?"
_SPEND = (
    "UPDATE join_tokens SET uses_left = uses_left - 1 "
    "WHERE id = ? AND service = ? AND revoked = 0 AND expires > ? AND uses_left > 0"
)
_REVOKED_BY_KEY = "SELECT id FROM workloads WHERE revoked = 1 AND key = ? AND id != ?"
_REVOKED_BY_ATTESTATION = "SELECT id FROM workloads WHERE revoked = 1 AND attested_by = ?"
_REVOKE = {
    "id": "UPDATE workloads SET revoked = 1 WHERE id = ? AND last_expiry > ? RETURNING id",
    "spiffe_id": "UPDATE workloads SET revoked = 1 WHERE spiffe_id = ? AND last_expiry > ? RETURNING id",
}

_T = TypeVar("_T")


class IdentityStore:
    """Runs each operation in one transaction, in a thread of its own.

    A damaged file is refused, not begun afresh: that would forget who was revoked.

    Args:
        directory: the data directory, which is checked and locked already. None keeps everything in memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / FILE_NAME
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mesh-identity")

    async def open(self) -> None:
        """Opens the file.

        Raises:
            ConfigError: it is damaged, others can read it, or a newer version wrote it.
        """
        await self._in_thread(self._open)

    async def close(self) -> None:
        """Finishes what was asked before, and closes the file; not twice."""
        if self._closed:
            return
        self._closed = True
        await self._in_thread(self._close)
        self._thread.shutdown(wait=False)

    async def add_token(self, record: TokenRecord, now: float) -> None:
        """Remembers a new join token.

        Raises:
            TooManyTokensError: there are as many as there may be.
            StoreUnavailableError: SQLite failed.
        """

        def work(connection: sqlite3.Connection) -> None:
            (count,) = connection.execute(
                "SELECT COUNT(*) FROM join_tokens WHERE expires > ? AND revoked = 0", (now,)
            ).fetchone()
            if count >= MAX_TOKENS:
                raise TooManyTokensError(f"there are {count} join tokens: revoke some")
            connection.execute(
                "INSERT INTO join_tokens (id, service, expires, uses, uses_left, created_by) VALUES (?, ?, ?, ?, ?, ?)",
                (record.id, record.service, record.expires, record.uses, record.uses_left, record.created_by),
            )

        await self._run(work)

    async def tokens(self, now: float) -> list[TokenRecord]:
        """Join tokens that have neither ended nor been revoked, by their end.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        return await self._run(
            lambda connection: [
                TokenRecord(*row)
                for row in connection.execute(
                    "SELECT id, service, expires, uses, uses_left, created_by FROM join_tokens "
                    "WHERE expires > ? AND revoked = 0 ORDER BY expires, id",
                    (now,),
                )
            ]
        )

    async def revoke_token(self, token_id: str) -> bool:
        """Makes a join token worthless; whether there was one that was not so already.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        return await self._run(
            lambda connection: (
                connection.execute(
                    "UPDATE join_tokens SET revoked = 1 WHERE id = ? AND revoked = 0", (token_id,)
                ).rowcount
                > 0
            )
        )

    async def join(self, workload: WorkloadRecord, token_id: str, service: str, now: float) -> None:
        """Spends one use of a join token on a workload; none if the same one joined with it before.

        Raises:
            InvalidTokenError: the token is unknown, revoked, ended, spent or for another service.
            RevokedError: the workload, or another one with its key, has been revoked.
            StoreUnavailableError: SQLite failed.
        """

        def work(connection: sqlite3.Connection) -> None:
            _refuse_key(connection, workload)
            key = (token_id, service, now)
            known = connection.execute("SELECT 1 FROM workloads WHERE id = ?", (workload.id,)).fetchone()
            if known is None:
                if connection.execute(_SPEND, key).rowcount != 1:
                    raise InvalidTokenError(f"token {token_id} is unknown, revoked, ended or spent")
                connection.execute(_INSERT, _row(workload))
                return
            if connection.execute(_GOOD, key).fetchone() is None:
                raise InvalidTokenError(f"token {token_id} is unknown, revoked or ended")
            _renew(connection, workload)

        await self._run(work)

    async def add_workload(self, workload: WorkloadRecord) -> None:
        """Remembers a new workload, unless one that was attested by the same token, or has the same key, was revoked.

        Raises:
            RevokedError: there is such a workload; the message says which, and what to do.
            StoreUnavailableError: SQLite failed.
        """

        def work(connection: sqlite3.Connection) -> None:
            _refuse_key(connection, workload)
            found = connection.execute(_REVOKED_BY_ATTESTATION, (workload.attested_by,)).fetchone()
            if found is not None:
                raise RevokedError(
                    f"workload {found[0]}, which joined by {workload.attested_by}, has been revoked, so this token "
                    "attests nobody any more: delete it, and give the workload a new one"
                )
            connection.execute(_INSERT, _row(workload))

        await self._run(work)

    async def note(self, workload: WorkloadRecord) -> None:
        """Remembers with which root a workload was seen, and all of one that was not signed for here.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        statement = f"{_INSERT} ON CONFLICT (id) DO UPDATE SET seen_root = excluded.seen_root"
        await self._run(lambda connection: connection.execute(statement, _row(workload)))

    async def renew(self, workload: WorkloadRecord) -> None:
        """Remembers the newest certificate of a workload, be it known or not.

        What an unknown one was attested by is taken from the record, what a known one has confirmed stays.

        Raises:
            RevokedError: the workload has been revoked.
            StoreUnavailableError: SQLite failed.
        """
        await self._run(partial(_renew, workload=workload))

    async def confirm(self, workload_id: str, bundle_version: str, trusted: Iterable[str]) -> None:
        """Remembers which trust bundle a workload has in force. Unknown ones are ignored.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        await self._run(
            lambda connection: connection.execute(
                "UPDATE workloads SET bundle_version = ?, trusted = ? WHERE id = ?",
                (bundle_version, " ".join(trusted), workload_id),
            )
        )

    async def workloads(self, now: float) -> list[WorkloadRecord]:
        """Workloads whose certificates have not ended, by SPIFFE ID.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        return await self._run(
            lambda connection: [
                WorkloadRecord(
                    id=row[0],
                    spiffe_id=row[1],
                    serial=row[2],
                    expires=row[3],
                    root=row[4],
                    attested_by=row[5],
                    bundle_version=row[6],
                    trusted=frozenset(row[7].split()),
                    seen_root=row[8],
                    revoked=bool(row[9]),
                    key=row[10],
                )
                for row in connection.execute(
                    "SELECT id, spiffe_id, serial, expires, root, attested_by, bundle_version, trusted, "
                    "seen_root, revoked, key "
                    "FROM workloads WHERE expires > ? ORDER BY spiffe_id, id",
                    (now,),
                )
            ]
        )

    async def revoke(self, column: str, value: str, now: float) -> list[str]:
        """Revokes workloads whose certificates have not ended; the ids of those that match, also those revoked before.

        Args:
            column: ``id`` or ``spiffe_id``.
            value: of that column.
            now: seconds since the epoch.

        Raises:
            StoreUnavailableError: SQLite failed.
        """

        def work(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(_REVOKE[column], (value, now))
            return sorted(row[0] for row in rows.fetchall())

        return await self._run(work, durable=True)

    async def revoked(self, now: float) -> frozenset[str]:
        """Ids of revoked workloads some certificate of which has not ended.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        return await self._run(
            lambda connection: frozenset(
                row[0]
                for row in connection.execute("SELECT id FROM workloads WHERE revoked = 1 AND last_expiry > ?", (now,))
            )
        )

    async def unrecorded(self) -> list[WorkloadRecord]:
        """Workloads that were noted beside the control plane, of which its audit record says nothing yet.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        return await self._run(
            lambda connection: [
                WorkloadRecord(*row)
                for row in connection.execute(
                    "SELECT id, spiffe_id, serial, expires, root, attested_by FROM workloads WHERE unrecorded = 1"
                )
            ]
        )

    async def recorded(self, ids: Iterable[str]) -> None:
        """Remembers that they are in the audit record.

        Raises:
            StoreUnavailableError: SQLite failed.
        """
        rows = [(each,) for each in ids]
        await self._run(
            lambda connection: connection.executemany("UPDATE workloads SET unrecorded = 0 WHERE id = ?", rows)
        )

    async def forget(self, now: float) -> None:
        """Forgets what ended long ago.

        Raises:
            StoreUnavailableError: SQLite failed.
        """

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM join_tokens WHERE expires <= ?", (now - KEEP,))
            connection.execute("DELETE FROM workloads WHERE revoked = 0 AND last_expiry <= ?", (now - KEEP,))
            connection.execute("DELETE FROM workloads WHERE last_expiry <= ?", (now - KEEP_REVOKED,))

        await self._run(work)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        # What was begun is finished even when nobody waits for it any more.
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    async def _run(self, work: Callable[[sqlite3.Connection], _T], *, durable: bool = False) -> _T:
        if self._closed:
            raise StoreUnavailableError("the identity store is closed")
        return await self._in_thread(partial(self._transaction, work, durable))

    def _transaction(self, work: Callable[[sqlite3.Connection], _T], durable: bool) -> _T:
        connection = self._connection
        if connection is None:
            raise StoreUnavailableError("the identity store is not open")
        try:
            # FULL has the transaction on the disk, and with it all before it.
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return work(connection)
        except sqlite3.Error as error:
            raise StoreUnavailableError(f"{self._path or 'the identity store'}: {error}") from error

    def _open(self) -> None:
        if self._path is not None:
            _check_file(self._path)
        try:
            # After a power cut a use of a token could be spent twice. Revocations are made sure of, see `revoke`.
            self._connection = connect(self._path, SCHEMA)
        except sqlite3.Error as error:
            raise ConfigError(
                f"{self._path} is damaged ({error}). It holds join tokens and who was revoked: restore it, or move it "
                "away, which makes every join token worthless and forgets revocations"
            ) from None

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def note_beside(data_dir: Path, workload: WorkloadRecord) -> None:
    """Remembers a workload in the file of a control plane that may be running, which then records it.

    Raises:
        ConfigError: the file is not there or cannot be used.
    """
    path = data_dir / FILE_NAME
    if not path.exists():
        raise ConfigError(f"{path} is not there: start the control plane first")
    _check_file(path)
    try:
        with contextlib.closing(connect(path, SCHEMA)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_INSERT, _row(workload))
            connection.execute("UPDATE workloads SET unrecorded = 1 WHERE id = ?", (workload.id,))
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be used: {error}") from None


def _row(workload: WorkloadRecord) -> tuple[object, ...]:
    return (
        workload.id,
        workload.spiffe_id,
        workload.serial,
        workload.expires,
        workload.expires,
        workload.root,
        workload.attested_by,
        " ".join(sorted(workload.trusted)),
        workload.seen_root,
        workload.key,
    )


def _refuse_key(connection: sqlite3.Connection, workload: WorkloadRecord) -> None:
    """A join with a key of another workload that was revoked; the same workload is known by its id."""
    found = connection.execute(_REVOKED_BY_KEY, (workload.key, workload.id)).fetchone() if workload.key else None
    if found is not None:
        raise RevokedError(f"workload {found[0]}, which has this key, has been revoked: make a new key")


def _renew(connection: sqlite3.Connection, workload: WorkloadRecord) -> None:
    done = connection.execute(
        f"{_INSERT} ON CONFLICT (id) DO UPDATE SET serial = excluded.serial, expires = excluded.expires, "
        "last_expiry = MAX(last_expiry, excluded.expires), root = excluded.root, key = excluded.key "
        "WHERE revoked = 0 AND spiffe_id = excluded.spiffe_id",
        _row(workload),
    )
    if done.rowcount != 1:
        raise RevokedError(f"workload {workload.id} has been revoked")


def _check_file(path: Path) -> None:
    """Makes the file with mode 0600, or checks one that is there; SQLite gives its other files the same mode."""
    try:
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        for part in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
            with contextlib.suppress(FileNotFoundError):
                found = part.lstat()
                if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
                    raise ConfigError(f"{part} is not a file of this user")
                if found.st_mode & 0o077:
                    raise ConfigError(f"others may read or write {part}: chmod 600 {part}")
    except OSError as error:
        raise ConfigError(f"{path} cannot be used: {error.strerror}") from None
