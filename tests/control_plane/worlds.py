"""A real control plane whose registry is the test, and raw clients of its streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from mesh.v1 import admin_pb2_grpc, discovery_pb2, discovery_pb2_grpc, registry_pb2_grpc, resource_pb2

from control_plane.events import EndpointEvent, ServiceObserved, SourceConnected
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.sources import Emit
from mesh_client.core.model import Endpoint

POLICY = resource_pb2.RESOURCE_TYPE_SERVICE_POLICY
ENDPOINTS = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS
BOUND = 30.0
"""Seconds after which a test that waits for something gives up."""

Request = discovery_pb2.DeltaResourcesRequest
Response = discovery_pb2.DeltaResourcesResponse


class HandSource:
    """A registry that says what the test says."""

    name = "hand"

    def __init__(self, *, connected: bool = True) -> None:
        self._connected = connected
        self._emit: asyncio.Future[Emit] | None = None
        self._failed: asyncio.Future[None] | None = None

    async def run(self, emit: Emit) -> None:
        if self._connected:
            emit(SourceConnected(self.name))
        self._future().set_result(emit)
        self._failed = asyncio.get_running_loop().create_future()
        await self._failed

    def fail(self, error: Exception) -> None:
        assert self._failed is not None
        self._failed.set_exception(error)

    def _future(self) -> asyncio.Future[Emit]:
        if self._emit is None:
            self._emit = asyncio.get_running_loop().create_future()
        return self._emit

    async def emit(self, event: EndpointEvent) -> None:
        async with asyncio.timeout(BOUND):
            (await asyncio.shield(self._future()))(event)

    async def lists(self, service: str, *ids: str, metadata: str = "") -> None:
        await self.emit(
            ServiceObserved(
                self.name,
                service,
                tuple(Endpoint(id, "127.0.0.1", 1000, metadata={"filler": metadata} if metadata else {}) for id in ids),
            )
        )


class World:
    """A control plane that runs, its registry in the test's hand, and stubs to call it."""

    def __init__(self, plane: ControlPlane, source: HandSource, channel: grpc.aio.Channel) -> None:
        self.plane = plane
        self.source = source
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.registry = registry_pb2_grpc.RegistryServiceStub(channel)
        self.channel = channel

    def client(self, node: str = "client", service: str = "") -> Client:
        return Client(self.plane.address, node, service)


@asynccontextmanager
async def running(options: ControlPlaneOptions | None = None, source: HandSource | None = None) -> AsyncIterator[World]:
    source = source or HandSource()
    plane = ControlPlane(
        options or ControlPlaneOptions(insecure=True, debounce_quiet=0.001, debounce_maximum=0.01), source=source
    )
    await plane.start()
    try:
        async with grpc.aio.insecure_channel(plane.address) as channel:
            yield World(plane, source, channel)
    finally:
        await plane.stop(grace=0.5)


class Client:
    """One raw stream on a connection of its own."""

    def __init__(self, address: str, node: str, service: str = "") -> None:
        self.node = node
        self.service = service
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self.call = discovery_pb2_grpc.DiscoveryServiceStub(self.channel).DeltaResources()
        self.held: dict[str, dict[str, int]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.call.cancel()
        await self.channel.close()

    async def send(self, request: Request) -> None:
        if not request.HasField("node"):
            request.node.id, request.node.service = self.node, self.service
        async with asyncio.timeout(BOUND):
            await self.call.write(request)

    async def subscribe(
        self, *names: str, types: tuple[resource_pb2.ResourceType.ValueType, ...] = (POLICY, ENDPOINTS)
    ) -> None:
        for each in types:
            await self.send(Request(type=each, subscribe=names))

    async def read(self) -> Response:
        """The next response, whatever its type."""
        async with asyncio.timeout(BOUND):
            response = await self.call.read()
        assert isinstance(response, Response), "the stream has ended"
        return response

    async def acknowledge(self, response: Response) -> None:
        await self.send(Request(type=response.type, response_nonce=response.nonce))

    async def next(self, kind: resource_pb2.ResourceType.ValueType = ENDPOINTS) -> Response:
        """The next response of one type; everything up to it is acknowledged."""
        while True:
            response = await self.read()
            await self.acknowledge(response)
            if response.type == kind:
                return response

    async def follow(self, service: str, *ids: str) -> None:
        """Reads and acknowledges until the client holds exactly these endpoints."""
        while self.held.get(service, {}).keys() != set(ids):
            self.take(await self.next())

    def take(self, response: Response) -> None:
        for name in response.removed:
            self.held.pop(name, None)
        for resource in response.resources:
            if resource.HasField("endpoints"):
                self.held[resource.name] = {}
            held = self.held[resource.name]
            for each in resource.endpoints_delta.removed_ids:
                del held[each]
            for endpoint in [*resource.endpoints.endpoints, *resource.endpoints_delta.upserts]:
                held[endpoint.id] = endpoint.port

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the control plane ended the stream."""
        async with asyncio.timeout(BOUND):
            try:
                while isinstance(await self.call.read(), Response):
                    pass
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details() or ""
            return await self.call.code(), await self.call.details()
