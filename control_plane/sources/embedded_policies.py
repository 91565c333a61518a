"""Policies of the embedded registry, in its SQLite file."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from dataclasses import dataclass

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
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import Policy

_logger = logging.getLogger(__name__)


class EmbeddedPolicyStore:
    """A `PolicyStore` whose versions are numbers that are never given twice, not even after a deletion.

    Args:
        database: shared with the embedded registry.
        kind: of policy.
    """

    def __init__(self, database: Database, kind: type[Policy] = ServicePolicy) -> None:
        self._database = database
        self.kind = kind
        self.name = f"embedded-{kind.STORED_AS}"
        self._table = _Table(kind)
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
                        emit(PolicyStored(stored.name, stored.document, stored.version))
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

    async def get(self, name: str) -> StoredDocument | None:
        """The stored document, or None.

        Raises:
            StoreUnavailableError: the file cannot be read.
        """
        return await self._database.run(lambda connection: self._table.get(connection, name))

    async def list(self) -> list[StoredDocument]:
        """Every stored document, ordered by name.

        Raises:
            StoreUnavailableError: the file cannot be read.
        """
        return await self._database.run(self._table.list)

    async def is_fresh(self) -> bool:
        """Whether the file has never held a policy: it is a new mesh's, or was begun afresh after a damage.

        Raises:
            StoreUnavailableError: the file cannot be read.
        """
        return await self._database.run(lambda connection: self._table.last_version(connection) == 0)

    async def put(self, name: str, document: bytes, if_version: str | None) -> StoredDocument:
        """Stores a document by compare-and-set.

        Raises:
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: the file cannot be written.
        """
        # A caller that gives up in between must not part a write from its event.
        return await asyncio.shield(self._put(name, document, if_version))

    async def delete(self, name: str, if_version: str | None) -> None:
        """Deletes a document by compare-and-set.

        Raises:
            NotStoredError: there is none.
            VersionConflictError: another version is stored; nothing is changed.
            StoreUnavailableError: the file cannot be written.
        """
        await asyncio.shield(self._delete(name, if_version))

    async def _put(self, name: str, document: bytes, if_version: str | None) -> StoredDocument:
        async with self._order:
            stored = await self._database.run(
                lambda connection: self._table.put(connection, name, document, if_version)
            )
            self._emit(PolicyStored(name, stored.document, stored.version))
        return stored

    async def _delete(self, name: str, if_version: str | None) -> None:
        async with self._order:
            await self._database.run(lambda connection: self._table.delete(connection, name, if_version))
            self._emit(PolicyDeleted(name))


def _ignore(_event: PolicyStoreEvent) -> None:
    """Nobody listens while the store does not run."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The documents of one kind, within a transaction."""

    kind: type[Policy]

    def get(self, connection: sqlite3.Connection, name: str) -> StoredDocument | None:
        row = connection.execute(
            "SELECT document, version FROM documents WHERE kind = ? AND name = ?", (self.kind.STORED_AS, name)
        ).fetchone()
        return None if row is None else StoredDocument(name, row[0], str(row[1]))

    def list(self, connection: sqlite3.Connection) -> list[StoredDocument]:
        rows = connection.execute(
            "SELECT name, document, version FROM documents WHERE kind = ? ORDER BY name", (self.kind.STORED_AS,)
        )
        return [StoredDocument(name, document, str(version)) for name, document, version in rows]

    def put(self, connection: sqlite3.Connection, name: str, document: bytes, if_version: str | None) -> StoredDocument:
        self._check_version(name, if_version, self.get(connection, name))
        connection.execute(
            "INSERT INTO last_versions VALUES (?, 1) ON CONFLICT (kind) DO UPDATE SET version = version + 1",
            (self.kind.STORED_AS,),
        )
        version = self.last_version(connection)
        row = (self.kind.STORED_AS, name, document, version)
        connection.execute("INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?)", row)
        return StoredDocument(name, document, str(version))

    def delete(self, connection: sqlite3.Connection, name: str, if_version: str | None) -> None:
        stored = self.get(connection, name)
        if stored is None:
            raise NotStoredError(self.kind, name)
        self._check_version(name, if_version, stored)
        connection.execute("DELETE FROM documents WHERE kind = ? AND name = ?", (self.kind.STORED_AS, name))

    def last_version(self, connection: sqlite3.Connection) -> int:
        row = connection.execute("SELECT version FROM last_versions WHERE kind = ?", (self.kind.STORED_AS,)).fetchone()
        return int(row[0]) if row else 0

    def _check_version(self, name: str, if_version: str | None, stored: StoredDocument | None) -> None:
        version = stored.version if stored else ""
        if if_version is not None and if_version != version:
            raise VersionConflictError(self.kind, name, if_version, version)
