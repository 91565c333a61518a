"""Servers and clients that join by themselves, with a real certificate authority between them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml
from mesh.v1 import admin_pb2, admin_pb2_grpc

import mesh_client
from control_plane.identity.errors import RotationRefusedError
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client import Caller, MeshRpcError, MeshServer, current_caller
from mesh_client.core.errors import ConfigError, IdentityError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.store import Resolution
from tests.integration.identity_rig import IdentityRig, open_rig
from tests.integration.mesh_rig import state_of, until
from tests.integration.methods import EXPECTED, FORMS, REQUESTS, SERVICE, add_methods, call, handler

ONLY_GATEWAY = ServicePolicy.parse(
    {"service": "orders", "authorization": [{"callers": ["gateway"], "methods": [f"{SERVICE}/*"]}]}
)
OPEN = ServicePolicy(service="orders")


@pytest.fixture
async def rig() -> AsyncIterator[IdentityRig]:
    async with open_rig() as rig:
        yield rig


async def arguments(rig: IdentityRig, service: str, **options: Any) -> dict[str, Any]:
    """What a process of a service is told."""
    return {
        "control_plane": rig.mesh,
        "enrolment": rig.enrolment,
        "token": await rig.token(service),
        "insecure": False,
        **options,
    }


@asynccontextmanager
async def running(service: str, **options: Any) -> AsyncIterator[MeshServer]:
    """A server of every form of handler, checked often so that tests are quick."""
    made = mesh_client.server(service, check_interval=0.05, **options)
    forms = {f"M{number}": handler(kind, behavior) for number, (kind, behavior) in enumerate(FORMS)}
    add_methods(made, {**forms, "Caller": handler("unary_unary", name_of_caller)})
    await made.start()
    try:
        yield made
    finally:
        await made.stop(0)


async def name_of_caller(_: bytes, __: object) -> bytes:
    caller = current_caller()
    return b"" if caller is None else str(caller).encode()


def caller_of(mesh: mesh_client.Mesh) -> Caller:
    """As whom a server sees a client."""
    identity, state = mesh.transport.identity, mesh.state().identity
    assert identity is not None
    assert state is not None
    return Caller(identity.principal, state.workload_id)


async def test_a_server_joins_registers_serves_whom_its_policy_allows_and_leaves(
    rig: IdentityRig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MESH_CACHE_DIR", str(tmp_path))
    rig.plane.set_policy(ONLY_GATEWAY)
    async with (
        running("orders", **await arguments(rig, "orders")) as made,
        mesh_client.connect(service="gateway", cache_dir="", **await arguments(rig, "gateway")) as gateway,
        mesh_client.connect(service="billing", cache_dir="", **await arguments(rig, "billing")) as billing,
    ):
        await made.registered()
        for number, (kind, _) in enumerate(FORMS):
            responses, _ = await call(gateway.channel("orders"), kind, f"M{number}", REQUESTS, timeout=10.0)
            assert responses == EXPECTED[kind]
        (who,), _ = await call(gateway.channel("orders"), "unary_unary", "Caller", [b""])
        assert who.decode() == str(caller_of(gateway))
        with pytest.raises(MeshRpcError) as caught:
            await call(billing.channel("orders"), "unary_unary", "Caller", [b""], timeout=10.0)
        status = made.status()
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (caught.value.details() or "").startswith(f"billing may not call {SERVICE}/Caller")
    assert status.denied == 1
    assert status.identity is not None
    assert status.identity.spiffe_id == "spiffe://mesh.internal/service/orders"
    assert rig.plane.endpoints("orders") == ()


async def test_one_use_of_a_token_is_enough_for_a_server_and_the_client_that_shares_its_identity(
    rig: IdentityRig,
) -> None:
    token = await rig.token(uses=1)
    told = await arguments(rig, "orders", token=token)
    async with mesh_client.connect(service="orders", cache_dir="", **told) as mesh:
        async with running("orders", control_plane=rig.mesh, mesh=mesh) as made:
            await made.registered()
            (who,), _ = await call(
                mesh.channel("orders"), "unary_unary", "Caller", [b""], timeout=10.0, wait_for_ready=True
            )
            assert who.decode().startswith("spiffe://mesh.internal/service/orders (workload ")


async def test_a_server_that_nobody_lets_join_does_not_start_and_says_why(
    rig: IdentityRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = await rig.token(uses=1)
    async with rig.joined(token=used):
        pass
    monkeypatch.setattr("mesh_client.identity.workload.READY_TIMEOUT", 0.5)
    made = mesh_client.server("orders", **await arguments(rig, "orders", token=used))
    with pytest.raises(IdentityError, match="orders"):
        await made.start()


async def test_a_server_of_one_service_does_not_take_the_token_of_another(rig: IdentityRig) -> None:
    told = await arguments(rig, "orders", token=await rig.token("billing"))
    with pytest.raises(ConfigError, match="'billing'"):
        mesh_client.server("orders", **told)


async def keep_calling(channel: grpc.aio.Channel) -> None:
    """Calls until a call fails."""
    async with asyncio.timeout(10.0):
        while True:
            await call(channel, "unary_unary", "Caller", [b""], timeout=10.0)


async def test_a_revoked_workload_is_refused_by_servers(rig: IdentityRig) -> None:
    rig.plane.set_policy(OPEN)
    async with (
        running("orders", **await arguments(rig, "orders")) as made,
        mesh_client.connect(service="gateway", cache_dir="", **await arguments(rig, "gateway")) as gateway,
    ):
        await made.registered()
        channel = gateway.channel("orders")
        await call(channel, "unary_unary", "Caller", [b""], timeout=10.0)
        await rig.authority.revoke(workload_id=caller_of(gateway).workload_id)
        with pytest.raises(MeshRpcError) as caught:
            await keep_calling(channel)
    refused = caught.value
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "which has been revoked" in (refused.details() or "")


async def once_allowed(step: Callable[[], Awaitable[None]]) -> None:
    """Takes a step of a rotation when no workload depends on what it takes away any more."""
    while True:
        try:
            return await step()
        except RotationRefusedError:
            await asyncio.sleep(0.01)


async def test_the_root_is_rotated_under_calls_and_none_fails(tmp_path: Path) -> None:
    calls, failed, done = 0, list[str](), asyncio.Event()

    async with open_rig(tmp_path, leaf_lifetime=10.0) as rig:
        rig.plane.set_policy(ONLY_GATEWAY)
        async with (
            running("orders", **await arguments(rig, "orders")) as made,
            mesh_client.connect(service="gateway", cache_dir="", **await arguments(rig, "gateway")) as gateway,
        ):
            await made.registered()
            channel = gateway.channel("orders")

            async def count_calls() -> None:
                nonlocal calls
                while not done.is_set():
                    try:
                        await call(channel, "unary_unary", "Caller", [b""], timeout=10.0)
                    except grpc.aio.AioRpcError as error:
                        failed.append(str(error))
                    calls += 1

            callers = [asyncio.create_task(count_calls()) for _ in range(4)]
            authority = rig.authority
            for step in (authority.add_root, authority.overlap, authority.retire):
                async with asyncio.timeout(20.0):
                    await once_allowed(step)
                    before = calls
                    while calls < before + 50:
                        await asyncio.sleep(0.001)
            done.set()
            await asyncio.gather(*callers)
            assert made.status().health.healthy
    assert failed == []


@asynccontextmanager
async def operator(plane: ControlPlane, directory: Path) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the control plane's mesh port, as an operator."""
    assert plane.authority is not None
    files = await plane.authority.create_operator("anna", directory)
    roots, key, chain = ((directory / name).read_bytes() for name in ("roots.pem", "operator.key", "operator.pem"))
    del files
    name = Principal.control_plane(DEFAULT_TRUST_DOMAIN).dns_name
    credentials = grpc.ssl_channel_credentials(roots, key, chain)
    async with grpc.aio.secure_channel(
        plane.address, credentials, [("grpc.ssl_target_name_override", name)]
    ) as channel:
        yield channel


