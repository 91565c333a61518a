"""TraceQueryService: what operators ask about traces."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import trace_pb2, trace_pb2_grpc

from control_plane.access import Access, caller
from control_plane.identity.limits import StreamLimits
from control_plane.traces.convert import filter_from_proto, summary_to_proto, trace_to_proto
from control_plane.traces.following import Following
from control_plane.traces.intake import Intake
from control_plane.traces.links import TraceLinks
from control_plane.traces.query import TraceFilter, check_id_prefix
from control_plane.traces.store import TraceStore
from control_plane.traces.trace import Trace
from mesh_client.core.errors import InvalidValueError

DEFAULT_LIMIT, MAX_LIMIT = 20, 1_000
MAX_FOLLOWERS = 50
LOOK_INTERVAL = 0.2
"""Seconds between looks at the store for a follower, however much comes."""
_AT_ONCE = 500
"""Traces that are looked at before everything else that the control plane does has its turn."""
_SHOWN_IDS = 5

_WatchContext = grpc.aio.ServicerContext[trace_pb2.WatchTracesRequest, trace_pb2.WatchTracesResponse]


class Changes:
    """Wakes whoever waits for new spans, and ends their waiting for good."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Event] = set()
        self.closed = False

    def notify(self) -> None:
        """Spans have come."""
        for each in self._waiting:
            each.set()

    def close(self) -> None:
        """Nothing comes any more."""
        self.closed = True
        self.notify()

    async def wait(self, woken: asyncio.Event, timeout: float | None) -> None:
        """Returns once spans have come, once ``woken`` is set by somebody else, or after ``timeout`` seconds."""
        self._waiting.add(woken)
        try:
            async with asyncio.timeout(timeout):
                await woken.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(woken)


class TraceQueryServicer(trace_pb2_grpc.TraceQueryServiceServicer):
    """Serves ``mesh.v1.TraceQueryService``.

    Args:
        store: of the traces; None when none are kept.
        intake: what fills it.
        links: to Jaeger.
        changes: tells of new spans.
        access: knows who was revoked.
    """

    def __init__(
        self, store: TraceStore | None, intake: Intake | None, links: TraceLinks, changes: Changes, access: Access
    ) -> None:
        self._store = store
        self._intake = intake
        self._links = links
        self._changes = changes
        self._access = access
        self._followers = StreamLimits(MAX_FOLLOWERS)

    async def ListTraces(
        self,
        request: trace_pb2.ListTracesRequest,
        context: grpc.aio.ServicerContext[trace_pb2.ListTracesRequest, trace_pb2.ListTracesResponse],
    ) -> trace_pb2.ListTracesResponse:
        """The last traces."""
        store = await self._kept(context)
        limit = request.limit or DEFAULT_LIMIT
        try:
            wanted = filter_from_proto(request.filter)
            if limit > MAX_LIMIT:
                raise InvalidValueError("limit", limit, f"1 to {MAX_LIMIT}")
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        found = await _latest(store, wanted, limit)
        return trace_pb2.ListTracesResponse(
            traces=[summary_to_proto(trace, self._links) for trace in found],
            store=self._state(store),
            jaeger_ui=self._links.jaeger_ui,
        )

    async def GetTrace(
        self,
        request: trace_pb2.GetTraceRequest,
        context: grpc.aio.ServicerContext[trace_pb2.GetTraceRequest, trace_pb2.GetTraceResponse],
    ) -> trace_pb2.GetTraceResponse:
        """One trace."""
        store = await self._kept(context)
        try:
            prefix = check_id_prefix(request.trace_id)
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        found = store.find(prefix, _now())
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, self._missing(prefix))
        if len(found) > 1:
            shown = ", ".join(trace.id for trace in found[:_SHOWN_IDS]) + (", ..." if len(found) > _SHOWN_IDS else "")
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"trace_id: {len(found)} traces begin with {prefix}: {shown}"
            )
        return trace_to_proto(found[0], self._links)

    async def WatchTraces(
        self, request: trace_pb2.WatchTracesRequest, context: _WatchContext
    ) -> AsyncIterator[trace_pb2.WatchTracesResponse]:
        """New traces, one after the other."""
        store = await self._kept(context)
        try:
            follower = Following(store, filter_from_proto(request.filter))
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        who = caller(context) if self._access.secure else None
        woken = asyncio.Event()
        with self._followers.admit("") as admitted, self._access.cut_when_revoked(who, woken.set):
            if not admitted:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_FOLLOWERS} follow the traces already; ask for lists"
                )
            # Otherwise whoever follows does not know from when on.
            await context.send_initial_metadata(())
            while True:
                told, again = follower.due(_now())
                for trace in told:
                    yield trace_pb2.WatchTracesResponse(trace=summary_to_proto(trace, self._links))
                woken.clear()
                if not (self._changes.closed or self._access.is_revoked(who)):
                    await self._changes.wait(woken, again)
                if self._changes.closed:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the control plane is stopping")
                if self._access.is_revoked(who):
                    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the operator has been revoked")
                await asyncio.sleep(LOOK_INTERVAL)

    async def _kept(self, context: grpc.aio.ServicerContext[Any, Any]) -> TraceStore:
        if self._store is None:
            elsewhere = f"; Jaeger is at {self._links.jaeger_ui}" if self._links else ""
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"this control plane was started to keep no traces{elsewhere}"
            )
        return self._store

    def _missing(self, prefix: str) -> str:
        why = "it was not sampled, not sent here, or has made room for others"
        said = f"no trace that begins with {prefix} is kept: {why}"
        link = self._links.link(prefix) if len(prefix) == 32 else self._links.jaeger_ui
        return f"{said}; see {link}" if link else said

    def _state(self, store: TraceStore) -> trace_pb2.TraceStoreState:
        age = store.limits.max_age
        return trace_pb2.TraceStoreState(
            traces=len(store),
            spans=store.spans,
            bytes=store.cost,
            max_bytes=store.limits.max_bytes,
            max_age=Duration(seconds=int(age), nanos=int(age % 1 * 1e9)),
            evicted=store.evicted.total(),
            refused=0 if self._intake is None else self._intake.refused,
            refused_requests=0 if self._intake is None else self._intake.refused_requests,
        )


async def _latest(store: TraceStore, wanted: TraceFilter, limit: int) -> list[Trace]:
    """As `TraceStore.latest`, with others having their turn."""
    traces = iter(list(store.newest(_now())))
    found: list[Trace] = []
    while len(found) < limit and (some := list(itertools.islice(traces, _AT_ONCE))):
        found += filter(wanted.matches, some)
        await asyncio.sleep(0)
    return found[:limit]


def _now() -> float:
    return asyncio.get_running_loop().time()
