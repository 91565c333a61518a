"""Workloads that are revoked, and certificates that nobody renews, under load: what goes on, and what ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from mesh.v1 import authority_pb2 as pb
from shop.v1.inventory_pb2_grpc import InventoryServiceStub

from mesh_client import MeshRpcError
from mesh_client.mesh import Mesh
from tests.chaos.inventory import GET, WATCH_LONG
from tests.chaos.secure_mesh import PATIENCE, SERVICE, Load, SecureMesh, identity_of, until

AGE: dict[str, Any] = {"max_connection_age": 1.0, "max_connection_age_grace": 1.0}
"""Servers' connections are open for two seconds and a little at most."""
SOON_CUT = 10.0
"""Seconds in which that shows on a machine under load."""


async def revoke(secure: SecureMesh, workload_id: str) -> None:
    async with secure.operator() as stub:
        answer = await stub.RevokeWorkload(pb.RevokeWorkloadRequest(workload_id=workload_id), timeout=10.0)
        assert list(answer.workload_ids) == [workload_id]


async def call(mesh: Mesh) -> None:
    await InventoryServiceStub(mesh.channel(SERVICE)).GetStock(GET, timeout=20.0)


async def failure(mesh: Mesh) -> MeshRpcError:
    """Calls until a call fails."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await call(mesh)
            except MeshRpcError as error:
                return error
            await asyncio.sleep(0.01)


async def ending(stream: grpc.aio.UnaryStreamCall[Any, Any]) -> grpc.StatusCode:
    """How a stream ends; its status comes after its responses."""
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def warned(load: Load, service: str, log: Callable[[], str]) -> None:
    """Returns when a workload's log warns of its certificate: a moment after its state does."""
    said = f"spiffe://mesh.internal/service/{service}: the certificate expires in "
    async with asyncio.timeout(PATIENCE):
        while said not in log():
            await load.goes_on(10)


async def test_a_revoked_caller_is_refused_cut_off_and_not_renewed_while_others_go_on(tmp_path: Path) -> None:
    async with SecureMesh(tmp_path, leaf_lifetime=7.0) as secure:
        await secure.start_servers("inventory-1", "inventory-2", **AGE)
        revoked, other = await secure.connect("gateway", uses=1), await secure.connect("billing")
        async with Load(other, workers=4, pause=0.002, stream=False) as load:
            await call(revoked)
            stream = InventoryServiceStub(revoked.channel(SERVICE)).WatchStock(WATCH_LONG)
            await anext(aiter(stream))
            workload = identity_of(revoked).workload_id
            await revoke(secure, workload)

            refused = await failure(revoked)
            assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
            assert f"gateway calls from workload {workload}, which has been revoked" in (refused.details() or "")
            await until(revoked, lambda: "the workload has been revoked" in revoked.state().control_plane)
            # What is under way ends as soon as its server knows.
            assert await asyncio.wait_for(ending(stream), SOON_CUT) is grpc.StatusCode.PERMISSION_DENIED
            serial = identity_of(revoked).serial
            await until(revoked, lambda: "revoked" in identity_of(revoked).last_error)
            assert identity_of(revoked).serial == serial
            await load.goes_on(200)


async def test_a_revoked_server_gets_no_calls_any_more_and_none_fails(tmp_path: Path) -> None:
    async with SecureMesh(tmp_path) as secure:
        await secure.start_servers("bad")
        (bad,) = (each.id for each in (await secure.authority()).workloads if each.spiffe_id.endswith(SERVICE))
        await secure.start_servers("good")
        mesh = await secure.connect()
        async with Load(mesh, workers=4, pause=0.002, stream=False) as load:
            await revoke(secure, bad)
            await until(mesh, lambda: [each.id for each in mesh.state().services[0].endpoints] == ["good"])
            await load.goes_on(200)
        assert "revoked" in secure.processes["bad"].tail()


async def test_calls_go_on_and_warnings_are_given_while_nobody_renews_and_none_fails_when_it_is_renewed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    # What is left when the warning comes is half of it; a control plane has to start in that time, and to be asked.
    async with SecureMesh(tmp_path, leaf_lifetime=20.0) as secure:
        await secure.start_servers("inventory-1")
        async with secure.serving(instance_id="inventory-2") as server:
            mesh = await secure.connect()
            both = (mesh, server)
            async with Load(mesh, workers=4, pause=0.002) as load:
                await secure.kill_control_plane()
                await until(mesh, lambda: all("cannot be renewed" in identity_of(each).warning for each in both))
                await load.goes_on(200)
                await warned(load, "gateway", lambda: caplog.text)
                await warned(load, "inventory", lambda: caplog.text)
                await warned(load, "inventory", secure.processes["inventory-1"].log.read_text)
                before = [identity_of(each).serial for each in both]
                await secure.start_control_plane()
                async with asyncio.timeout(PATIENCE):
                    while any(identity_of(each).serial in before for each in both):
                        await load.goes_on(10)
                await load.goes_on(200)
                assert [identity_of(each).warning for each in both] == ["", ""]


async def test_calls_with_a_certificate_that_has_expired_fail_in_words_until_somebody_renews_it(tmp_path: Path) -> None:
    async with SecureMesh(tmp_path, leaf_lifetime=6.0) as secure, secure.serving(**AGE) as server:
        mesh = await secure.connect()
        await until(mesh, lambda: len(mesh.state().services[0].endpoints) == 1)
        await call(mesh)
        await secure.kill_control_plane()
        first = await failure(mesh)  # whose certificate ends first may be either
        assert first.code() is grpc.StatusCode.UNAVAILABLE
        assert "expired" in (first.details() or "")
        expired = "nobody accepts it; it is not renewed: "
        await until(mesh, lambda: all(expired in identity_of(each).warning for each in (mesh, server)))
        failed = await failure(mesh)
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        assert "the certificate expired" in (failed.details() or "")
        assert expired in failed.mesh.identity
        await secure.start_control_plane()
        await until(mesh, lambda: not identity_of(mesh).warning and not identity_of(server).warning)
        async with Load(mesh, workers=4, stream=False) as load:
            await load.goes_on(200)
