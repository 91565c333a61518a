"""DiscoveryService: one subscription machine per stream, and what all of them share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from mesh.v1 import discovery_pb2

from control_plane.access import Access, Caller
from control_plane.access import caller as connected_caller
from control_plane.convert import ResponseEncoder, request_from_proto
from control_plane.drain_wait import EDGES_BACK_WITHIN, DrainResult, DrainWait
from control_plane.events import EndpointDrained, EndpointUndrained
from control_plane.publisher import Publisher
from control_plane.snapshot import DeltaCache, Snapshot
from control_plane.subscription import (
    MAX_SUBSCRIPTIONS,
    ClientNode,
    Effect,
    ProtocolError,
    Subscriptions,
    SubscriptionState,
)
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import ResourceKind, StatusCode, check_service_name
from mesh_client.core.tally import Tally

_log = logging.getLogger(__name__)

_SERVICE = discovery_pb2.DESCRIPTOR.services_by_name["DiscoveryService"]

_CODES = {
    StatusCode.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    StatusCode.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True, slots=True)
class ClientState:
    """One connected client as operators see it."""

    node: ClientNode | None
    """None until its first request."""
    peer: str
    connected_at: float
    subscriptions: Sequence[SubscriptionState]
    workload_id: str = ""
    """Which workload its certificate names; empty without identity."""


MAX_STREAMS_OF_ONE = 100
"""Streams that one workload may have open, so that none of them keeps the others out: one for each client would do."""

REFUSAL_PATIENCE = 1.0
"""Seconds that somebody who is refused has to say what they have begun to say, and to take what is said to them."""


def _nothing() -> None:
    """Nobody watches."""


def _no_edges(_service: str, _subscribers: Mapping[str, int]) -> Sequence[str]:
    """There are none."""
    return ()


class HubFigures:
    """What is counted of all streams.

    Attributes:
        responses: that were sent.
        rejections: requests that rejected one.
        pushes: from a change's coming in to its acknowledgement, each resource and stream.
    """

    def __init__(self) -> None:
        self.responses = 0
        self.rejections = 0
        self.pushes = Tally()


class _Stream:
    """One open stream."""

    __slots__ = (
        "changed",
        "connected_at",
        "ending",
        "peer",
        "sent",
        "stop_watching",
        "subscriptions",
        "task",
        "wake",
        "workload_id",
        "writing",
    )

    def __init__(
        self, subscriptions: Subscriptions, peer: str, connected_at: float, task: asyncio.Task[object]
    ) -> None:
        self.subscriptions = subscriptions
        self.peer = peer
        self.connected_at = connected_at
        self.wake = asyncio.Event()
        self.writing = asyncio.Lock()
        self.task = task
        self.ending = (grpc.StatusCode.CANCELLED, "the stream was cancelled")
        """The status to end with when the task is cancelled."""
        self.stop_watching: Callable[[], None] = _nothing
        self.workload_id = ""
        self.changed: dict[tuple[ResourceKind, str], float] = {}
        """When the first change of each resource came that has not been sent."""
        self.sent: dict[ResourceKind, list[float]] = {}
        """The same of those that have been sent and not been answered."""

    @property
    def node_id(self) -> str:
        node = self.subscriptions.node
        return node.id if node is not None else self.peer

    def may_hold(self, service: str, endpoint_id: str) -> bool:
        """Whether it may have an endpoint that was published."""
        return self.subscriptions.may_hold_endpoint(service, endpoint_id)

    def identify(self, access: Access, caller: Caller) -> None:
        """The stream is somebody's: it ends when they are revoked."""
        revoked = partial(self.end, grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
        self.stop_watching = access.when_revoked(caller, revoked)

    async def written(self) -> None:
        """Returns when no response is being written; none is begun any more.

        A status that crosses the first response is lost in grpc.aio, and the client waits for its own deadline.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFUSAL_PATIENCE):
                await self.writing.acquire()

    def end(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the stream from outside of it."""
        self.ending = (code, details)
        self.task.cancel()


class StreamHub:
    """Knows every open stream, wakes those that a new snapshot concerns, and whom a drain waits for.

    Args:
        publisher: whose snapshots are streamed.
        emit: takes the event of a drain into the catalog.
        control_plane: name of this control plane in responses.
        max_streams: further streams are refused.
        max_subscriptions: limit of each stream.
        access: who may watch as which service; by default there are no identities.
        edges_missing: takes a service, and how many streams of each service's nodes have subscribed to its endpoints;
            names the edges that send calls to it and of which more must come. By default there are no edges.
    """

    def __init__(
        self,
        publisher: Publisher,
        emit: Callable[[EndpointDrained | EndpointUndrained], None],
        control_plane: str,
        max_streams: int = 10_000,
        max_subscriptions: int = MAX_SUBSCRIPTIONS,
        access: Access | None = None,
        edges_missing: Callable[[str, Mapping[str, int]], Sequence[str]] = _no_edges,
    ) -> None:
        self._access = access or Access(None)
        self._publisher = publisher
        self._emit = emit
        self._max_streams = max_streams
        self._max_subscriptions = max_subscriptions
        self._encoder = ResponseEncoder(control_plane)
        self._delta = DeltaCache()
        self._streams: dict[_Stream, None] = {}
        self._open: Counter[str] = Counter()
        self._subscribers: dict[tuple[ResourceKind, str], dict[_Stream, None]] = {}
        self._drains: list[DrainWait] = []
        self._edges_missing = edges_missing
        self._came: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._edges_back_at = 0.0
        self.figures = HubFigures()
        self.on_rejection: Callable[[str, SubscriptionState], None] | None = None
        """Called with the client's name and the subscription, whenever one rejects a resource."""
        publisher.listen(self._published)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's handler, for ``server.add_generic_rpc_handlers``.

        Requests and responses pass as bytes: what cannot be parsed gets a clear refusal, and what is the same for
        many streams is serialised once.
        """
        method = _SERVICE.methods_by_name["DeltaResources"].name
        return grpc.method_handlers_generic_handler(
            _SERVICE.full_name, {method: grpc.stream_stream_rpc_method_handler(self._serve)}
        )

    def clients(self) -> list[ClientState]:
        """Every connected client, in order of connection."""
        return [
            ClientState(
                stream.subscriptions.node,
                stream.peer,
                stream.connected_at,
                stream.subscriptions.states(),
                stream.workload_id,
            )
            for stream in self._streams
        ]

    def subscriber_count(self, service: str) -> int:
        """How many streams subscribe to a service's endpoints."""
        return len(self._subscribers.get((ResourceKind.ENDPOINTS, service), ()))

    def drain(self, service: str, endpoint_id: str, operator: str = "", at: float = 0.0) -> None:
        """Takes an endpoint out of what is published, at once.

        Args:
            service: the endpoint's service.
            endpoint_id: its id.
            operator: who asks; empty for the endpoint itself.
            at: when the operator asked, seconds since the epoch.
        """
        self._emit(EndpointDrained(service, endpoint_id, operator, at))
        self._publisher.publish_now()

    def undrain(self, service: str, endpoint_id: str) -> None:
        """Takes back what an operator has drained, at once."""
        self._emit(EndpointUndrained(service, endpoint_id))
        self._publisher.publish_now()

    def opened(self) -> None:
        """Clients reach this control plane from now on; those of one before it come back."""
        self._edges_back_at = asyncio.get_running_loop().time() + EDGES_BACK_WITHIN

    async def wait_drained(self, service: str, endpoint_id: str, timeout: float) -> DrainResult:
        """Waits until no subscriber can hold the endpoint any more.

        A subscriber that disconnects is not waited for. Edges that send calls to the service and have not come back yet
        are, for `EDGES_BACK_WITHIN` seconds after `opened`.

        Args:
            service: the endpoint's service.
            endpoint_id: its id.
            timeout: seconds; then it returns with those who are still pending.
        """
        loop = asyncio.get_running_loop()
        drain = DrainWait(service, endpoint_id, list(self._subscribers.get((ResourceKind.ENDPOINTS, service), ())))
        with contextlib.ExitStack() as stack:
            if loop.time() < self._edges_back_at and (missing := self._missing(service)):
                _log.info(
                    "the drain of %s of %s waits for edge %s to come back", endpoint_id, service, ", ".join(missing)
                )
                drain.expect(missing)
                stack.callback(loop.call_at(self._edges_back_at, drain.expect, ()).cancel)
            self._drains.append(drain)
            stack.callback(self._drains.remove, drain)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await drain.done.wait()
        return drain.result()

    def _missing(self, service: str) -> Sequence[str]:
        return self._edges_missing(service, self._came.get(service, Counter()))

    def close(self) -> None:
        """Ends every stream with UNAVAILABLE, so that clients go to another control plane at once."""
        for stream in self._streams:
            stream.end(grpc.StatusCode.UNAVAILABLE, "this control plane is stopping; use another")

    def _published(self, snapshot: Snapshot, changed: frozenset[tuple[ResourceKind, str]]) -> None:
        changed_at = self._publisher.changed_at
        for kind, name in changed:
            for stream in self._subscribers.get((kind, name), ()):
                stream.subscriptions.touch(kind, name)
                stream.changed.setdefault((kind, name), changed_at)
                stream.wake.set()

    async def _serve(self, _requests: object, context: _Context) -> None:
        if len(self._streams) >= self._max_streams:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this control plane serves at most {self._max_streams} streams (max_streams); "
                "use another control plane or raise the limit",
            )
        workload_id = await self._connected(context)
        stream = _Stream(
            Subscriptions(self._delta, self._max_subscriptions),
            context.peer(),
            asyncio.get_running_loop().time(),
            # A coroutine that runs has a task.
            cast("asyncio.Task[object]", asyncio.current_task()),
        )
        stream.workload_id = workload_id
        self._open[workload_id] += 1
        self._streams[stream] = None
        writer = asyncio.create_task(self._write(stream, context))
        writer.add_done_callback(lambda task: _end_with(task, stream))
        try:
            await self._read(stream, context)
        except ProtocolError as error:
            _log.warning("stream of %s at %s ends: %s", stream.node_id, stream.peer, error)
            await stream.written()
            await context.abort(_CODES[error.code], str(error))
        except asyncio.CancelledError:
            await stream.written()
            await context.abort(*stream.ending)
        finally:
            stream.stop_watching()
            writer.cancel()
            self._forget(stream)

    async def _read(self, stream: _Stream, context: _Context) -> None:
        loop = asyncio.get_running_loop()
        while isinstance(data := await context.read(), bytes):
            try:
                message = discovery_pb2.DeltaResourcesRequest.FromString(data)
            except DecodeError:
                raise ProtocolError("request", "is not a DeltaResourcesRequest") from None
            request = request_from_proto(message)
            if stream.subscriptions.node is None:
                caller = await self._may_watch(request.node, context)
                if caller is not None:
                    stream.identify(self._access, caller)
            effect = stream.subscriptions.receive(request, loop.time())
            if effect.answered:
                self._answered(stream, request.kind, rejected=request.rejection is not None)
            if request.rejection is not None and self.on_rejection is not None:
                for state in stream.subscriptions.states():
                    if state.kind is request.kind and state.service in effect.answered and state.rejection:
                        self.on_rejection(stream.node_id, state)
            self._index(stream, request.kind, effect)
            for drain in self._drains:
                drain.look(stream)
                if drain.edges:
                    drain.expect(self._missing(drain.service))
            if stream.subscriptions.ready():
                stream.wake.set()

    async def _connected(self, context: _Context) -> str:
        """Which workload the stream is of, before it has said anything: silent ones are streams too. Empty for nobody.

        What it may watch is decided by its first request.
        """
        if not self._access.secure:
            return ""
        who = connected_caller(context)
        if who is None or self._open[who.workload_id] >= MAX_STREAMS_OF_ONE:
            await self._turn_away(context)
        return who.workload_id

    async def _turn_away(self, context: _Context) -> NoReturn:
        # A refusal that crosses the client's first write may reach it without the reason (grpc.aio).
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFUSAL_PATIENCE):
                await context.read()
        await self._access.require_caller(context, "watch")
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED, f"the workload has {MAX_STREAMS_OF_ONE} streams open already"
        )

    async def _may_watch(self, node: ClientNode | None, context: _Context) -> Caller | None:
        """Whoever calls: a node is a workload of the service that it says it is of."""
        service = "" if node is None else node.service
        if service:
            try:
                check_service_name(service)
            except InvalidValueError as error:
                raise ProtocolError("node.service", f"expected {error.expected}") from None
        return await self._access.require_service(
            context, service, f"watch as {service or 'a node of no service'}", operators=True, control_planes=True
        )

    async def _write(self, stream: _Stream, context: _Context) -> None:
        await self._publisher.opened.wait()
        while True:
            await stream.wake.wait()
            stream.wake.clear()
            responses = stream.subscriptions.next_responses(self._publisher.snapshot)
            for drain in self._drains:
                drain.look(stream)
            for response in responses:
                names = (*(change.resource.name for change in response.changes), *response.removed)
                times = (stream.changed.pop((response.kind, name), None) for name in names)
                stream.sent[response.kind] = [at for at in times if at is not None]
                self.figures.responses += 1
                async with stream.writing:
                    await context.write(self._encoder.encode(response))

    def _answered(self, stream: _Stream, kind: ResourceKind, *, rejected: bool) -> None:
        now = asyncio.get_running_loop().time()
        self.figures.rejections += rejected
        for changed_at in stream.sent.pop(kind, ()):
            self.figures.pushes.succeeded(now - changed_at)

    def _index(self, stream: _Stream, kind: ResourceKind, effect: Effect) -> None:
        for name in effect.unsubscribed:
            self._unindex(stream, kind, name)
        for name in effect.subscribed:
            self._subscribers.setdefault((kind, name), {})[stream] = None
        node = stream.subscriptions.node
        if asyncio.get_running_loop().time() >= self._edges_back_at:
            self._came.clear()
        elif kind is ResourceKind.ENDPOINTS and node is not None:
            for name in effect.subscribed:
                self._came[name][node.service] += 1

    def _unindex(self, stream: _Stream, kind: ResourceKind, name: str) -> None:
        stream.changed.pop((kind, name), None)
        subscribers = self._subscribers[kind, name]
        del subscribers[stream]
        if not subscribers:
            del self._subscribers[kind, name]

    def _forget(self, stream: _Stream) -> None:
        del self._streams[stream]
        self._open[stream.workload_id] -= 1
        if not self._open[stream.workload_id]:
            del self._open[stream.workload_id]
        for state in stream.subscriptions.states():
            self._unindex(stream, state.kind, state.service)
        for drain in self._drains:
            drain.forget(stream)


def _end_with(writer: asyncio.Task[None], stream: _Stream) -> None:
    """A stream whose writer failed must not stay open and silent."""
    if writer.cancelled() or (error := writer.exception()) is None:
        return
    if isinstance(error, grpc.aio.InternalError):  # that is how grpc.aio says that nobody is there to be written to
        stream.task.cancel()
    else:
        _log.error("stream of %s at %s ends: %r", stream.node_id, stream.peer, error)
        stream.end(grpc.StatusCode.INTERNAL, "this control plane failed to answer; its log says why")
