"""The streams on which processes attend, each bound to the identity of its connection."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import grpc.aio
from mesh.v1 import operations_pb2 as pb

from control_plane.access import Access, Caller
from control_plane.access import caller as connected_caller
from control_plane.operations.roster import ProcessKey, Roster
from control_plane.operations.tails import Tails
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import check_service_name
from mesh_client.tasks import end_tasks

Context = grpc.aio.ServicerContext[pb.AttendRequest, pb.AttendResponse]

MAX_STREAMS_OF_ONE = 100
"""Streams that one workload may have open, so that none of them keeps the others out."""
FIRST_WORD = 10.0
"""Seconds that a process has to say who it is."""
MAX_UNSENT = 500
"""What waits to be sent to one process; one that takes nothing any more is let go."""
MAX_NAMES, MAX_TEXT, MAX_RECORDS = 10, 200, 100
_FAR = 1e9
"""Seconds; a clock that is further off is as wrong."""
ANSWER_TIMEOUT = 5.0
"""Seconds that a process has to change a level."""

_log = logging.getLogger(__name__)


class Stream:
    """One process that attends."""

    def __init__(self, key: ProcessKey, described: pb.Process) -> None:
        self._key = key
        self._described = described
        self._numbers = itertools.count(1)
        self._changes: dict[int, asyncio.Future[str]] = {}
        self._unsent: asyncio.Queue[pb.AttendResponse] = asyncio.Queue(MAX_UNSENT)
        self.ended = asyncio.Event()
        """Set when the stream must end."""

    @property
    def key(self) -> ProcessKey:
        """Constant."""
        return self._key

    @property
    def instances(self) -> tuple[str, ...]:
        """Its names."""
        return tuple(self._described.instances)

    @property
    def described(self) -> pb.Process:
        """Who it is."""
        return self._described

    def describe(self, described: pb.Process) -> None:
        """It has other names now."""
        self._described = described

    def start_tail(self, start: pb.StartTail) -> None:
        """Asks for records."""
        self._send(pb.AttendResponse(start_tail=start))

    def stop_tail(self, tail: int) -> None:
        """Asks for no more."""
        self._send(pb.AttendResponse(stop_tail=pb.StopTail(tail=tail)))

    async def change_level(self, change: pb.ChangeLogLevel) -> str:
        """Has a level changed; why it was not, or nothing."""
        number = next(self._numbers)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._changes[number] = answer
        asked = pb.ChangeLogLevel(change=number)
        asked.MergeFrom(change)
        self._send(pb.AttendResponse(change_log_level=asked))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await answer
        except TimeoutError:
            return f"no answer within {ANSWER_TIMEOUT:g} s"
        finally:
            del self._changes[number]

    def changed(self, answer: pb.LogLevelChanged) -> None:
        """The process's answer to that."""
        waiting = self._changes.get(answer.change)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer.error[:MAX_TEXT])

    async def next(self) -> pb.AttendResponse | None:
        """What is to be sent next; None when the stream must end."""
        if not self.ended.is_set() and self._unsent.empty():
            getting, ending = asyncio.ensure_future(self._unsent.get()), asyncio.ensure_future(self.ended.wait())
            try:
                await asyncio.wait((getting, ending), return_when=asyncio.FIRST_COMPLETED)
                if getting.done():
                    return getting.result()
            finally:
                getting.cancel()
                ending.cancel()
        return None if self.ended.is_set() else self._unsent.get_nowait()

    def _send(self, response: pb.AttendResponse) -> None:
        try:
            self._unsent.put_nowait(response)
        except asyncio.QueueFull:
            _log.warning("%s takes nothing of what operators ask; its stream ends", self._key.process)
            self.ended.set()


