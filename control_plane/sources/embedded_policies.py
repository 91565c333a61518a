"""Policies of the embedded registry, in its SQLite file."""

from __future__ import annotations

import asyncio
import logging
import sqlite3

from control_plane.events import PolicyDeleted, PolicyStored, SourceConnected, SourceLost
from control_plane.sources import (
    EmitPolicy,
    NotStoredError,
    PolicyStoreEvent,
    StoredDocument,
    StoreUnavailableError,
    VersionConflictError,
)
from control_plane.sources.database import Database

_logger = logging.getLogger(__name__)


class EmbeddedPolicyStore:
    """A `PolicyStore` whose versions are numbers that are never given twice, not even after a deletion.

    Args:
        database: shared with the embedded registry.
    """

    name = "embedded-policies"

    def __init__(self, database: Database) -> None:
        self._database = database
        self._emit: EmitPolicy = _ignore
        # Emissions keep the order of the writes: a write and its event are one step.
        self._order = asyncio.Lock()

    async def run(self, emit: EmitPolicy) -> None:
        """Emits every stored document and every change, until cancelled."""
        delay = 0.1
        while True:
            try:
                async with self._order:
                    for stored in await self.list():
                        emit(PolicyStored(stored.service, stored.document, stored.version))
                    self._emit = emit
                break
            except StoreUnavailableError as error:
                _logger.error("stored policies cannot be read: %s", error)
                emit(SourceLost(self.name, str(error)))
                await asyncio.sleep(delay)
                delay = min(2.0 * delay, 5.0)
        emit(SourceConnected(self.name))
        try:
            await asyncio.Event().wait()
        finally:
            self._emit = _ignore

    async def get(self, service: str) -> StoredDocument | None:
        """The stored document, or None.

        Raises:
            StoreUnavailableError: the file cannot be read.
        """
        return await self._database.run(lambda connection: _get(connection, service))

    async def list(self) -> list[StoredDocument]:
        """Every stored document, ordered by service.

        Raises:
            StoreUnavailableError: the file cannot be read.
        """
        return await self._database.run(_list)

    async def is_fresh(self) -> bool:
        """Whether the file has never held a policy: it is a new mesh's, or was begun afresh after a damage.

        Raises:
            StoreUnavailableError: the file cannot be read.
        """
        return await self._database.run(lambda connection: _last_version(connection) == 0)

    async def put(self, service: str, document: bytes, if_version: str | None) -> StoredDocument:
        """Stores a document by compare-and-set.

        Raises:
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: the file cannot be written.
        """
        # A caller that gives up in between must not part a write from its event.
        return await asyncio.shield(self._put(service, document, if_version))

    async def delete(self, service: str, if_version: str | None) -> None:
        """Deletes a document by compare-and-set.

        Raises:
            NotStoredError: there is none.
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: the file cannot be written.
        """
        await asyncio.shield(self._delete(service, if_version))

    async def _put(self, service: str, document: bytes, if_version: str | None) -> StoredDocument:
        async with self._order:
            stored = await self._database.run(lambda connection: _put(connection, service, document, if_version))
            self._emit(PolicyStored(service, stored.document, stored.version))
        return stored

    async def _delete(self, service: str, if_version: str | None) -> None:
        async with self._order:
            await self._database.run(lambda connection: _delete(connection, service, if_version))
            self._emit(PolicyDeleted(service))


def _ignore(_event: PolicyStoreEvent) -> None:
    """Nobody listens while the store does not run."""


def _get(connection: sqlite3.Connection, service: str) -> StoredDocument | None:
    row = connection.execute("SELECT document, version FROM policies WHERE service = ?", (service,)).fetchone()
    return None if row is None else StoredDocument(service, row[0], str(row[1]))


def _last_version(connection: sqlite3.Connection) -> int:
    (version,) = connection.execute("SELECT version FROM last_version").fetchone()
    return int(version)


def _list(connection: sqlite3.Connection) -> list[StoredDocument]:
    rows = connection.execute("SELECT service, document, version FROM policies ORDER BY service")
    return [StoredDocument(service, document, str(version)) for service, document, version in rows]


def _put(connection: sqlite3.Connection, service: str, document: bytes, if_version: str | None) -> StoredDocument:
    _check_version(service, if_version, _get(connection, service))
    connection.execute("UPDATE last_version SET version = version + 1")
    version = _last_version(connection)
    connection.execute("INSERT OR REPLACE INTO policies VALUES (?, ?, ?)", (service, document, version))
    return StoredDocument(service, document, str(version))


def _delete(connection: sqlite3.Connection, service: str, if_version: str | None) -> None:
    stored = _get(connection, service)
    if stored is None:
        raise NotStoredError(service)
    _check_version(service, if_version, stored)
    connection.execute("DELETE FROM policies WHERE service = ?", (service,))


def _check_version(service: str, if_version: str | None, stored: StoredDocument | None) -> None:
    version = stored.version if stored else ""
    if if_version is not None and if_version != version:
        raise VersionConflictError(service, if_version, version)
