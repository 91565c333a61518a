"""TelemetryService: load reports come in, and processes are asked for the calls that somebody looks at."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

import grpc
import grpc.aio
from mesh.v1 import telemetry_pb2, telemetry_pb2_grpc

from control_plane.access import Access, Caller
from control_plane.convert import duration_to_proto, node_from_proto
from control_plane.identity.limits import StreamLimits
from control_plane.subscription import ProtocolError
from control_plane.telemetry.convert import (
    check_node,
    process_from_proto,
    report_from_proto,
    seconds,
    tapped_from_proto,
)
from control_plane.telemetry.recorder import Recorder, Session, SupersededError, TooManyReportersError
from control_plane.telemetry.taps import OpenTap, Taps
from control_plane.telemetry.timeline import CODES, STEP
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.rate_limit import TokenBucket
from mesh_client.tasks import end_tasks

MAX_STREAMS_OF_ONE = 20
"""Streams that one workload may report on at once: mostly it has one."""
REQUESTS_PER_SECOND, REQUESTS_AT_ONCE = 10.0, 50
"""Requests of one stream that are read; one that sends more is read later."""
FIRST_REQUEST = 10.0
"""Seconds that a stream may be silent before it says whose it is."""

_Context = grpc.aio.ServicerContext[telemetry_pb2.ReportRequest, telemetry_pb2.ReportResponse]

_log = logging.getLogger(__name__)


class _Stream:
    """One process that reports."""

    __slots__ = ("caller", "ended", "wake")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        """The service of the process."""
        self.wake = asyncio.Event()
        """Set when what is tapped has changed."""
        self.wake.set()
        self.ended: tuple[grpc.StatusCode, str] | None = None


class TelemetryServicer(telemetry_pb2_grpc.TelemetryServiceServicer):
    """Serves ``mesh.v1.TelemetryService``. To be made inside the event loop.

    Args:
        recorder: takes reports in.
        taps: what somebody looks at.
        access: who may report as which service; by default there are no identities.
    """

    def __init__(self, recorder: Recorder, taps: Taps, access: Access | None = None) -> None:
        self._recorder = recorder
        self._taps = taps
        self._access = access or Access(None)
        self._limits = StreamLimits(MAX_STREAMS_OF_ONE)
        self._streams: set[_Stream] = set()
        self._expired_at = _now()
        self.refused = 0
        """Requests that were malformed, or could not be true."""

    @property
    def streams(self) -> int:
        """Streams that are open and have said whose they are."""
        return len(self._streams)

    def close(self) -> None:
        """Ends every stream, so that processes go to another control plane at once."""
        for stream in self._streams:
            self._end(stream, grpc.StatusCode.UNAVAILABLE, "this control plane is stopping; use another")

    def taps_changed(self, tap: OpenTap) -> int:
        """Tells processes what is tapped now; how many they are that make calls which it is about."""
        concerned = [each for each in self._streams if tap.caller in (None, each.caller)]
        for stream in concerned:
            stream.wake.set()
        return len(concerned)

    async def Report(
        self, request_iterator: AsyncIterator[telemetry_pb2.ReportRequest], context: _Context
    ) -> AsyncIterator[telemetry_pb2.ReportResponse]:
        """Takes the reports of one process in."""
        requests = aiter(request_iterator)
        first = await _first(requests)
        # Read before a refusal: one that crosses the client's first write reaches it without its words (grpc.aio).
        if first is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first request must say who reports")
        service = first.node.service
        caller = await self._access.require_service(
            context, service, f"report as {service or 'a process of no service'}"
        )
        owner = "" if caller is None else caller.workload_id
        with self._limits.admit(owner) as admitted:
            if caller is not None and not admitted:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"the workload reports on {MAX_STREAMS_OF_ONE} streams already"
                )
            session = await self._open(first, owner, context)
            stream = _Stream(session.reporter.service)
            async with contextlib.aclosing(self._serve(stream, session, first, requests, caller)) as responses:
                async for response in responses:
                    yield response
            if stream.ended is not None:
                await context.abort(*stream.ended)

    async def _open(self, first: telemetry_pb2.ReportRequest, owner: str, context: _Context) -> Session:
        try:
            node = node_from_proto(first.node)
            check_node(node)
            return self._recorder.open(node, first.epoch, seconds(first.uptime), owner, _now())
        except (ProtocolError, InvalidValueError) as error:
            self.refused += 1
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except TooManyReportersError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

    async def _serve(
        self,
        stream: _Stream,
        session: Session,
        first: telemetry_pb2.ReportRequest,
        requests: AsyncIterator[telemetry_pb2.ReportRequest],
        caller: Caller | None,
    ) -> AsyncGenerator[telemetry_pb2.ReportResponse, None]:
        revoked = partial(self._end, stream, grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
        reading = asyncio.create_task(self._read(stream, session, first, requests))
        reading.add_done_callback(lambda task: stream.wake.set())
        self._streams.add(stream)
        try:
            with self._access.cut_when_revoked(caller, revoked):
                while True:
                    await stream.wake.wait()
                    stream.wake.clear()
                    if reading.done() or stream.ended is not None:
                        break
                    yield self._response(stream)
            if reading.done():
                reading.result()
        finally:
            self._streams.discard(stream)
            await end_tasks(reading)
            self._recorder.close(session, _now())

    def _end(self, stream: _Stream, code: grpc.StatusCode, details: str) -> None:
        stream.ended = (code, details)
        stream.wake.set()

    async def _read(
        self,
        stream: _Stream,
        session: Session,
        first: telemetry_pb2.ReportRequest,
        requests: AsyncIterator[telemetry_pb2.ReportRequest],
    ) -> None:
        bucket = TokenBucket(REQUESTS_PER_SECOND, REQUESTS_AT_ONCE, _now())
        request: telemetry_pb2.ReportRequest | None = first
        while request is not None:
            try:
                self._take(session, request, _now())
            except InvalidValueError as error:
                self.refused += 1
                node = session.reporter.node
                _log.warning("load reports of %s (%s) end: %s", node.id, node.service or "of no service", error)
                self._end(stream, grpc.StatusCode.INVALID_ARGUMENT, str(error))
                return
            except SupersededError as error:
                self._end(stream, grpc.StatusCode.ABORTED, str(error))
                return
            # Whoever sends too much is read later, so that flow control makes it wait.
            while wait := bucket.take(_now()):
                await asyncio.sleep(wait)
            request = await anext(requests, None)

    def _take(self, session: Session, request: telemetry_pb2.ReportRequest, now: float) -> None:
        reporter = session.reporter
        tapped = list(tapped_from_proto(request, now))
        if request.HasField("covers"):
            self._recorder.take(session, report_from_proto(request, reporter.service, now), now, more=request.more)
        if request.HasField("process"):
            reporter.process = process_from_proto(request.process)
        self._taps.shown(reporter.service, reporter.node.id, tapped, request.tapped_dropped)
        if now >= self._expired_at + STEP:
            self._expired_at = now
            self._recorder.expire(now)

    def _response(self, stream: _Stream) -> telemetry_pb2.ReportResponse:
        return telemetry_pb2.ReportResponse(
            taps=[
                telemetry_pb2.TapOrder(
                    id=order.id,
                    service=service,
                    method=order.method,
                    codes=sorted(CODES[code] for code in order.codes),
                    slower_than=duration_to_proto(order.slower_than),
                    rate=order.rate,
                    remaining=duration_to_proto(left),
                )
                for service, order, left in self._taps.orders(stream.caller, _now())
            ]
        )


async def _first(requests: AsyncIterator[telemetry_pb2.ReportRequest]) -> telemetry_pb2.ReportRequest | None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_REQUEST):
            return await anext(requests, None)
    return None


def _now() -> float:
    return asyncio.get_running_loop().time()
