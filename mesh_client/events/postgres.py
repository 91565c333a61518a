"""The outbox in PostgreSQL, version 12 or newer. Needs the ``postgres`` extra (psycopg).

>>> bus = mesh.events(outbox=PostgresOutbox("postgresql://orders@db/orders"))

    event = bus.prepare(OrderPlaced(order_id=id), key=id)
    with connection.transaction():  # psycopg
        connection.execute("INSERT INTO orders ...")
        store(connection, event)
    bus.stored()

`INSERT`, with the event's ``parameters``, does the same through any other driver.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.errors import OutboxAwayError, OutboxFullError
from mesh_client.events import inbox
from mesh_client.events.event import Event
from mesh_client.events.outbox import LEASE, OutboxSize
from mesh_client.events.prepared import PreparedEvent
from mesh_client.events.rows import StoredEvent, events_of, next_events

INSERT = (
    "INSERT INTO mesh_outbox (id, type, event_key, source, created, schema_version, headers, mandatory, body)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)"
)
"""Values are `PreparedEvent.parameters`."""

_EVENT = """
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    event_key TEXT NOT NULL,
    source TEXT NOT NULL,
    created DOUBLE PRECISION NOT NULL,
    schema_version TEXT NOT NULL,
    headers TEXT NOT NULL,
    mandatory INTEGER NOT NULL,
    body BYTEA NOT NULL"""

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS mesh_outbox (
    number BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,{_EVENT}
);
CREATE TABLE IF NOT EXISTS mesh_outbox_refused (
    number BIGINT PRIMARY KEY,{_EVENT},
    why TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS mesh_outbox_state (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    is_full BOOLEAN NOT NULL DEFAULT false,
    relay TEXT NOT NULL DEFAULT '',
    relay_until DOUBLE PRECISION NOT NULL DEFAULT 0
);
INSERT INTO mesh_outbox_state (one) VALUES (1) ON CONFLICT DO NOTHING;
CREATE OR REPLACE FUNCTION mesh_outbox_check() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM mesh_outbox_state WHERE is_full) THEN
        RAISE EXCEPTION 'mesh outbox is full' USING ERRCODE = 'configuration_limit_exceeded';
    END IF;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS mesh_outbox_full ON mesh_outbox;
CREATE TRIGGER mesh_outbox_full BEFORE INSERT ON mesh_outbox FOR EACH STATEMENT EXECUTE FUNCTION mesh_outbox_check();
"""  # noqa: S608 - constants
"""Everything that an outbox in PostgreSQL consists of. The bus runs it when it is not there; to run it with migrations
is as good, and then its user needs no right to create.

Unlike in SQLite nothing counts within transactions: they would wait for each other. The bus counts, and the trigger
refuses what comes after it has found that there is no room."""

INBOX_SCHEMA = inbox.SCHEMA.replace(" REAL ", " DOUBLE PRECISION ")
INBOX_INSERT = inbox.INSERT.replace("?", "%s")

RECOUNT = 0.5
"""Seconds for which a count of many events is good."""
MANY = 1_000
"""Events that are counted each time that somebody asks."""
LOOK = 1.0
"""Seconds after which the table is read whether it seems to have changed or not."""
CONNECT_TIMEOUT = 5
STATEMENT_TIMEOUT = "10s"

_COLUMNS = "number, id, type, event_key, source, created, schema_version, headers, mandatory, body"
_LOCK = 0x6D657368  # "mesh": two that make the tables at once collide
_NOW = "extract(epoch from clock_timestamp())::double precision"
_FULL = "the outbox is full: the broker takes no events, or nobody is subscribed to them; nothing was stored"

Connection = psycopg.Connection[Any]


def store(connection: Connection, event: PreparedEvent) -> None:
    """Stores an event within the transaction that the connection is in: with everything else in it, or not at all.

    Raises:
        OutboxFullError: the outbox is full. The transaction has failed, as after any error in PostgreSQL.
        psycopg.Error: anything else that PostgreSQL says.
    """
    try:
        connection.execute(INSERT, event.parameters)
    except psycopg.errors.ConfigurationLimitExceeded:
        raise OutboxFullError(_FULL) from None


def first_time(connection: Connection, event: Event[Any]) -> bool:
    """`mesh_client.events.inbox.first_time`, for a table made by `INBOX_SCHEMA`."""
    return connection.execute(INBOX_INSERT, inbox.parameters(event)).rowcount == 1


