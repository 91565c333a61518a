"""The outbox: a table in which events wait for the broker, in a file of its own or in a service's own database.

`OutboxStore` is what the relay needs of it. `SqliteOutbox` keeps it in SQLite, `mesh_client.events.postgres` in
PostgreSQL.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.errors import OutboxAwayError, OutboxFullError
from mesh_client.events.prepared import PreparedEvent
from mesh_client.events.rows import StoredEvent, events_of, next_events

LEASE = 5.0
"""Seconds after which another process takes the relaying over from one that hangs."""

_COLUMNS = "number, id, type, event_key, source, created, schema_version, headers, mandatory, body"

SCHEMA = """
CREATE TABLE IF NOT EXISTS mesh_outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    event_key TEXT NOT NULL,
    source TEXT NOT NULL,
    created REAL NOT NULL,
    schema_version TEXT NOT NULL,
    headers TEXT NOT NULL,
    mandatory INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS mesh_outbox_refused (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    event_key TEXT NOT NULL,
    source TEXT NOT NULL,
    created REAL NOT NULL,
    schema_version TEXT NOT NULL,
    headers TEXT NOT NULL,
    mandatory INTEGER NOT NULL,
    body BLOB NOT NULL,
    why TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS mesh_outbox_size (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    events INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    max_events INTEGER NOT NULL,
    max_bytes INTEGER NOT NULL,
    relay TEXT NOT NULL DEFAULT '',
    relay_until REAL NOT NULL DEFAULT 0
);
INSERT OR IGNORE INTO mesh_outbox_size (one, events, bytes, max_events, max_bytes)
    SELECT 1, count(*), coalesce(sum(length(body)), 0), 100000, 268435456 FROM mesh_outbox;
CREATE TRIGGER IF NOT EXISTS mesh_outbox_full BEFORE INSERT ON mesh_outbox
    WHEN EXISTS (SELECT 1 FROM mesh_outbox_size WHERE events >= max_events OR bytes + length(NEW.body) > max_bytes)
    BEGIN SELECT RAISE(ABORT, 'mesh outbox is full'); END;
CREATE TRIGGER IF NOT EXISTS mesh_outbox_added AFTER INSERT ON mesh_outbox
    BEGIN UPDATE mesh_outbox_size SET events = events + 1, bytes = bytes + length(NEW.body); END;
CREATE TRIGGER IF NOT EXISTS mesh_outbox_removed AFTER DELETE ON mesh_outbox
    BEGIN UPDATE mesh_outbox_size SET events = events - 1, bytes = bytes - length(OLD.body); END;
"""
"""Everything that an outbox in SQLite consists of. Run it again and again: it makes what is not there. The triggers
count what is in it, and refuse what is beyond the bound, also inside a service's own transactions."""

POSTGRES = ("postgresql://", "postgres://")
"""How addresses of outboxes in PostgreSQL begin; others are files of SQLite."""


@dataclass(frozen=True, slots=True)
class OutboxSize:
    """What is in an outbox.

    Attributes:
        events: how many.
        bytes: of all bodies.
        oldest: when the oldest of them was published, seconds since 1970; None when it is empty.
        refused: events that the broker will never take, put aside in ``mesh_outbox_refused``.
        max_events: the bound.
        max_bytes: the bound.
    """

    events: int
    bytes: int
    oldest: float | None
    refused: int
    max_events: int
    max_bytes: int


class OutboxStore(Protocol):
    """An outbox as the bus uses it. Every method is called in one thread of the bus's own, and may block it."""

    @property
    def name(self) -> str:
        """For people: where it is."""

    def open(self, max_events: int, max_bytes: int) -> None:
        """Makes what is not there yet.

        Raises:
            OutboxAwayError: it cannot be used now; the same again may succeed.
            ConfigError: it cannot be used.
        """

    def abort(self) -> None:
        """Ends waits for a database that does not answer. The one method that is called in another thread."""

    def close(self) -> None:
        """Ends the relaying, so that another process may begin at once, and closes what is open."""

    def add(self, events: Sequence[PreparedEvent]) -> list[OutboxFullError | None]:
        """Stores events in one transaction; for each None, or why it was not stored."""

    def lead(self) -> bool:
        """Becomes or stays the one process that relays; False while another one is."""

    def exchange(self, settled: Sequence[int], after: int, limit: int) -> list[StoredEvent]:
        """Deletes those that are settled; returns up to ``limit`` rows beyond ``after``, by growing numbers."""

    def read(self, numbers: Sequence[int]) -> list[StoredEvent]:
        """Rows by their numbers."""

    def refuse(self, number: int, why: str) -> None:
        """Puts aside an event that the broker will never take."""

    def size(self) -> OutboxSize:
        """What is in it."""

    def changed(self) -> bool:
        """Whether somebody has, or may have, written since this was asked last."""

    def busy(self, error: BaseException) -> bool:
        """Whether an error of `add` says that others hold the database, and that it may be tried again."""


class SqliteOutbox:
    """An outbox in SQLite.

    Args:
        path: the file: of its own, or the service's database. Several processes may share it; one of them relays.
        wall_clock: seconds since 1970, the same for all who share it.
    """

    def __init__(self, path: Path, wall_clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = wall_clock
        self._connection: sqlite3.Connection | None = None
        self._relaying: sqlite3.Connection | None = None
        """Its commits are not waited for to be on the disk: what they lose is sent twice, and not lost."""
        self._me = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._version = -1

    @property
    def name(self) -> str:
        """Its path."""
        return str(self._path)

    def open(self, max_events: int, max_bytes: int) -> None:
        """Makes the tables that are not there; see `OutboxStore`."""
        give_up = time.monotonic() + 1.0
        while True:
            try:
                self._connection = _connect(self._path, max_events, max_bytes)
                self._relaying = _open(self._path, "NORMAL")
            except sqlite3.OperationalError as error:
                self.close()
                if not self.busy(error):
                    raise ConfigError(f"outbox: {self._path} cannot be used: {error}") from None
                # Siblings that start at the same moment collide where SQLite does not wait.
                if time.monotonic() > give_up:
                    raise OutboxAwayError(f"outbox: {self._path} cannot be used now: {error}") from None
                time.sleep(0.02)
            except sqlite3.DatabaseError as error:
                self.close()
                raise ConfigError(f"outbox: {self._path} cannot be used: {error}") from None
            else:
                return

    def abort(self) -> None:
        """See `OutboxStore`. SQLite waits for nobody longer than 5 s."""

    def close(self) -> None:
        """See `OutboxStore`."""
        connections, self._connection, self._relaying = (self._relaying, self._connection), None, None
        for connection in connections:
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):  # whoever comes next waits for the lease
                    connection.execute("UPDATE mesh_outbox_size SET relay = '' WHERE relay = ?", (self._me,))
                connection.close()

    def add(self, events: Sequence[PreparedEvent]) -> list[OutboxFullError | None]:
        """See `OutboxStore`."""
        connection, results = self._opened, list[OutboxFullError | None]()
        connection.execute("BEGIN IMMEDIATE")
        try:
            for event in events:
                try:
                    event.store(connection)
                except OutboxFullError as error:
                    results.append(error)
                else:
                    results.append(None)
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return results

    def lead(self) -> bool:
        """See `OutboxStore`."""
        now, connection = self._clock(), self._relays
        (relay, until) = connection.execute("SELECT relay, relay_until FROM mesh_outbox_size").fetchone()
        if relay == self._me:
            if until > now + LEASE / 2:
                return True
        elif relay and now < until <= now + 2 * LEASE and not _died(relay):
            return False
        changed = connection.execute(
            "UPDATE mesh_outbox_size SET relay = ?, relay_until = ? WHERE relay = ? AND relay_until = ?",
            (self._me, now + LEASE, relay, until),
        )
        return changed.rowcount == 1

    def exchange(self, settled: Sequence[int], after: int, limit: int) -> list[StoredEvent]:
        """See `OutboxStore`."""
        connection = self._relays
        if settled:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("DELETE FROM mesh_outbox WHERE number = ?", [(number,) for number in settled])
            connection.execute("COMMIT")
        if limit <= 0:
            return []
        query = f"SELECT {_COLUMNS} FROM mesh_outbox WHERE number > ? ORDER BY number LIMIT ?"  # noqa: S608 - constants
        return next_events(lambda: connection.execute(query, (after, limit)).fetchall(), self.refuse)

    def read(self, numbers: Sequence[int]) -> list[StoredEvent]:
        """See `OutboxStore`."""
        query = f"SELECT {_COLUMNS} FROM mesh_outbox WHERE number = ?"  # noqa: S608 - constants
        rows = [row for number in numbers for row in self._relays.execute(query, (number,))]
        return events_of(rows, self.refuse)

    def refuse(self, number: int, why: str) -> None:
        """See `OutboxStore`."""
        connection = self._relays
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            f"INSERT OR REPLACE INTO mesh_outbox_refused SELECT {_COLUMNS}, ? FROM mesh_outbox"  # noqa: S608 - constants
            " WHERE number = ?",
            (why, number),
        )
        connection.execute("DELETE FROM mesh_outbox WHERE number = ?", (number,))
        connection.execute("COMMIT")

    def size(self) -> OutboxSize:
        """See `OutboxStore`."""
        return read_size(self._relays)

    def changed(self) -> bool:
        """See `OutboxStore`."""
        (version,) = self._relays.execute("PRAGMA data_version").fetchone()
        before, self._version = self._version, version
        return bool(version != before)

    def busy(self, error: BaseException) -> bool:
        """See `OutboxStore`."""
        return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)

    @property
    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ConfigError("outbox: it is not open")
        return self._connection

    @property
    def _relays(self) -> sqlite3.Connection:
        if self._relaying is None:
            raise ConfigError("outbox: it is not open")
        return self._relaying