class Attendances:
    """All processes that attend.

    Args:
        access: who may attend as what.
        max_streams: of all; further ones are refused.
    """

    def __init__(self, access: Access, max_streams: int) -> None:
        self._access = access
        self._max_streams = max_streams
        self._open: Counter[str] = Counter()
        self._closed = False
        self.roster = Roster[Stream]()

    def close(self) -> None:
        """Ends every stream with UNAVAILABLE."""
        self._closed = True
        for stream in self.roster.streams():
            stream.ended.set()

    async def serve(
        self, requests: AsyncIterator[pb.AttendRequest], context: Context, tails: Tails
    ) -> AsyncGenerator[pb.AttendResponse, None]:
        """One stream, from its first request to its end."""
        workload_id = await self._admit(requests, context)
        self._open[workload_id] += 1
        try:
            stream, caller = await self._introduced(requests, context)
            forget = self._access.when_revoked(caller, stream.ended.set)
            self.roster.add(stream)
            reading = asyncio.create_task(self._read(stream, requests, tails))
            reading.add_done_callback(lambda _: stream.ended.set())
            try:
                if self._closed:
                    stream.ended.set()
                tails.came(stream)
                while (response := await stream.next()) is not None:
                    yield response
                if self._access.is_revoked(caller):
                    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
                if self._closed:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "this control plane is stopping; use another")
                if (
                    reading.done()
                    and not reading.cancelled()
                    and isinstance(error := reading.exception(), InvalidValueError)
                ):
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            finally:
                forget()
                await end_tasks(reading)
                self.roster.remove(stream)
                tails.went(stream)
        finally:
            self._open[workload_id] -= 1
            if not self._open[workload_id]:
                del self._open[workload_id]

    async def _admit(self, requests: AsyncIterator[pb.AttendRequest], context: Context) -> str:
        """Which workload the stream is of, before it has said anything: silent ones are streams too."""
        who = connected_caller(context) if self._access.secure else None
        workload_id = "" if who is None else who.workload_id
        most = MAX_STREAMS_OF_ONE if self._access.secure else self._max_streams
        if self._open[workload_id] >= most or self._open.total() >= self._max_streams:
            await _first(requests)
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "as many processes attend already as may; operators cannot ask this one",
            )
        return workload_id

    async def _introduced(
        self, requests: AsyncIterator[pb.AttendRequest], context: Context
    ) -> tuple[Stream, Caller | None]:
        # Read before any refusal: one that crosses the client's first write reaches it without its words (grpc.aio).
        first = await _first(requests)
        try:
            if first is None or not first.HasField("process"):
                raise InvalidValueError("process", "nothing", "who the process is, in the first request")
            described = _checked(first.process, secure=self._access.secure)
        except InvalidValueError as error:
            await self._access.require_caller(context, "attend")
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        caller = await self._access.require_service(context, described.service, f"attend as {described.service}")
        key = ProcessKey("" if caller is None else caller.workload_id, described.service, described.id)
        return Stream(key, described), caller

    async def _read(self, stream: Stream, requests: AsyncIterator[pb.AttendRequest], tails: Tails) -> None:
        async for request in requests:
            match request.WhichOneof("kind"):
                case "log_records" if self.roster.counts(stream):
                    if len(request.log_records.records) > MAX_RECORDS:
                        raise InvalidValueError(
                            "log_records.records", len(request.log_records.records), f"at most {MAX_RECORDS}"
                        )
                    tails.deliver(stream, request.log_records)
                case "log_level_changed":
                    stream.changed(request.log_level_changed)
                case "process":
                    described = _checked(request.process, secure=self._access.secure)
                    if (described.service, described.id) != (stream.key.service, stream.key.process):
                        raise InvalidValueError("process", described.service, "the same service and id over a stream")
                    stream.describe(described)
                    if self.roster.counts(stream):
                        tails.came(stream)


async def _first(requests: AsyncIterator[pb.AttendRequest]) -> pb.AttendRequest | None:
    try:
        async with asyncio.timeout(FIRST_WORD):
            return await anext(requests, None)
    except TimeoutError:
        return None


def _checked(process: pb.Process, *, secure: bool) -> pb.Process:
    """What a process says of itself, within bounds.

    Raises:
        InvalidValueError: its service or id is not allowed.
    """
    if process.service or secure:
        check_service_name(process.service)
    if not process.id or len(process.id) > MAX_TEXT:
        raise InvalidValueError("process.id", process.id, f"1 to {MAX_TEXT} characters")
    known = pb.Process(
        service=process.service,
        instances=[name[:MAX_TEXT] for name in process.instances[:MAX_NAMES]],
        id=process.id,
        version=process.version[:MAX_TEXT],
        runtime=process.runtime[:MAX_TEXT],
        grpc_version=process.grpc_version[:MAX_TEXT],
        host=process.host[:MAX_TEXT],
        pid=process.pid,
    )
    if process.HasField("clock"):
        known.clock.CopyFrom(process.clock)
        ahead = process.clock.seconds + process.clock.nanos / 1e9 - time.time()
        known.clock_ahead.FromNanoseconds(round(min(max(ahead, -_FAR), _FAR) * 1e9))
    return known
