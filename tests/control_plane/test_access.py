"""Who may do what, over real connections with real certificates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest

from control_plane.access import Access, Caller
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from tests.certificates import Certificate, TestAuthority

Context = grpc.aio.ServicerContext[bytes, bytes]
Check = Callable[[Access, Context], Awaitable[Caller | None]]

CONTROL_PLANE_NAME = Principal.control_plane(DEFAULT_TRUST_DOMAIN).dns_name


@dataclass
class Revoked:
    ids: set[str] = field(default_factory=set)

    def is_revoked(self, workload_id: str) -> bool:
        return workload_id in self.ids


@dataclass
class World:
    authority: TestAuthority
    address: str
    access: Access
    revoked: Revoked
    checks: dict[str, Check]

    async def ask(self, check: str, certificate: Certificate) -> str:
        credentials = certificate.channel_credentials(self.authority.roots)
        options = [("grpc.ssl_target_name_override", CONTROL_PLANE_NAME)]
        async with grpc.aio.secure_channel(self.address, credentials, options) as channel:
            return await call(channel, check)

    async def refusal(self, check: str, certificate: Certificate) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.ask(check, certificate)
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
        return raised.value.details() or ""


CHECKS: dict[str, Check] = {
    "anybody": lambda access, context: access.require_caller(context, "look"),
    "operator": lambda access, context: access.require_operator(context, "change policies"),
    "orders": lambda access, context: access.require_service(context, "orders", "register for orders"),
    "drain": lambda access, context: access.require_service(
        context, "orders", "drain an endpoint of orders", operators=True
    ),
    "watch": lambda access, context: access.require_service(
        context, "orders", "watch as orders", operators=True, control_planes=True
    ),
}


async def call(channel: grpc.aio.Channel, check: str) -> str:
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/test/{check}")
    return (await method(b"", timeout=10.0)).decode()


@asynccontextmanager
async def serving(access: Access, credentials: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    def handler(check: Check) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(request: bytes, context: Context) -> bytes:
            return str(await check(access, context)).encode()

        return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    handlers = {name: handler(check) for name, check in CHECKS.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    authority = TestAuthority()
    revoked = Revoked()
    access = Access(DEFAULT_TRUST_DOMAIN, revoked)
    credentials = authority.control_plane().server_credentials(authority.roots)
    async with serving(access, credentials) as address:
        yield World(authority, address, access, revoked, CHECKS)


async def test_the_certificate_of_the_connection_says_who_calls(world: World) -> None:
    workload = world.authority.service("orders", workload_id="0123456789abcdef")
    assert await world.ask("anybody", workload) == ("spiffe://mesh.internal/service/orders (workload 0123456789abcdef)")


@pytest.mark.parametrize(
    ("check", "allowed"),
    [
        ("anybody", {"orders", "payments", "operator", "control-plane"}),
        ("operator", {"operator"}),
        ("orders", {"orders"}),
        ("drain", {"orders", "operator"}),
        ("watch", {"orders", "operator", "control-plane"}),
    ],
)
async def test_each_may_what_its_identity_allows_and_nothing_else(world: World, check: str, allowed: set[str]) -> None:
    certificates = {
        "orders": world.authority.service("orders"),
        "payments": world.authority.service("payments"),
        "operator": world.authority.operator(),
        "control-plane": world.authority.control_plane(),
    }
    for who, certificate in certificates.items():
        if who in allowed:
            assert "spiffe://mesh.internal/" in await world.ask(check, certificate)
        else:
            assert "may not" in await world.refusal(check, certificate)


async def test_a_refusal_says_who_what_and_why_and_is_counted_and_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "control_plane.access")
    workload = world.authority.service("inventory")
    assert await world.refusal("orders", workload) == (
        "spiffe://mesh.internal/service/inventory may not register for orders: only orders's own workloads may"
    )
    assert await world.refusal("operator", workload) == (
        "spiffe://mesh.internal/service/inventory may not change policies: that takes an operator's identity"
    )
    assert world.access.denials == {"spiffe://mesh.internal/service/inventory": 2}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert f"(workload {workload.workload_id}) at ipv4:127.0.0.1:" in caplog.messages[0]
    assert "may not register for orders" in caplog.messages[0]


async def test_a_revoked_workload_may_nothing(world: World) -> None:
    workload = world.authority.service("orders")
    await world.ask("orders", workload)
    world.revoked.ids.add(workload.workload_id)
    assert await world.refusal("orders", workload) == (
        "spiffe://mesh.internal/service/orders may not register for orders: the workload has been revoked"
    )
    assert "revoked" in await world.refusal("anybody", workload)
    await world.ask("orders", world.authority.service("orders"))


async def test_an_identity_of_another_trust_domain_is_none_even_under_the_same_root(world: World) -> None:
    foreign = world.authority.issue(Principal.service("other.example", "orders"))
    assert await world.refusal("orders", foreign) == (
        "spiffe://other.example/service/orders may not register for orders: "
        "it is of another trust domain than mesh.internal"
    )


ORDERS = "spiffe://mesh.internal/service/orders"


@pytest.mark.parametrize(
    "names",
    [
        {"uris": ()},
        {"uris": ("https://mesh.internal/service/orders",)},
        {"uris": (ORDERS, "spiffe://mesh.internal/operator/alice")},
        {"uris": ("spiffe://mesh.internal/admin/alice",)},
        {"uris": (f"{ORDERS}/x",)},
        {"uris": (f"{ORDERS.upper()}",)},
        {"common_names": ()},
        {"common_names": ("orders",)},
        {"common_names": ("0123456789abcdeF",)},
        {"common_names": ("0123456789abcdef0",)},
        {"common_names": ("0123456789abcde\N{FULLWIDTH DIGIT ONE}",)},
    ],
)
async def test_certificates_that_do_not_name_one_workload_of_the_mesh_name_nobody(
    world: World, names: dict[str, tuple[str, ...]]
) -> None:
    certificate = world.authority.issue(
        Principal.service(DEFAULT_TRUST_DOMAIN, "orders"),
        uris=names.get("uris"),
        common_names=names.get("common_names"),
    )
    assert await world.refusal("anybody", certificate) == (
        "the caller may not look: the connection has no identity of this mesh"
    )
    assert world.access.denials == {"nobody": 1}


async def test_a_server_that_does_not_ask_for_certificates_gives_nobody_an_identity() -> None:
    authority = TestAuthority()
    server = authority.control_plane()
    credentials = grpc.ssl_server_credentials([(server.key, server.chain)])
    async with serving(Access(DEFAULT_TRUST_DOMAIN), credentials) as address:
        world = World(authority, address, Access(DEFAULT_TRUST_DOMAIN), Revoked(), CHECKS)
        assert "no identity of this mesh" in await world.refusal("anybody", authority.operator())


async def test_plaintext_gives_nobody_an_identity_where_one_is_needed() -> None:
    async with serving(Access(DEFAULT_TRUST_DOMAIN), None) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="no identity of this mesh") as raised:
                await call(channel, "anybody")
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_without_identity_everything_is_allowed_and_nobody_has_a_name() -> None:
    access = Access(None)
    assert not access.secure
    async with serving(access, None) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            for check in CHECKS:
                assert await call(channel, check) == "None"
    access.cut_revoked()
    with access.cut_when_revoked(None, pytest.fail):
        access.cut_revoked()


def test_streams_of_a_revoked_workload_are_cut_and_no_others() -> None:
    revoked = Revoked()
    access = Access(DEFAULT_TRUST_DOMAIN, revoked)
    assert access.secure
    orders = Caller(Principal.service(DEFAULT_TRUST_DOMAIN, "orders"), "0000000000000001")
    other = Caller(Principal.service(DEFAULT_TRUST_DOMAIN, "orders"), "0000000000000002")
    cut: list[str] = []
    with (
        access.cut_when_revoked(orders, lambda: cut.append("first")),
        access.cut_when_revoked(other, lambda: cut.append("other")),
    ):
        with access.cut_when_revoked(orders, lambda: cut.append("second")):
            access.cut_revoked()
            assert cut == []
            revoked.ids.add(orders.workload_id)
            access.cut_revoked()
            assert sorted(cut) == ["first", "second"]
    access.cut_revoked()
    assert len(cut) == 2
    with access.cut_when_revoked(orders, lambda: cut.append("late")):
        assert cut[2:] == ["late"]


async def test_everything_that_is_refused_is_answered_at_once(world: World) -> None:
    workload = world.authority.service("inventory")
    refusals = await asyncio.gather(*(world.refusal("operator", workload) for _ in range(20)))
    assert len(refusals) == world.access.denials.total() == 20
