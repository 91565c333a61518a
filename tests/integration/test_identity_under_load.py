"""Certificates and trust roots that change on both sides while calls are made: none of them fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from shop.v1 import orders_pb2_grpc

import mesh_client
from mesh_client.identity import IdentityState
from mesh_client.mesh import Mesh
from mesh_client.mesh_server import MeshServer
from tests.integration.identity_rig import PATIENCE, IdentityRig, open_rig
from tests.integration.orders import ORDER, Orders

CALLERS = 8
LIFETIME = 7.0
"""Seconds for which certificates are good, less up to one that they are rounded by: a third of that is left when they
are renewed, and a machine under load may stand still for two seconds."""


@dataclass
class Load:
    """Calls that go on until they are stopped."""

    mesh: Mesh
    done: int = 0
    stopped: bool = False

    async def run(self) -> None:
        stub = orders_pb2_grpc.OrderServiceStub(self.mesh.channel("orders"))
        while not self.stopped:
            await stub.GetOrder(ORDER, timeout=10.0)
            self.done += 1


@asynccontextmanager
async def loaded(rig: IdentityRig, tmp_path: Path) -> AsyncIterator[tuple[Load, Mesh, MeshServer]]:
    """A server and a client with identities of their own, and calls from one to the other; none may fail."""
    common: dict[str, Any] = {"control_plane": rig.mesh, "enrolment": rig.enrolment, "insecure": False}
    ages: dict[str, Any] = {"max_connection_age": 1.0, "max_connection_age_grace": 1.0}
    server = mesh_client.server("orders", token=await rig.token("orders"), **ages, **common)
    orders_pb2_grpc.add_OrderServiceServicer_to_server(Orders(), server)
    await server.start()
    try:
        mesh = mesh_client.connect(
            service="billing",
            token=await rig.token("billing"),
            cache_dir="",
            identity_dir=tmp_path / "billing",
            **common,
        )
        async with mesh:
            load = Load(mesh)
            async with asyncio.TaskGroup() as callers:
                for _ in range(CALLERS):
                    callers.create_task(load.run())
                try:
                    yield load, mesh, server
                finally:
                    load.stopped = True
    finally:
        await server.stop(1.0)


def client_identity(mesh: Mesh) -> IdentityState:
    state = mesh.state().identity
    assert state is not None
    return state


def server_identity(server: MeshServer) -> IdentityState:
    state = server.status().identity
    assert state is not None
    return state


async def calls(load: Load, count: int) -> None:
    """Returns when so many more calls have been made."""
    goal = load.done + count
    async with asyncio.timeout(PATIENCE):
        while load.done < goal:
            await asyncio.sleep(0.01)


async def test_no_call_fails_while_certificates_are_renewed_on_both_sides(tmp_path: Path) -> None:
    async with open_rig(leaf_lifetime=LIFETIME) as rig, loaded(rig, tmp_path) as (load, mesh, server):
        await calls(load, 10)
        first = {client_identity(mesh).serial, server_identity(server).serial}
        async with asyncio.timeout(PATIENCE):
            while first & {client_identity(mesh).serial, server_identity(server).serial}:
                await calls(load, 10)
        await calls(load, 100)
        assert client_identity(mesh).warning == server_identity(server).warning == ""


async def test_no_call_fails_while_the_trust_root_is_rotated(tmp_path: Path) -> None:
    async with open_rig(tmp_path / "ca", leaf_lifetime=10.0) as rig, loaded(rig, tmp_path) as (load, mesh, server):
        await calls(load, 10)
        old = client_identity(mesh).root
        await rig.authority.add_root()
        await rig.authority.confirmed()
        await calls(load, 50)
        await rig.authority.overlap()
        async with asyncio.timeout(PATIENCE):
            while old in {client_identity(mesh).root, server_identity(server).root}:
                await calls(load, 10)
        await rig.authority.confirmed()
        await calls(load, 50)
        await rig.authority.retire()
        await rig.authority.confirmed()
        await calls(load, 100)
        assert client_identity(mesh).root == server_identity(server).root != old


async def test_calls_go_on_while_the_control_plane_is_away_and_fail_in_words_once_certificates_have_expired(
    tmp_path: Path,
) -> None:
    async with open_rig(leaf_lifetime=LIFETIME) as rig, loaded(rig, tmp_path) as (load, mesh, _):
        await calls(load, 10)
        await rig.close_enrolment()
        await rig.close_mesh()
        async with asyncio.timeout(PATIENCE):
            while "cannot be renewed" not in client_identity(mesh).warning:
                await calls(load, 1)
        await calls(load, 20)
        load.stopped = True
        expires = client_identity(mesh).expires
        assert expires is not None
        async with asyncio.timeout(PATIENCE):
            while time.time() < expires + 0.1:
                await mesh.changed()
        stub = orders_pb2_grpc.OrderServiceStub(mesh.channel("orders"))

        async def call_on() -> None:
            while True:
                await stub.GetOrder(ORDER, timeout=10.0)

        # A connection that is open stays so until its age.
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await asyncio.wait_for(call_on(), PATIENCE)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "nobody accepts it; it is not renewed" in caught.value.mesh.identity
        assert "the certificate expired" in (caught.value.details() or "")