def explain_full(name: str, size: OutboxSize | None, broker: str, held: int, unroutable: Counter[str]) -> str:
    """Why nothing more can be stored, in words.

    Args:
        name: of the outbox.
        size: what is in it, as far as it is known.
        broker: the connection's state, in words.
        held: events that wait because nobody is subscribed to them.
        unroutable: by type, how often an event was returned for that.
    """
    if size is None:
        return f"the outbox at {name} is full; nothing was stored"
    oldest = 0.0 if size.oldest is None else time.time() - size.oldest
    why = f"; broker: {broker}"
    if held:
        types = ", ".join(f"{type} ({count} times)" for type, count in unroutable.most_common(3))
        why += f"; {held} wait because nobody is subscribed to them: {types}"
    return (
        f"the outbox at {name} is full: {size.events} of {size.max_events} events, {size.bytes} of "
        f"{size.max_bytes} bytes, the oldest for {oldest:.0f} s{why}; nothing was stored"
    )


def read_size(connection: sqlite3.Connection) -> OutboxSize:
    """What is in the outbox of a SQLite file."""
    query = "SELECT events, bytes, max_events, max_bytes FROM mesh_outbox_size"
    events, size, max_events, max_bytes = connection.execute(query).fetchone()
    oldest = connection.execute("SELECT created FROM mesh_outbox ORDER BY number LIMIT 1").fetchone()
    (refused,) = connection.execute("SELECT count(*) FROM mesh_outbox_refused").fetchone()
    return OutboxSize(events, size, oldest and oldest[0], refused, max_events, max_bytes)


def _open(path: Path, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path, max_events: int, max_bytes: int) -> sqlite3.Connection:
    # What `publish` has returned for survives a power cut too. Publishers share transactions, and so the wait.
    connection = _open(path, "FULL")
    try:
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        connection.execute("UPDATE mesh_outbox_size SET max_events = ?, max_bytes = ?", (max_events, max_bytes))
    except BaseException:
        connection.close()
        raise
    return connection


def _died(relay: str) -> bool:
    """Whether the process that relays was on this host and is gone, so that nobody need wait for its lease to end."""
    host, _, rest = relay.partition("/")
    pid = rest.partition("/")[0]
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
