"""Keeps this process at hand for operators: they read its log and change its levels through the control plane.

The stream runs on the connection that the discovery stream has, with the identity of the process. What leaves it are
its own log records, scrubbed, and only while an operator reads them; what it obeys are changes of levels, which fall
back.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import time
from contextlib import aclosing
from random import Random
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from mesh.v1 import operations_pb2, operations_pb2_grpc

from mesh_client.core.log_entry import level_step
from mesh_client.core.log_levels import DEFAULT_DURATION
from mesh_client.core.log_ring import Kept, LogFilter
from mesh_client.core.policy import Backoff
from mesh_client.core.retry import backoff_delay
from mesh_client.log_service import LogService
from mesh_client.logs import Logs, current_logs
from mesh_client.stream_end import StreamEnd
from mesh_client.tasks import end_tasks

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

OPERATIONS_VARIABLE = "MESH_OPERATIONS"

MAX_TAILS = 32
"""Operators at most that read this log at once."""

RETRY = Backoff(initial=1.0, max=60.0, multiplier=2.0)

_FINAL = frozenset({grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT})
"""Answers that the next connection may change, and asking again on this one does not."""

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Call = grpc.aio.StreamStreamCall[operations_pb2.AttendRequest, operations_pb2.AttendResponse]
    _Send = Callable[[operations_pb2.AttendRequest], Awaitable[None]]


def wanted() -> bool:
    """Whether operators may ask this process: yes, unless MESH_OPERATIONS says 0."""
    return os.environ.get(OPERATIONS_VARIABLE, "").lower() not in ("0", "false", "off")


class Attendance:
    """One process's attendance, over as many connections as there are one after the other.

    Without a log of its own (`mesh_client.configure_logs`) there is nothing to attend with.

    Args:
        service: the service that the process is of; may be empty in plaintext.
        node_id: its name in the discovery stream.
        rng: draws waits.
    """

    def __init__(self, service: str, node_id: str, rng: Random) -> None:
        self._service = service
        self._names: dict[str, None] = {node_id: None}
        self._rng = rng
        self._renamed = asyncio.Event()
        self._log: LogService | None = None
        self._refused = ""

    def known_as(self, instance_id: str) -> None:
        """Operators know the process by this name before others. At most 10 of them count."""
        self._names = {instance_id: None, **self._names}
        self._renamed.set()

    async def attend(self, channel: grpc.aio.Channel) -> None:
        """Attends on an open connection, until there is no sense in it or it is cancelled."""
        failures = 0
        while (logs := current_logs()) is not None:
            failures, begun = failures + 1, time.monotonic()
            try:
                await self._stream(channel, logs)
            except grpc.aio.AioRpcError as error:
                if error.code() in _FINAL:
                    self._tell(error)
                    return
                log.debug("operators cannot ask this process for now: %s", error.details())
            except Exception:
                # A defect of ours, or something else that speaks on that port. Nothing depends on this.
                log.exception("attending to operators failed")
            if time.monotonic() - begun > RETRY.max:
                failures = 1
            await asyncio.sleep(backoff_delay(RETRY, min(failures, 32), self._rng))

    def close(self) -> None:
        """Levels that operators have changed are as configured again."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _tell(self, error: grpc.aio.AioRpcError) -> None:
        why = f"{error.code().name}: {error.details()}"
        if why != self._refused and error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            self._refused = why
            log.warning("operators cannot ask this process: %s", why)

    async def _stream(self, channel: grpc.aio.Channel, logs: Logs) -> None:
        service = self._of(logs)
        call = operations_pb2_grpc.OperationsServiceStub(channel).Attend()
        end = StreamEnd(call)
        writing = asyncio.Lock()

        async def send(request: operations_pb2.AttendRequest) -> None:
            # What a broken stream raises here, reading it raises as well.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with writing:
                    await call.write(request)

        tasks = _Tasks()
        try:
            tasks.start(0, self._introduce(logs, send))
            while isinstance(response := await call.read(), operations_pb2.AttendResponse):
                await self._obey(response, service, send, tasks)
        except grpc.aio.AioRpcError as error:
            raise await end.instead_of(error) from None
        finally:
            await tasks.stop()
            call.cancel()

    def _of(self, logs: Logs) -> LogService:
        """The same one over all streams: levels outlast them."""
        if self._log is None or self._log.logs is not logs:
            self.close()
            self._log = LogService(logs)
        return self._log

    async def _introduce(self, logs: Logs, send: _Send) -> None:
        """Says who this is, and again when that changes."""
        while True:
            self._renamed.clear()
            await send(operations_pb2.AttendRequest(process=self._describe(logs)))
            await self._renamed.wait()

    def _describe(self, logs: Logs) -> operations_pb2.Process:
        process = operations_pb2.Process(
            service=self._service,
            instances=list(dict.fromkeys([*([logs.instance] if logs.instance else []), *self._names]))[:10],
            id=logs.process,
            version=importlib.metadata.version("grpc-mesh"),
            runtime=f"{platform.python_implementation()} {platform.python_version()}",
            grpc_version=grpc.__version__,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        process.clock.FromNanoseconds(time.time_ns())
        return process

    async def _obey(
        self, response: operations_pb2.AttendResponse, service: LogService, send: _Send, tasks: _Tasks
    ) -> None:
        match response.WhichOneof("kind"):
            case "start_tail":
                start = response.start_tail
                if len(tasks) <= MAX_TAILS and start.tail:
                    tasks.start(start.tail, _tail(service, start, send))
            case "stop_tail":
                tasks.cancel(response.stop_tail.tail)
            case "change_log_level":
                change = response.change_log_level
                seconds = DEFAULT_DURATION
                if change.HasField("duration"):
                    seconds = change.duration.seconds + change.duration.nanos / 1e9
                error = service.change_level(change.logger, 10 * change.level, seconds)
                changed = operations_pb2.LogLevelChanged(change=change.change, error=error)
                await send(operations_pb2.AttendRequest(log_level_changed=changed))


class _Tasks:
    """Tasks by number."""

    def __init__(self) -> None:
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, number: int, work: Coroutine[object, object, None]) -> None:
        self.cancel(number)
        task = self._tasks[number] = asyncio.create_task(work)

        def done(_: asyncio.Task[None]) -> None:
            if self._tasks.get(number) is task:
                del self._tasks[number]

        task.add_done_callback(done)

    def cancel(self, number: int) -> None:
        if (task := self._tasks.pop(number, None)) is not None:
            task.cancel()

    async def stop(self) -> None:
        await end_tasks(*self._tasks.values())


async def _tail(service: LogService, start: operations_pb2.StartTail, send: _Send) -> None:
    """Sends the records that an operator wants, until that is all or it is cancelled."""
    wanted = LogFilter(10 * start.level, start.logger)
    async with aclosing(service.read(start.last, wanted, after=start.after, follow=start.follow)) as batches:
        async for batch in batches:
            records = operations_pb2.LogRecords(
                tail=start.tail,
                records=[record_to_proto(kept) for kept in batch.records],
                dropped=batch.dropped,
                caught_up=batch.caught_up,
            )
            await send(operations_pb2.AttendRequest(log_records=records))


def record_to_proto(kept: Kept) -> operations_pb2.LogRecord:
    """An event as it is sent."""
    entry = kept.entry
    record = operations_pb2.LogRecord(
        level=operations_pb2.LogLevel.values()[level_step(entry.level)],
        logger=entry.logger,
        message=entry.message,
        trace_id=entry.trace_id,
        span_id=entry.span_id,
        fields=json.dumps(entry.fields) if entry.fields else "",
        exception=entry.exception,
        sequence=kept.sequence,
    )
    record.time.FromNanoseconds(round(entry.time * 1e9))
    return record
