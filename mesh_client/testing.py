"""For tests of services that use the mesh: a control plane in the test's own process, and a clock that stands still.

    async with InMemoryControlPlane() as control_plane:
        server = mesh_client.server("orders", control_plane=control_plane.address, insecure=True)
        add_OrderServiceServicer_to_server(Orders(), server)
        await server.start()
        await control_plane.registered("orders")
        async with mesh_client.connect(control_plane.address, cache_dir="", insecure=True) as mesh:
            await OrderServiceStub(mesh.channel("orders")).GetOrder(...)

Sockets are real, on the loopback interface; nothing is patched. Needs the ``server`` extra only where a server is made.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Self

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import discovery_pb2, discovery_pb2_grpc, registry_pb2, registry_pb2_grpc, resource_pb2

from mesh_client import transport
from mesh_client.convert import endpoint_from_proto, resource_to_proto
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import Endpoint, check_service_name, sorted_endpoints
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.store import EndpointsResource, PolicyResource

_POLICY = resource_pb2.RESOURCE_TYPE_SERVICE_POLICY
_ENDPOINTS = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS


class FakeClock:
    """A clock that moves only when told to. Give it to `mesh_client.connect` as ``clock``.

    Breakers, ejections, budgets and slow starts then follow it. Deadlines on the wire and waits between attempts are
    real.
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        """Seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Moves the clock on.

        Raises:
            InvalidValueError: ``seconds`` is negative; the clock is monotonic.
        """
        if seconds < 0:
            raise InvalidValueError("seconds", seconds, "0 or more")
        self._now += seconds


@dataclass(slots=True)
class _Service:
    policy: PolicyResource
    endpoints: EndpointsResource


