"""The same service through a raw channel and through the mesh, for tests that hold the two together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from mesh_client.mesh import Mesh
from tests.integration.mesh_rig import AddServices, open_rig, serve

KINDS = ("raw", "mesh")
SERVICE = "interop"


@dataclass
class Reached:
    """Servers of one service, reached by one kind of channel."""

    kind: str
    channel: grpc.aio.Channel
    target: str
    mesh: Mesh | None

    def another(self, interceptors: Sequence[grpc.aio.ClientInterceptor] = ()) -> grpc.aio.Channel:
        """A further channel to the service."""
        if self.mesh is not None:
            return self.mesh.channel(SERVICE, interceptors=interceptors)
        return grpc.aio.insecure_channel(self.target, interceptors=list(interceptors))


@asynccontextmanager
async def reach(kind: str, directory: Path, *instances: AddServices) -> AsyncIterator[Reached]:
    """Starts one instance for each of ``instances`` and a channel to them all; a raw channel goes to the first."""
    if kind == "raw":
        async with AsyncExitStack() as stack:
            _, port = await serve(stack, instances[0])
            target = f"127.0.0.1:{port}"
            async with grpc.aio.insecure_channel(target) as channel:
                yield Reached(kind, channel, target, None)
    else:
        async with open_rig(directory) as rig:
            for number, add in enumerate(instances):
                await rig.serve(SERVICE, f"i{number}", add)
            mesh = await rig.mesh()
            channel = await rig.channel(mesh, SERVICE, [f"i{number}" for number in range(len(instances))])
            yield Reached(kind, channel, "", mesh)
