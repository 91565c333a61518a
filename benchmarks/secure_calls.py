"""Calls through the mesh with mutual TLS against raw channels with mutual TLS, to the same servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import mesh_client
from benchmarks.calls import SERVERS, SERVICE, UNARY, Arms, arms_of, measure
from benchmarks.figures import Figure
from benchmarks.processes import Child, child
from mesh_client.mesh import Mesh

CALLER = "orders"
"""Service of the client."""
LOADS = tuple(replace(load, name=f"mtls.{load.name}", about=f"{load.about}, with mutual TLS") for load in UNARY)


def joining_environment(plane: Child) -> dict[str, str]:
    """By which servers join the mesh of a control plane."""
    return {
        "MESH_CONTROL_PLANE": plane.ready["address"],
        "MESH_ENROLMENT": plane.ready["enrolment"],
        "MESH_TOKEN": plane.ready["tokens"][SERVICE],
    }


def connect(plane: Child) -> Mesh:
    """A client of the mesh of a control plane, not entered."""
    return mesh_client.connect(
        plane.ready["address"],
        service=CALLER,
        enrolment=plane.ready["enrolment"],
        token=plane.ready["tokens"][CALLER],
        insecure=False,
        cache_dir="",
    )


@asynccontextmanager
async def _arms() -> AsyncIterator[Arms]:
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(child("benchmarks.secure_plane_process", SERVICE, CALLER))
        joining = joining_environment(plane)
        servers = [
            await stack.enter_async_context(child("benchmarks.secure_shop_server", environment=joining))
            for _ in range(SERVERS)
        ]
        mesh = await stack.enter_async_context(connect(plane))
        channel = mesh.channel(SERVICE)
        while len(mesh.state().services[0].endpoints) < SERVERS:
            await mesh.changed()
        # With the certificate and the options of the mesh's own. Grpc shares connections among channels that are alike.
        raw = [
            await stack.enter_async_context(mesh.transport.open_channel(f"127.0.0.1:{server.ready}", SERVICE))
            for server in servers
        ]
        yield arms_of(raw, channel)


async def unary(quick: bool) -> list[Figure]:
    """Unary calls, 1, 16 and 64 at a time."""
    return await measure(LOADS, "unary", 5 if quick else 25, _arms)
