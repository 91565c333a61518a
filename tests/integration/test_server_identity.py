"""Servers and clients that join by themselves, with a real certificate authority between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh_client
from control_plane.identity.errors import RotationRefusedError
from mesh_client import Caller, MeshRpcError, MeshServer, current_caller
from mesh_client.core.errors import ConfigError, IdentityError
from mesh_client.core.policy import ServicePolicy
from tests.integration.identity_rig import IdentityRig, open_rig
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
async def serving(rig: IdentityRig, **options: Any) -> AsyncIterator[MeshServer]:
    made = mesh_client.server("orders", **await arguments(rig, "orders", check_interval=0.05, **options))
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
        serving(rig) as made,
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
        made = mesh_client.server("orders", control_plane=rig.mesh, mesh=mesh)
        add_methods(made, {"Caller": handler("unary_unary", name_of_caller)})
        await made.start()
        await made.registered()
        (who,), _ = await call(mesh.channel("orders"), "unary_unary", "Caller", [b""], timeout=10.0)
        assert who.decode().startswith("spiffe://mesh.internal/service/orders (workload ")
        await made.stop(0)


async def test_a_server_that_nobody_lets_join_does_not_start_and_says_why(
    rig: IdentityRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.workload_identity.READY_TIMEOUT", 0.5)
    used = await rig.token(uses=1)
    async with rig.joined(token=used):
        pass
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
        serving(rig) as made,
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
            serving(rig) as made,
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
