"""RegistryService: registration with the embedded registry, and drains for every registry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol

import grpc
from mesh.v1 import registry_pb2, registry_pb2_grpc

from control_plane.access import TOLD_AT_ONCE, TOLD_PER_SECOND, Access, Caller
from control_plane.convert import duration_to_proto, endpoint_from_proto
from control_plane.identity.limits import CallerLimits
from control_plane.sources.embedded import EmbeddedSource, LeaseStream
from control_plane.sources.leases import LeaseHeldError, LeaseLimitError
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import Endpoint, check_endpoint_id, check_service_name

DEFAULT_DRAIN_TIMEOUT = 10.0
MAX_DRAIN_TIMEOUT = 300.0
MAX_PENDING = 100
MAX_LEASES_OF_ONE = 100
"""Endpoints that one workload may register, so that none of them keeps the others out: mostly it is one."""

_log = logging.getLogger(__name__)

_RegisterContext = grpc.aio.ServicerContext[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse]
_DrainContext = grpc.aio.ServicerContext[registry_pb2.DrainRequest, registry_pb2.DrainResponse]


class DrainOutcome(Protocol):
    """How a drain ended."""

    @property
    def acknowledged(self) -> int:
        """Subscribers that acknowledged a version without the endpoint."""

    @property
    def pending(self) -> Sequence[str]:
        """Node ids of those that have not."""


class DrainWatch(Protocol):
    """Takes endpoints out of what is published, and knows who has acknowledged that."""

    def drain(self, service: str, endpoint_id: str) -> None:
        """Publishes at once without the endpoint."""

    async def wait_drained(self, service: str, endpoint_id: str, timeout: float) -> DrainOutcome:
        """Returns when every subscriber has acknowledged, or after ``timeout`` seconds."""


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    """Serves ``mesh.v1.RegistryService``.

    Args:
        leases: the embedded registry; None when another registry is in use.
        drains: what takes endpoints out of what is published.
        registry: what the operator chose as registry, for messages.
        access: who may register and drain what; by default there are no identities.
    """

    def __init__(
        self,
        leases: EmbeddedSource | None,
        drains: DrainWatch,
        registry: str = "embedded",
        access: Access | None = None,
    ) -> None:
        self._access = access or Access(None)
        self._leases = leases
        self._drains = drains
        self._registry = registry
        self._streams: set[LeaseStream] = set()
        self._registered: Counter[str] = Counter()
        self._told = CallerLimits(TOLD_PER_SECOND, TOLD_AT_ONCE)
        self._closed = False

    async def Register(
        self,
        request_iterator: AsyncIterator[registry_pb2.RegisterRequest],
        context: _RegisterContext,
    ) -> AsyncIterator[registry_pb2.RegisterResponse]:
        """Holds an endpoint's lease while the stream is open."""
        leases = self._leases
        requests = aiter(request_iterator)
        # Also before a refusal: one that crosses the client's first write reaches it as "INTERNAL: Internal error from
        # Core", without the reason (grpc.aio).
        first = await anext(requests, None)
        if leases is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this control plane's registry is {self._registry}: register there, "
                "or start the control plane with --registry embedded",
            )
        if first is None:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, "the first request must state the service and the endpoint"
            )
        caller = await self._may_register(first, context)
        if caller is not None and self._registered[caller.workload_id] >= MAX_LEASES_OF_ONE:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"the workload has registered {MAX_LEASES_OF_ONE} endpoints already"
            )
        stream = await _register(leases, first, context, _workload(caller))
        self._streams.add(stream)
        self._count(caller, 1)
        stop_watching = self._access.when_revoked(caller, stream.ended.set)
        try:
            if self._closed:
                stream.ended.set()
            await leases.confirmed()
            confirmation = registry_pb2.RegisterResponse(
                lease_token=stream.token, grace=duration_to_proto(leases.lease_grace)
            )
            yield confirmation
            async with aclosing(_until(stream.ended, requests)) as further:
                async for request in further:
                    await _update(leases, stream, request, context)
                    await leases.confirmed()
                    yield confirmation
            if self._access.is_revoked(caller):
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
            if self._closed:
                await context.abort(
                    grpc.StatusCode.UNAVAILABLE, "the control plane is stopping; come back with the lease token"
                )
            if stream.ended.is_set():
                await context.abort(
                    grpc.StatusCode.ABORTED,
                    f"the lease of {stream.endpoint_id} was taken over by another stream that showed its token",
                )
            # Here the holder has half-closed, or its connection broke: both end the requests. Only a live connection
            # takes another message, so a broken one does not get past this.
            yield confirmation
            leases.closed(stream)
        finally:
            stop_watching()
            self._count(caller, -1)
            self._streams.discard(stream)
            # Clients take whoever is published for the service: a revoked workload must not stay for the grace.
            if self._access.is_revoked(caller):
                leases.closed(stream)
            else:
                leases.broken(stream)

    def _count(self, caller: Caller | None, change: int) -> None:
        if caller is not None:
            self._registered[caller.workload_id] += change
            if not self._registered[caller.workload_id]:
                del self._registered[caller.workload_id]

    async def _may_register(self, request: registry_pb2.RegisterRequest, context: _RegisterContext) -> Caller | None:
        try:
            service = check_service_name(request.service)
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return await self._access.require_service(context, service, f"register for {service}")

    def close(self) -> None:
        """Ends every registration's stream with UNAVAILABLE, so that the holders come back at once; leases stay."""
        self._closed = True
        for stream in self._streams:
            stream.ended.set()

    async def Drain(self, request: registry_pb2.DrainRequest, context: _DrainContext) -> registry_pb2.DrainResponse:
        """Takes an endpoint out of what is published and waits for the subscribers.

        A workload may drain what it has registered itself, and what is registered elsewhere for its service.
        """
        try:
            service = check_service_name(request.service)
            endpoint_id = check_endpoint_id(request.endpoint_id)
            timeout = DEFAULT_DRAIN_TIMEOUT
            if request.HasField("timeout"):
                timeout = request.timeout.seconds + request.timeout.nanos / 1e9
            if not 0.0 <= timeout <= MAX_DRAIN_TIMEOUT:
                raise InvalidValueError("timeout", timeout, f"0 to {MAX_DRAIN_TIMEOUT:.0f} seconds")
        except InvalidValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        caller = await self._access.require_service(context, service, f"drain an endpoint of {service}", operators=True)
        if self._leases is not None:
            if (
                caller is not None
                and not caller.is_operator
                and not self._leases.is_of(service, endpoint_id, caller.workload_id, request.lease_token)
            ):
                await self._access.refuse(
                    context,
                    caller,
                    f"may not drain endpoint {endpoint_id} of {service}: another workload than {caller.workload_id} "
                    "has registered it, and its lease token was not shown",
                )
            self._leases.drain(service, endpoint_id)
        if not self._told.take(_workload(caller), time.monotonic()):
            _log.info(
                "%s at %s drains %s/%s", caller or "a caller without identity", context.peer(), service, endpoint_id
            )
        self._drains.drain(service, endpoint_id)
        outcome = await self._drains.wait_drained(service, endpoint_id, timeout)
        return registry_pb2.DrainResponse(
            complete=not outcome.pending,
            acknowledged=outcome.acknowledged,
            pending=outcome.pending[:MAX_PENDING],
        )