class PostgresOutbox:
    """An outbox in PostgreSQL.

    Args:
        conninfo: libpq's, such as ``postgresql://user@host/database``. Passwords are better in a ``passfile``.
    """

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        try:
            parts = conninfo_to_dict(conninfo)
        except psycopg.Error as error:
            raise ConfigError(f"outbox: it is no address of PostgreSQL: {_words(error)}") from None
        port = f":{parts['port']}" if "port" in parts else ""
        self._name = f"postgresql://{parts.get('host', '')}{port}/{parts.get('dbname', '')}"
        self._me = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
        self._bounds = (0, 0)
        self._writing: Connection | None = None
        self._relaying: Connection | None = None
        """Its commits are not waited for to be on the disk: what they lose is sent twice, and not lost."""
        self._known: set[int] = set()
        """Numbers that were returned and have not been settled: others may be committed late, with a lower number."""
        self._size: OutboxSize | None = None
        self._counted_at = self._looked_at = 0.0

    @property
    def name(self) -> str:
        """Its address, without user and password."""
        return self._name

    def open(self, max_events: int, max_bytes: int) -> None:
        """Makes the tables that are not there; see `OutboxStore`."""
        self._bounds = max_events, max_bytes
        with self._usable(opens=True):
            connection = self._writes
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
                row = connection.execute(
                    "SELECT count(to_regclass(name)) FROM unnest(%s::text[]) AS name",
                    (["mesh_outbox", "mesh_outbox_refused", "mesh_outbox_state"],),
                ).fetchone()
                if row is None or row[0] < 3:
                    connection.execute(SCHEMA)
            self._count()

    def abort(self) -> None:
        """See `OutboxStore`. A server that hangs takes what it is sent, so nothing but the client can end the wait."""
        for connection in (self._relaying, self._writing):
            if connection is not None and not connection.closed:
                with (
                    contextlib.suppress(psycopg.Error, OSError),
                    socket.socket(fileno=os.dup(connection.fileno())) as its,
                ):
                    its.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `OutboxStore`."""
        connections, self._writing, self._relaying = (self._relaying, self._writing), None, None
        for connection in connections:
            if connection is not None:
                with contextlib.suppress(psycopg.Error):  # whoever comes next waits for the lease
                    connection.execute("UPDATE mesh_outbox_state SET relay = '' WHERE relay = %s", (self._me,))
                connection.close()

    def add(self, events: Sequence[PreparedEvent]) -> list[OutboxFullError | None]:
        """See `OutboxStore`."""
        max_events, max_bytes = self._bounds
        new = sum(len(event.body) for event in events)
        size = self._counted()
        if size.events + len(events) > max_events or size.bytes + new > max_bytes:
            size = self._count()
        count, held = size.events, size.bytes
        results: list[OutboxFullError | None] = []
        fitting: list[PreparedEvent] = []
        for event in events:
            if count >= max_events or held + len(event.body) > max_bytes:
                results.append(OutboxFullError(_FULL))
                continue
            results.append(None)
            fitting.append(event)
            count, held = count + 1, held + len(event.body)
        if fitting:
            connection = self._writes
            try:
                with connection.transaction(), connection.cursor() as cursor:
                    cursor.executemany(INSERT, [event.parameters for event in fitting])
            except psycopg.errors.ConfigurationLimitExceeded:
                return [OutboxFullError(_FULL) for _ in events]
            self._size = OutboxSize(count, held, size.oldest or fitting[0].envelope.time, size.refused, *self._bounds)
        return results

    def lead(self) -> bool:
        """See `OutboxStore`."""
        with self._usable():
            done = self._relays.execute(
                f"UPDATE mesh_outbox_state SET relay = %(me)s, relay_until = {_NOW} + %(lease)s"  # noqa: S608 - constants
                f" WHERE relay IN (%(me)s, '') OR relay_until NOT BETWEEN {_NOW} AND {_NOW} + 2 * %(lease)s",
                {"me": self._me, "lease": LEASE},
            )
            return done.rowcount == 1

    def exchange(self, settled: Sequence[int], after: int, limit: int) -> list[StoredEvent]:
        """See `OutboxStore`."""
        with self._usable():
            connection = self._relays
            if settled:
                connection.execute("DELETE FROM mesh_outbox WHERE number = ANY(%s)", (list(settled),))
                self._known.difference_update(settled)
                self._left(len(settled))
            if limit <= 0:
                return []
            if not after:  # whoever asks knows nothing
                self._known.clear()
            found = connection.execute("SELECT number FROM mesh_outbox WHERE number <= %s", (after,)).fetchall()
            there = {number for (number,) in found}
            late = sorted(there - self._known)[:limit]
            rows = self.read(late) if late else []
            query = f"SELECT {_COLUMNS} FROM mesh_outbox WHERE number > %s ORDER BY number LIMIT %s"  # noqa: S608 - constants
            room = limit - len(rows)
            rows += next_events(lambda: connection.execute(query, (after, room)).fetchall(), self.refuse)
            self._known &= there  # somebody may have deleted some
            self._known.update(row.number for row in rows)
            return rows

    def read(self, numbers: Sequence[int]) -> list[StoredEvent]:
        """See `OutboxStore`."""
        query = f"SELECT {_COLUMNS} FROM mesh_outbox WHERE number = ANY(%s) ORDER BY number"  # noqa: S608 - constants
        with self._usable():
            rows = self._relays.execute(query, (list(numbers),)).fetchall()
            return events_of(rows, self.refuse)

    def refuse(self, number: int, why: str) -> None:
        """See `OutboxStore`."""
        with self._usable(), self._relays.transaction():
            self._relays.execute(
                f"INSERT INTO mesh_outbox_refused SELECT {_COLUMNS}, %s FROM mesh_outbox WHERE number = %s"  # noqa: S608 - constants
                " ON CONFLICT (number) DO NOTHING",
                (why, number),
            )
            self._relays.execute("DELETE FROM mesh_outbox WHERE number = %s", (number,))
            self._known.discard(number)

    def size(self) -> OutboxSize:
        """See `OutboxStore`."""
        with self._usable():
            return self._counted()

    def changed(self) -> bool:
        """See `OutboxStore`."""
        now = time.monotonic()
        if now >= self._looked_at + LOOK:
            self._looked_at = now
            return True
        with self._usable():
            more = self._relays.execute("SELECT FROM mesh_outbox LIMIT 1 OFFSET %s", (len(self._known),))
            return more.fetchone() is not None

    def busy(self, error: BaseException) -> bool:
        """See `OutboxStore`. A server that is away may be back in time."""
        return isinstance(error, psycopg.OperationalError)

    # -- within

    def _counted(self) -> OutboxSize:
        """What is in it; of much, what was a moment ago."""
        size = self._size
        if size is None or size.events <= MANY or time.monotonic() >= self._counted_at + RECOUNT:
            return self._count()
        return size

    def _count(self) -> OutboxSize:
        self._size = size = _read(self._writes, *self._bounds)
        full = size.events >= size.max_events or size.bytes >= size.max_bytes
        self._writes.execute("UPDATE mesh_outbox_state SET is_full = %s WHERE is_full <> %s", (full, full))
        self._counted_at = time.monotonic()
        return size

    def _left(self, count: int) -> None:
        """So many have left it."""
        size = self._size
        if size is None:
            return
        if size.events >= size.max_events or size.bytes >= size.max_bytes:
            self._count()  # there is room again
        else:
            self._size = OutboxSize(
                max(0, size.events - count), size.bytes, size.oldest, size.refused, size.max_events, size.max_bytes
            )

    @contextlib.contextmanager
    def _usable(self, *, opens: bool = False) -> Iterator[None]:
        """What PostgreSQL says becomes an error that says it in words."""
        try:
            yield
        except psycopg.Error as error:
            if opens and self.busy(error) and not _REFUSED.search(str(error)):
                raise OutboxAwayError(f"outbox: {self._name} cannot be used now: {_words(error)}") from None
            raise ConfigError(f"outbox: {self._name} cannot be used: {_words(error)}") from None

    @property
    def _writes(self) -> Connection:
        if self._writing is None or self._writing.closed:
            self._writing = self._connect()
        return self._writing

    @property
    def _relays(self) -> Connection:
        if self._relaying is None or self._relaying.closed:
            self._relaying = self._connect()
            self._relaying.execute("SET synchronous_commit = off")
        return self._relaying

    def _connect(self) -> Connection:
        return _connect(self._conninfo)


_REFUSED = re.compile(r"FATAL:\s++(?!the database system|sorry, too many|remaining connection|terminating)")
"""Of those that connect: a wrong password, or a database that there is not. Another attempt is of no use."""


def read_size(conninfo: str) -> OutboxSize:
    """What is in an outbox, as somebody who may only read it; the bounds, which processes set, are 0.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    outbox = PostgresOutbox(conninfo)
    with outbox._usable(), _connect(conninfo) as connection:
        return _read(connection, 0, 0)


def _connect(conninfo: str) -> Connection:
    connection: Connection = psycopg.connect(
        conninfo,
        autocommit=True,
        connect_timeout=CONNECT_TIMEOUT,
        application_name="grpc-mesh outbox",
        prepare_threshold=None,  # poolers in between may not keep them
    )
    try:
        connection.execute("SELECT set_config('statement_timeout', %s, false)", (STATEMENT_TIMEOUT,))
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: Connection, max_events: int, max_bytes: int) -> OutboxSize:
    row = connection.execute(
        "SELECT count(*), coalesce(sum(octet_length(body)), 0)::bigint,"
        " (SELECT created FROM mesh_outbox ORDER BY number LIMIT 1), (SELECT count(*) FROM mesh_outbox_refused)"
        " FROM mesh_outbox"
    ).fetchone()
    events, held, oldest, refused = row or (0, 0, None, 0)
    return OutboxSize(events, held, oldest, refused, max_events, max_bytes)


def _words(error: psycopg.Error) -> str:
    return " ".join(str(error).split()) or type(error).__name__
