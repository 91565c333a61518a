"""A mesh in one process for tests of channels: a control plane on the embedded registry, servers on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc.aio
import yaml
from mesh.v1 import admin_pb2, admin_pb2_grpc, endpoint_pb2, registry_pb2, registry_pb2_grpc

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.mesh import Mesh
from mesh_client.mesh_state import ServiceState

PATIENCE = 30.0
"""Seconds that a condition may take to come true."""

AddServices = Callable[[grpc.aio.Server], None]


async def serve(stack: AsyncExitStack, add: AddServices) -> tuple[grpc.aio.Server, int]:
    """A server on a port that the system picks, stopped when the stack is left."""
    server = grpc.aio.server()
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return server, port


def state_of(mesh: Mesh, service: str) -> ServiceState:
    """What the client knows of a service that it follows."""
    return next(state for state in mesh.state().services if state.service == service)


async def until(mesh: Mesh, condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; it is looked at after each change that the client sees."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await mesh.changed()


@dataclass
class Rig:
    """One control plane, the endpoints registered with it, and clients of it."""

    plane: ControlPlane
    stack: AsyncExitStack
    control: grpc.aio.Channel
    leases: dict[str, Any] = field(default_factory=dict)

    async def register(
        self, service: str, endpoint_id: str, port: int, *, zone: str = "", metadata: dict[str, str] | None = None
    ) -> None:
        """Registers an endpoint, held until `deregister` or the end."""
        lease = registry_pb2_grpc.RegistryServiceStub(self.control).Register()
        endpoint = endpoint_pb2.Endpoint(
            id=endpoint_id,
            address="127.0.0.1",
            port=port,
            metadata=metadata or {},
            locality=endpoint_pb2.Locality(zone=zone),
        )
        await lease.write(registry_pb2.RegisterRequest(service=service, endpoint=endpoint))
        assert await lease.read() is not grpc.aio.EOF
        self.leases[endpoint_id] = lease
        self.stack.callback(lease.cancel)

    async def deregister(self, endpoint_id: str) -> None:
        """Ends a registration as a server does that stops."""
        lease = self.leases.pop(endpoint_id)
        await lease.done_writing()
        assert await lease.read() is grpc.aio.EOF

    async def serve(self, service: str, endpoint_id: str, add: AddServices, **endpoint: Any) -> grpc.aio.Server:
        """A server that is registered."""
        server, port = await serve(self.stack, add)
        await self.register(service, endpoint_id, port, **endpoint)
        return server

    async def mesh(self, **options: Any) -> Mesh:
        """A client, without a disk cache and with a seed."""
        options = {"cache_dir": "", "rng": Random(7), **options}
        return await self.stack.enter_async_context(mesh_client.connect(self.plane.address, **options))

    async def channel(self, mesh: Mesh, service: str, ids: Iterable[str]) -> grpc.aio.Channel:
        """A channel to a service whose endpoints the client knows."""
        channel, wanted = mesh.channel(service), set(ids)
        await until(mesh, lambda: {endpoint.id for endpoint in state_of(mesh, service).endpoints} == wanted)
        return channel

    async def policy(self, mesh: Mesh, document: dict[str, Any]) -> None:
        """Stores a policy and waits until the client, which follows the service, obeys it."""
        service = document["service"]
        mesh.channel(service)
        await until(mesh, lambda: state_of(mesh, service).policy_version != "")
        before = state_of(mesh, service).policy_version
        answer = await admin_pb2_grpc.AdminServiceStub(self.control).ApplyPolicy(
            admin_pb2.ApplyPolicyRequest(document=yaml.safe_dump(document))
        )
        assert answer.changed
        await until(mesh, lambda: state_of(mesh, service).policy_version != before)


@asynccontextmanager
async def open_rig(directory: Path) -> AsyncIterator[Rig]:
    """A rig with a control plane that publishes changes at once."""
    plane = ControlPlane(
        ControlPlaneOptions(
            insecure=True, address="127.0.0.1:0", data_dir=directory, debounce_quiet=0.002, debounce_maximum=0.02
        )
    )
    await plane.start()
    try:
        async with grpc.aio.insecure_channel(plane.address) as control, AsyncExitStack() as stack:
            yield Rig(plane, stack, control)
    finally:
        await plane.stop(0)
