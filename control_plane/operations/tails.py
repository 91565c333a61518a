"""Logs that operators read: records of several processes become one stream, bounded, in order where that can be."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import contextmanager
from heapq import heappush, heappushpop
from typing import Protocol

from mesh.v1 import operations_pb2 as pb

from control_plane.operations.roster import ProcessKey, means
from mesh_client.core.errors import MeshError
from mesh_client.core.log_queue import LogQueue
from mesh_client.core.log_ring import MAX_KEPT

MAX_TAILS = 32
"""Logs that are read at once."""
MAX_WAITING = 2_000
"""Records that wait for an operator who is slow."""
MAX_BATCH = 200
MAX_SEEN = 20_000
"""Processes whose last record is remembered, so that none comes twice when they come back; more than may attend."""
PAST_PATIENCE = 3.0
"""Seconds that the past of a process is waited for."""


class TooManyTailsError(MeshError):
    """As many logs are being read as may be."""

    def __init__(self) -> None:
        super().__init__(f"{MAX_TAILS} logs are being read, which is all that may be at once; end one of them first")


class LogProcess(Protocol):
    """A process whose log can be read."""

    @property
    def key(self) -> ProcessKey:
        """Constant."""

    @property
    def instances(self) -> tuple[str, ...]:
        """Its names; may change."""

    @property
    def described(self) -> pb.Process:
        """Who it is."""

    def start_tail(self, start: pb.StartTail) -> None:
        """Asks for records; they come by `Tails.deliver`. Never blocks."""

    def stop_tail(self, tail: int) -> None:
        """Asks for no more."""


class Tail:
    """One operator's reading: the past of all processes in one order, and then what comes.

    Args:
        number: stands in what processes send for it.
        request: what is wanted.
    """

    def __init__(self, number: int, request: pb.TailLogsRequest) -> None:
        self.number = number
        self._request = request
        self._last = min(request.last, MAX_KEPT)
        self._past: list[tuple[int, str, int, pb.LogRecord]] = []
        """A heap: the oldest is first, and goes when there are too many."""
        self._waited_for: dict[LogProcess, None] = {}
        self._queue = LogQueue[pb.LogRecord](MAX_WAITING)
        self._reading: dict[ProcessKey, LogProcess] = {}
        self._seen: dict[ProcessKey, int] = {}
        self._news: list[pb.Process] = []
        self._changed = asyncio.Event()
        self._live = False
        self._over = False

    def looks_at(self, process: LogProcess) -> None:
        """Reads this process too, if it is meant; on from where it was left, if it was there before."""
        key = process.key
        if self._reading.get(key) is process or not means(process, self._request.service, self._request.instance):
            return
        known = key in self._seen
        if not known:
            if not self._live:
                self._waited_for[process] = None
            self._news.append(process.described)
        self._reading[key] = process
        after = self._seen.setdefault(key, 0)
        if len(self._seen) > MAX_SEEN:
            oldest = next((each for each in self._seen if each not in self._reading), None)
            if oldest is not None:
                del self._seen[oldest]
        process.start_tail(
            pb.StartTail(
                tail=self.number,
                level=self._request.level,
                logger=self._request.logger,
                last=MAX_KEPT if known else self._last,
                after=after,
                follow=self._request.follow,
            )
        )
        self._changed.set()

    def ended(self, process: LogProcess) -> None:
        """The process's stream has ended."""
        self._waited_for.pop(process, None)
        if self._reading.get(process.key) is process:
            del self._reading[process.key]
        self._changed.set()

    def take(self, process: LogProcess, records: pb.LogRecords) -> None:
        """Some records of a process, in their order. What comes on a stream that was replaced comes again later."""
        key = process.key
        if self._reading.get(key) is not process:
            return
        for record in records.records:
            self._seen[key] = max(record.sequence, self._seen[key])
            record.service, record.process = key.service, key.process
            record.instance = process.instances[0] if process.instances else ""
            if process in self._waited_for:
                self._remember(record)
            else:
                self._queue.put(record)
        self._queue.lost(records.dropped)
        if records.caught_up:
            self._waited_for.pop(process, None)
        self._changed.set()

    def stop(self) -> None:
        """Asks nobody for more."""
        for process in self._reading.values():
            process.stop_tail(self.number)
        self._reading.clear()

    async def responses(self) -> AsyncGenerator[pb.TailLogsResponse, None]:
        """What the operator gets; without end if they follow."""
        yield self._response()
        silent = await self._caught_up()
        past = [record for *_, record in sorted(self._past, key=lambda entry: entry[:3])]
        self._past.clear()
        for start in range(0, len(past), MAX_BATCH):
            yield pb.TailLogsResponse(records=past[start : start + MAX_BATCH])
        yield self._response(silent)
        while self._request.follow and not self._over:
            await self._changed.wait()
            self._changed.clear()
            while self._queue or self._news:
                yield self._response()

    def finish(self) -> None:
        """Ends `responses`, as far as they have not come to their end by themselves."""
        self._over = True
        self._changed.set()

    def _response(self, silent: Iterable[str] = ()) -> pb.TailLogsResponse:
        records, dropped = self._queue.take(MAX_BATCH)
        news, self._news = self._news, []
        return pb.TailLogsResponse(processes=news, records=records, dropped=dropped, silent=silent)

    async def _caught_up(self) -> list[str]:
        """Returns when the past of every process is here, or with the names of those whose past is late."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PAST_PATIENCE):
                while self._waited_for:
                    self._changed.clear()
                    await self._changed.wait()
        late = [(process.instances or (process.key.process,))[0] for process in self._waited_for]
        self._waited_for.clear()
        self._live = True
        return late

    def _remember(self, record: pb.LogRecord) -> None:
        entry = (record.time.ToNanoseconds(), record.process, record.sequence, record)
        if len(self._past) < self._last:
            heappush(self._past, entry)
        elif self._last:
            heappushpop(self._past, entry)


class Tails:
    """All that is being read.

    Args:
        processes: those whose logs can be read now.
    """

    def __init__(self, processes: Callable[[], Iterable[LogProcess]]) -> None:
        self._processes = processes
        self._numbers = itertools.count(1)
        self._tails: dict[int, Tail] = {}

    @contextmanager
    def reading(self, request: pb.TailLogsRequest) -> Iterator[Tail]:
        """Reads logs until the end of the block.

        Raises:
            TooManyTailsError: as many are being read as may be.
        """
        if len(self._tails) >= MAX_TAILS:
            raise TooManyTailsError
        number = next(self._numbers)
        tail = self._tails[number] = Tail(number, request)
        try:
            for process in self._processes():
                tail.looks_at(process)
            yield tail
        finally:
            del self._tails[number]
            tail.stop()

    def close(self) -> None:
        """Ends all of them."""
        for tail in self._tails.values():
            tail.finish()

    def came(self, process: LogProcess) -> None:
        """A process has come, or has another name."""
        for tail in self._tails.values():
            tail.looks_at(process)

    def went(self, process: LogProcess) -> None:
        """A process's stream has ended."""
        for tail in self._tails.values():
            tail.ended(process)

    def deliver(self, process: LogProcess, records: pb.LogRecords) -> None:
        """Records that a process sends. Those that nobody waits for any more are ignored."""
        tail = self._tails.get(records.tail)
        if tail is not None:
            tail.take(process, records)