def _workload(caller: Caller | None) -> str:
    return "" if caller is None else caller.workload_id


async def _register(
    leases: EmbeddedSource, request: registry_pb2.RegisterRequest, context: _RegisterContext, workload: str
) -> LeaseStream:
    try:
        return await leases.register(request.service, _endpoint(request), request.lease_token, context.peer(), workload)
    except InvalidValueError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except LeaseHeldError as error:
        await context.abort(grpc.StatusCode.ALREADY_EXISTS, str(error))
    except LeaseLimitError as error:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))


async def _update(
    leases: EmbeddedSource, stream: LeaseStream, request: registry_pb2.RegisterRequest, context: _RegisterContext
) -> None:
    try:
        if request.service not in ("", stream.service):
            raise InvalidValueError("service", request.service, f"{stream.service!r}: it is constant over a stream")
        leases.update(stream, _endpoint(request))
    except InvalidValueError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


def _endpoint(request: registry_pb2.RegisterRequest) -> Endpoint:
    if not request.HasField("endpoint"):
        raise InvalidValueError("endpoint", None, "the endpoint whole, in every request")
    return endpoint_from_proto(request.endpoint)


async def _until(
    ended: asyncio.Event, requests: AsyncIterator[registry_pb2.RegisterRequest]
) -> AsyncGenerator[registry_pb2.RegisterRequest, None]:
    """The requests, until there are no more or the stream is ended from this side."""
    end = asyncio.ensure_future(ended.wait())
    read: asyncio.Future[registry_pb2.RegisterRequest | None] | None = None
    try:
        while True:
            read = asyncio.ensure_future(_next(requests))
            await asyncio.wait((end, read), return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                return
            request = read.result()
            if request is None:
                return
            yield request
    finally:
        end.cancel()
        if read is not None:
            read.cancel()


async def _next(requests: AsyncIterator[registry_pb2.RegisterRequest]) -> registry_pb2.RegisterRequest | None:
    return await anext(requests, None)