async def known(mesh: mesh_client.Mesh) -> None:
    """Returns when a client knows the service."""
    mesh.channel("orders")
    await until(mesh, lambda: state_of(mesh, "orders").resolution is Resolution.ACTIVE)


async def test_with_a_real_control_plane_a_policy_that_is_stored_is_enforced_and_a_drain_is_acknowledged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mesh_client.membership")
    plane = ControlPlane(ControlPlaneOptions(address="127.0.0.1:0", enrolment_address="127.0.0.1:0"))
    await plane.start()
    try:
        assert plane.authority is not None

        async def told(service: str) -> dict[str, Any]:
            assert plane.authority is not None
            token = (await plane.authority.create_token(service, 600.0, 1, "test")).text
            return {
                "control_plane": plane.address,
                "enrolment": plane.enrolment_address,
                "token": token,
                "insecure": False,
            }

        async with (
            running("orders", **await told("orders")) as made,
            mesh_client.connect(service="gateway", cache_dir="", **await told("gateway")) as gateway,
            mesh_client.connect(service="billing", cache_dir="", **await told("billing")) as billing,
            operator(plane, tmp_path / "operator") as channel,
        ):
            await made.registered()
            for mesh in (gateway, billing):
                await known(mesh)
                (who,), _ = await call(mesh.channel("orders"), "unary_unary", "Caller", [b""], timeout=10.0)
                assert who.decode() == str(caller_of(mesh))
            document = yaml.safe_dump(ONLY_GATEWAY.dump())
            await admin_pb2_grpc.AdminServiceStub(channel).ApplyPolicy(
                admin_pb2.ApplyPolicyRequest(document=document), timeout=10.0
            )
            with pytest.raises(MeshRpcError) as caught:
                await keep_calling(billing.channel("orders"))
            await call(gateway.channel("orders"), "unary_unary", "Caller", [b""], timeout=10.0)
            await made.stop(0)  # while its callers are there
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert ONLY_GATEWAY.version in (caught.value.details() or "")
        assert f"drain of orders/{made.instance_id}: acknowledged by 3 clients" in caplog.text
    finally:
        await plane.stop(0)
