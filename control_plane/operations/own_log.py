"""The control plane's own log, for operators: it is handed in, since `logging` is the whole process's."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

import grpc
from mesh.v1 import operations_pb2 as pb

from control_plane.operations.roster import CONTROL_PLANE, ProcessKey
from control_plane.operations.tails import Tails
from mesh_client.core.log_entry import level_step
from mesh_client.core.log_ring import Kept, LogFilter
from mesh_client.tasks import end_tasks


class Batch(Protocol):
    """Some records."""

    @property
    def records(self) -> Sequence[Kept]:
        """In the order in which they were written."""

    @property
    def dropped(self) -> int:
        """So many before them were lost."""

    @property
    def caught_up(self) -> bool:
        """What was wanted of the past is complete with these."""


class OwnLog(Protocol):
    """The log of this process, as `mesh_client.log_service.LogService`."""

    @property
    def process(self) -> str:
        """Tells this process from others."""

    def read(
        self, last: int, wanted: LogFilter, *, after: int = 0, follow: bool = False
    ) -> AsyncGenerator[Batch, None]:
        """The newest records that are wanted and, if asked, every further one."""

    def change_level(self, logger: str, level: int, seconds: float) -> str:
        """Gives a logger another level for a while; why not, or nothing."""

    def close(self) -> None:
        """Levels are as configured again."""


class OwnProcess:
    """The control plane itself, as a process whose log can be read. To be made inside the event loop.

    Args:
        log: its log.
        name: of this control plane.
    """

    def __init__(self, log: OwnLog, name: str) -> None:
        self._log = log
        self._key = ProcessKey("", CONTROL_PLANE, log.process)
        self._name = name
        self._tails: Tails | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}

    @property
    def key(self) -> ProcessKey:
        """Constant."""
        return self._key

    @property
    def instances(self) -> tuple[str, ...]:
        """Its name."""
        return (self._name,)

    @property
    def described(self) -> pb.Process:
        """Who it is, and its clock now."""
        return describe_this_process(self._name, self._log.process)

    def deliver_to(self, tails: Tails) -> None:
        """Where records go."""
        self._tails = tails

    def start_tail(self, start: pb.StartTail) -> None:
        """Begins to read."""
        self._tasks[start.tail] = asyncio.create_task(self._read(start))

    def stop_tail(self, tail: int) -> None:
        """Ends that."""
        task = self._tasks.pop(tail, None)
        if task is not None:
            task.cancel()

    async def change_level(self, change: pb.ChangeLogLevel) -> str:
        """Changes a level; why not, or nothing."""
        seconds = change.duration.seconds + change.duration.nanos / 1e9
        return self._log.change_level(change.logger, 10 * change.level, seconds)

    async def close(self) -> None:
        """Ends everything."""
        await end_tasks(*self._tasks.values())
        self._log.close()

    async def _read(self, start: pb.StartTail) -> None:
        wanted = LogFilter(10 * start.level, start.logger)
        async with aclosing(self._log.read(start.last, wanted, after=start.after, follow=start.follow)) as batches:
            async for batch in batches:
                records = pb.LogRecords(
                    tail=start.tail,
                    records=map(_record_to_proto, batch.records),
                    dropped=batch.dropped,
                    caught_up=batch.caught_up,
                )
                if self._tails is not None:
                    self._tails.deliver(self, records)


def describe_this_process(name: str, process: str) -> pb.Process:
    """This process, as operators see it."""
    described = pb.Process(
        service=CONTROL_PLANE,
        instances=[name],
        id=process,
        version=importlib.metadata.version("grpc-mesh"),
        runtime=f"{platform.python_implementation()} {platform.python_version()}",
        grpc_version=grpc.__version__,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    described.clock.FromNanoseconds(time.time_ns())
    return described


def _record_to_proto(kept: Kept) -> pb.LogRecord:
    entry = kept.entry
    record = pb.LogRecord(
        level=pb.LogLevel.values()[level_step(entry.level)],
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