@dataclass(eq=False, slots=True)
class _Stream:
    node: str = ""
    subscribed: dict[int, dict[str, str]] = field(default_factory=lambda: {_POLICY: {}, _ENDPOINTS: {}})
    """By type and service: the version sent last; empty before."""
    greet: set[int] = field(default_factory=set)
    """Types whose first request has not been answered."""
    acknowledged: dict[tuple[int, str], str] = field(default_factory=dict)
    unanswered: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class InMemoryControlPlane:
    """A control plane that says what the test tells it to, and takes registrations of real servers.

    It sends whole resources, at once; nothing is stored, delayed or guarded.

    Args:
        address: where to listen; by default any free port.
        credentials: for callers that have an identity; by default it speaks plaintext. Nobody's rights are checked.
    """

    def __init__(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        self.address = address
        """``host:port``; the real port once it has started."""
        self._credentials = credentials
        self._services: dict[str, _Service] = {}
        self._streams: set[_Stream] = set()
        self._versions = itertools.count(1)
        self._server: grpc.aio.Server | None = None
        self._change = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Starts it."""
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stops it."""
        await self.stop()

    async def start(self) -> None:
        """Listens; after `stop` at the same address again, with everything it was told.

        Raises:
            ConfigError: the port is taken.
        """
        self._server = grpc.aio.server(options=transport.SERVER_OPTIONS)
        self.add_to(self._server)
        if self._credentials is None:
            port = transport.add_port(self._server, self.address)
        else:
            port = self._server.add_secure_port(self.address, self._credentials)
        self.address = f"{self.address.rpartition(':')[0]}:{port}"
        await self._server.start()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Adds its services to a server of the test's own, in place of `start`."""
        discovery_pb2_grpc.add_DiscoveryServiceServicer_to_server(_Discovery(self), server)
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(_Registry(self), server)

    async def stop(self) -> None:
        """Vanishes: streams break, as if it had been killed."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def set_endpoints(self, service: str, *endpoints: Endpoint) -> None:
        """Publishes these endpoints, in place of those before. With none the service is known and empty.

        Raises:
            InvalidValueError: the name is no DNS label, or two endpoints have one id.
        """
        resource = EndpointsResource(service, self._version(), sorted_endpoints(endpoints))
        self._service(service).endpoints = resource
        self._publish()

    def set_policy(self, policy: ServicePolicy, *, provisional: bool = False) -> None:
        """Publishes a policy; its service becomes known.

        Args:
            policy: the policy.
            provisional: as a control plane does that cannot read the service's own policy.
        """
        self._service(policy.service).policy = PolicyResource(policy.service, self._version(), policy, provisional)
        self._publish()

    def remove(self, service: str) -> None:
        """Makes a service unknown."""
        self._services.pop(service, None)
        self._publish()

    def endpoints(self, service: str) -> tuple[Endpoint, ...]:
        """What is published of a service; nothing for one that is not known."""
        known = self._services.get(service)
        return () if known is None else known.endpoints.endpoints

    async def registered(self, service: str, count: int = 1) -> tuple[Endpoint, ...]:
        """Returns the endpoints of a service when there are at least ``count``."""
        await self._until(lambda: len(self.endpoints(service)) >= count)
        return self.endpoints(service)

    async def acknowledged(self, service: str) -> None:
        """Returns when a client follows the service and every one that does has acknowledged what is published."""
        await self._until(
            lambda: (
                bool(self._subscribers(service))
                and all(self._is_current(stream, service) for stream in self._subscribers(service))
            )
        )

    def _subscribers(self, service: str) -> list[_Stream]:
        return [stream for stream in self._streams if service in stream.subscribed[_ENDPOINTS]]

    def _is_current(self, stream: _Stream, service: str) -> bool:
        return all(
            stream.acknowledged.get((kind, service)) == self._published(kind, service)[0]
            for kind in (_POLICY, _ENDPOINTS)
            if service in stream.subscribed[kind]
        )

    def _published(self, kind: int, service: str) -> tuple[str, PolicyResource | EndpointsResource | None]:
        known = self._services.get(service)
        if known is None:
            return "unknown", None
        resource = known.policy if kind == _POLICY else known.endpoints
        return resource.version, resource

    def _service(self, name: str) -> _Service:
        known = self._services.get(name)
        if known is None:
            known = self._services[check_service_name(name)] = _Service(
                PolicyResource(name, self._version(), ServicePolicy(service=name)),
                EndpointsResource(name, self._version(), ()),
            )
        return known

    def _version(self) -> str:
        return f"v{next(self._versions)}"

    def _publish(self) -> None:
        for stream in self._streams:
            stream.wake.set()
        self._changed()

    def _changed(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._change.wait()


class _Discovery(discovery_pb2_grpc.DiscoveryServiceServicer):
    def __init__(self, control_plane: InMemoryControlPlane) -> None:
        self._plane = control_plane

    async def DeltaResources(
        self, request_iterator: AsyncIterator[discovery_pb2.DeltaResourcesRequest], context: object
    ) -> AsyncIterator[discovery_pb2.DeltaResourcesResponse]:
        """One client's stream."""
        stream = _Stream()
        reader = asyncio.create_task(self._read(stream, request_iterator))
        self._plane._streams.add(stream)
        try:
            for nonce in map(str, itertools.count(1)):
                while not (responses := self._responses(stream, nonce)) and not reader.done():
                    await stream.wake.wait()
                    stream.wake.clear()
                if not responses:
                    return
                for response in responses:
                    yield response
        finally:
            reader.cancel()
            self._plane._streams.discard(stream)
            self._plane._changed()

    async def _read(self, stream: _Stream, requests: AsyncIterator[discovery_pb2.DeltaResourcesRequest]) -> None:
        begun: set[int] = set()
        async for request in requests:
            stream.node = request.node.id or stream.node
            names = stream.subscribed[request.type]
            if request.type not in begun:
                begun.add(request.type)
                stream.greet.add(request.type)
            names.update((name, "") for name in request.subscribe if name not in names)
            names.update((name, "") for name in request.resync)
            for name in request.unsubscribe:
                names.pop(name, None)
            for kind, name, version in stream.unanswered.pop(request.response_nonce, ()):
                if name not in request.error.resources:
                    stream.acknowledged[kind, name] = version
            stream.wake.set()
            self._plane._changed()
        stream.wake.set()

    def _responses(self, stream: _Stream, nonce: str) -> list[discovery_pb2.DeltaResourcesResponse]:
        responses = []
        for kind in (_POLICY, _ENDPOINTS):
            response = discovery_pb2.DeltaResourcesResponse(type=kind, nonce=f"{kind}/{nonce}", control_plane="testing")
            sent: list[tuple[int, str, str]] = []
            for name, version in stream.subscribed[kind].items():
                published, resource = self._plane._published(kind, name)
                if published == version:
                    continue
                if resource is None:
                    response.removed.append(name)
                else:
                    response.resources.append(resource_to_proto(resource))
                sent.append((kind, name, published))
            if sent or kind in stream.greet:
                stream.greet.discard(kind)
                stream.subscribed[kind].update((name, version) for _, name, version in sent)
                stream.unanswered[response.nonce] = sent
                responses.append(response)
        return responses


class _Registry(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, control_plane: InMemoryControlPlane) -> None:
        self._plane = control_plane

    async def Register(
        self,
        request_iterator: AsyncIterator[registry_pb2.RegisterRequest],
        context: grpc.aio.ServicerContext[registry_pb2.RegisterRequest, registry_pb2.RegisterResponse],
    ) -> AsyncIterator[registry_pb2.RegisterResponse]:
        """Publishes the endpoint while the stream is open."""
        service, endpoint_id = "", ""
        try:
            async for request in request_iterator:
                try:
                    endpoint = endpoint_from_proto(request.endpoint)
                    service, endpoint_id = check_service_name(request.service), endpoint.id
                except InvalidValueError as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                self._plane.set_endpoints(service, *self._others(service, endpoint_id), endpoint)
                yield registry_pb2.RegisterResponse(lease_token="testing", grace=Duration())
        finally:
            if service in self._plane._services:
                self._plane.set_endpoints(service, *self._others(service, endpoint_id))

    async def Drain(
        self,
        request: registry_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[registry_pb2.DrainRequest, registry_pb2.DrainResponse],
    ) -> registry_pb2.DrainResponse:
        """Withdraws the endpoint and waits for the subscribers."""
        service = request.service
        if service in self._plane._services:
            self._plane.set_endpoints(service, *self._others(service, request.endpoint_id))
        pending: list[_Stream] = []

        def acknowledged() -> bool:
            pending[:] = [
                each for each in self._plane._subscribers(service) if not self._plane._is_current(each, service)
            ]
            return not pending

        try:
            async with asyncio.timeout(request.timeout.ToTimedelta().total_seconds() or 10.0):
                await self._plane._until(acknowledged)
        except TimeoutError:
            pass
        return registry_pb2.DrainResponse(
            complete=not pending,
            acknowledged=len(self._plane._subscribers(service)) - len(pending),
            pending=[stream.node for stream in pending],
        )

    def _others(self, service: str, endpoint_id: str) -> list[Endpoint]:
        return [endpoint for endpoint in self._plane.endpoints(service) if endpoint.id != endpoint_id]
