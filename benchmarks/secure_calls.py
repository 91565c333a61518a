"""Calls through the mesh with mutual TLS against raw channels with mutual TLS, to the same servers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import grpc.aio

import mesh_client
from benchmarks.calls import SERVERS, SERVICE, UNARY, Arms, arms_of, measure
from benchmarks.figures import Figure
from benchmarks.processes import child
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from mesh_client.transport import authenticating_options

LOADS = tuple(replace(load, name=f"mtls.{load.name}", about=f"{load.about}, with mutual TLS") for load in UNARY)


@asynccontextmanager
async def _arms() -> AsyncIterator[Arms]:
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(child("benchmarks.secure_plane_process", SERVICE, "orders"))
        joining = {
            "MESH_CONTROL_PLANE": plane.ready["address"],
            "MESH_ENROLMENT": plane.ready["enrolment"],
            "MESH_TOKEN": plane.ready["tokens"][SERVICE],
        }
        servers = [
            await stack.enter_async_context(child("benchmarks.secure_shop_server", environment=joining))
            for _ in range(SERVERS)
        ]
        mesh = await stack.enter_async_context(
            mesh_client.connect(
                plane.ready["address"],
                service="orders",
                enrolment=plane.ready["enrolment"],
                token=plane.ready["tokens"]["orders"],
                insecure=False,
                cache_dir="",
            )
        )
        channel = mesh.channel(SERVICE)
        while len(mesh.state().services[0].endpoints) < SERVERS:
            await mesh.changed()
        identity = mesh.transport.identity
        assert identity is not None
        options = authenticating_options(Principal.service(DEFAULT_TRUST_DOMAIN, SERVICE).dns_name)
        raw = [
            await stack.enter_async_context(
                grpc.aio.secure_channel(f"127.0.0.1:{server.ready}", identity.channel_credentials(), options)
            )
            for server in servers
        ]
        yield arms_of(raw, channel)


async def unary(quick: bool) -> list[Figure]:
    """Unary calls, 1, 16 and 64 at a time."""
    return await measure(LOADS, "unary", 5 if quick else 25, _arms)
