"""The embedded registry: leases held by open streams, kept in SQLite so that a restart forgets nobody.

Changes are emitted at once and written behind, many in one transaction; a registration is confirmed to its holder only
when its row is written, so that what was confirmed survives the death of this process.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable

from control_plane.events import EndpointDrained, ServiceObserved, ServiceVanished, SourceConnected, SourceLost
from control_plane.sources import Emit, StoreUnavailableError
from control_plane.sources.database import Database
from control_plane.sources.leases import (
    SOURCE,
    DeleteLease,
    EndStream,
    Lease,
    LeaseAction,
    LeaseBook,
    SaveLease,
    endpoint_from_json,
    endpoint_to_json,
)
from mesh_client.core.model import Endpoint, check_service_name

_logger = logging.getLogger(__name__)
_Row = tuple[str, str, str, bytes, str, int, str]


class LeaseStream:
    """One open stream that holds a lease."""

    def __init__(self, number: int, service: str, endpoint_id: str, token: str) -> None:
        self.number = number
        self.service = service
        self.endpoint_id = endpoint_id
        self.token = token
        """What the holder shows to come back."""
        self.ended = asyncio.Event()
        """Set when the stream must end: its holder came back on another one."""


class EmbeddedSource:
    """The registry behind ``RegistryService.Register``.

    Args:
        database: where leases are kept.
        lease_grace: seconds that an endpoint stays after its stream broke.
        restart_grace: seconds after a start in which holders may return.
        max_leases: registrations at most.
        clock: monotonic seconds.
    """

    name = SOURCE

    def __init__(
        self,
        database: Database,
        *,
        lease_grace: float = 10.0,
        restart_grace: float = 15.0,
        max_leases: int = 100_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lease_grace = lease_grace
        self._restart_grace = restart_grace
        self._database = database
        self._clock = clock
        self._book = LeaseBook(lease_grace, max_leases)
        self._numbers = itertools.count(1)
        self._streams: dict[int, LeaseStream] = {}
        self._unwritten: dict[tuple[str, str], Lease | None] = {}
        self._asked = 0
        self._tried = 0
        self._confirmations: list[tuple[int, asyncio.Future[None]]] = []
        self._ready = asyncio.Event()
        self._wake_writer = asyncio.Event()
        self._wake_ticker = asyncio.Event()
        self._emit: Emit = _ignore

    async def run(self, emit: Emit) -> None:
        """Emits what earlier processes stored, then every change, until cancelled."""
        self._emit = emit
        emit(SourceLost(SOURCE, "reading stored registrations"))
        self._do(self._book.restore(await self._load(), self._clock(), self._restart_grace))
        emit(SourceConnected(SOURCE))
        self._ready.set()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write_behind())
                tasks.create_task(self._tick())
        finally:
            self._emit = _ignore
            try:
                await asyncio.shield(self._flush())
            except StoreUnavailableError as error:
                _logger.error("the last changes of registrations are not stored: %s", error)

    async def register(
        self, service: str, endpoint: Endpoint, token: str, peer: str, workload: str = ""
    ) -> LeaseStream:
        """Opens a stream's lease. Its holder may be told of it after `confirmed`.

        Args:
            service: the service it registers for.
            endpoint: as it states it.
            token: the lease token that it showed; empty for none.
            peer: address of its connection.
            workload: that registers; empty for one without identity.

        Raises:
            LeaseHeldError: another live stream holds it and the token is not its token.
            LeaseLimitError: there are too many.
        """
        await self._ready.wait()
        number = next(self._numbers)
        fresh = secrets.token_urlsafe(24)
        shown = _hash(token) if token else None
        actions = self._book.register(
            number,
            service,
            endpoint,
            token_hash=shown,
            fresh_hash=_hash(fresh),
            peer=peer,
            workload=workload,
        )
        lease = self._book.lease(service, endpoint.id)
        kept = lease is not None and lease.token_hash == shown
        stream = LeaseStream(number, service, endpoint.id, token if kept else fresh)
        self._streams[number] = stream
        self._do(actions)
        return stream

    def update(self, stream: LeaseStream, endpoint: Endpoint) -> None:
        """Replaces the stream's endpoint. Does nothing for one that was superseded.

        Raises:
            InvalidValueError: the id is another than before.
        """
        if self._book.holds(stream.number):
            self._do(self._book.update(stream.number, endpoint))

    def broken(self, stream: LeaseStream) -> None:
        """The stream is gone without a word; its lease lasts for the grace."""
        if self._book.holds(stream.number):
            del self._streams[stream.number]
            self._do(self._book.broken(stream.number, self._clock()))

    def closed(self, stream: LeaseStream) -> None:
        """The stream deregistered its endpoint."""
        if self._book.holds(stream.number):
            del self._streams[stream.number]
            self._do(self._book.closed(stream.number))

    def is_of(self, service: str, endpoint_id: str, workload: str, token: str) -> bool:
        """Whether an endpoint is a workload's, or that of whoever shows its lease token; one that is not there is."""
        lease = self._book.lease(service, endpoint_id)
        return lease is None or lease.is_of(workload, _hash(token) if token else None)

    def drain(self, service: str, endpoint_id: str) -> None:
        """Marks an endpoint as leaving, so that a restart of the control plane does not bring it back."""
        self._do(self._book.drain(service, endpoint_id))

    async def confirmed(self) -> None:
        """Returns when everything up to now is written, or writing it failed: the leases then live in memory."""
        if self._tried < self._asked:
            future = asyncio.get_running_loop().create_future()
            self._confirmations.append((self._asked, future))
            await future

    def _do(self, actions: tuple[LeaseAction, ...]) -> None:
        for action in actions:
            match action:
                case SaveLease(lease):
                    self._unwritten[lease.service, lease.endpoint.id] = lease
                case DeleteLease(service, endpoint_id):
                    self._unwritten[service, endpoint_id] = None
                case EndStream(number):
                    self._streams.pop(number).ended.set()
                case ServiceObserved() | ServiceVanished() | EndpointDrained():
                    self._emit(action)
        self._wake_ticker.set()
        if self._unwritten:
            self._asked += 1
            self._wake_writer.set()

    async def _load(self) -> list[Lease]:
        leases = []
        for service, endpoint_id, endpoint, token_hash, peer, drained, workload in await self._rows():
            try:
                check_service_name(service)
                found = endpoint_from_json(endpoint)
                leases.append(Lease(service, found, token_hash, peer, workload, drained=bool(drained)))
            except ValueError as error:
                _logger.error("stored registration %s of %s is skipped: %s", endpoint_id, service, error)
                self._unwritten[service, endpoint_id] = None
        return leases

    async def _rows(self) -> list[_Row]:
        delay = 0.1
        while True:
            try:
                return await self._database.run(_read_leases)
            except StoreUnavailableError as error:
                _logger.error("stored registrations cannot be read: %s", error)
                self._emit(SourceLost(SOURCE, str(error)))
                await asyncio.sleep(delay)
                delay = min(2.0 * delay, 5.0)

    async def _tick(self) -> None:
        while True:
            self._wake_ticker.clear()
            due = self._book.next_tick()
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._clock())):
                    await self._wake_ticker.wait()
            except TimeoutError:
                self._do(self._book.tick(self._clock()))

    async def _write_behind(self) -> None:
        delay = 0.0
        while True:
            await self._wake_writer.wait()
            self._wake_writer.clear()
            try:
                await self._flush()
            except StoreUnavailableError as error:
                _logger.error("registrations cannot be stored, and would not survive a restart: %s", error)
                self._emit(SourceLost(SOURCE, f"registrations cannot be stored: {error}"))
                self._wake_writer.set()
                delay = min(2.0 * delay or 0.1, 5.0)
                await asyncio.sleep(delay)
            else:
                if delay:
                    self._emit(SourceConnected(SOURCE))
                delay = 0.0

    async def _flush(self) -> None:
        changes, self._unwritten = self._unwritten, {}
        covered = self._asked
        try:
            await self._database.run(lambda connection: _write_leases(connection, changes))
        except StoreUnavailableError:
            # Whatever happened to the file, everything that is known is written next time.
            self._unwritten = changes | self._book.rows() | self._unwritten
            raise
        finally:
            self._tried = covered
            for number, future in self._confirmations:
                if number <= covered and not future.done():
                    future.set_result(None)
            self._confirmations = [waiting for waiting in self._confirmations if not waiting[1].done()]


def _ignore(_event: object) -> None:
    """Nobody listens while the source does not run."""


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _read_leases(connection: sqlite3.Connection) -> list[_Row]:
    return connection.execute(
        "SELECT service, endpoint_id, endpoint, token_hash, peer, drained, workload FROM leases"
    ).fetchall()


def _write_leases(connection: sqlite3.Connection, changes: dict[tuple[str, str], Lease | None]) -> None:
    connection.executemany(
        "DELETE FROM leases WHERE service = ? AND endpoint_id = ?",
        [key for key, lease in changes.items() if lease is None],
    )
    connection.executemany(
        "INSERT OR REPLACE INTO leases (service, endpoint_id, endpoint, token_hash, peer, drained, workload) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                service,
                endpoint_id,
                endpoint_to_json(lease.endpoint),
                lease.token_hash,
                lease.peer,
                int(lease.drained),
                lease.workload,
            )
            for (service, endpoint_id), lease in changes.items()
            if lease is not None
        ],
    )
