"""Servers with an identity, over real connections with real certificates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from mesh_client import Caller, MeshServer, current_caller, server
from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import ConfigError, IdentityError
from mesh_client.core.identity import Principal
from mesh_client.core.model import Locality
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.registration import RegistrationState
from mesh_client.mesh import Mesh, make_mesh
from mesh_client.testing import InMemoryControlPlane
from mesh_client.transport import MutualTls
from tests.certificates import Certificate, TestAuthority
from tests.identities import TestIdentity
from tests.integration.methods import EXPECTED, FORMS, REQUESTS, SERVICE, add_methods, call, failure, handler
from tests.ports import held_address

DOMAIN = "mesh.internal"
ORDERS = Principal.service(DOMAIN, "orders")
NAME = (("grpc.ssl_target_name_override", ORDERS.dns_name),)
METHOD = f"/{SERVICE}/M"


def policy(*rules: tuple[str, str]) -> ServicePolicy:
    stated = [{"callers": callers.split(), "methods": names.split()} for callers, names in rules]
    return ServicePolicy.parse({"service": "orders", "authorization": stated})


OPEN = policy()
ONLY_GATEWAY = policy(("gateway", f"{SERVICE}/*"))
ONLY_BILLING = policy(("billing", f"{SERVICE}/*"))


async def echo(request: bytes, _: object) -> bytes:
    return request


def mesh_of(identity: TestIdentity, control_plane: str = "127.0.0.1:1", service: str = "orders") -> Mesh:
    return make_mesh((control_plane,), service, Locality(), MutualTls(identity), cache_dir="")


class World:
    """A root, and the identity of a server that it signed."""

    def __init__(self) -> None:
        self.authority = TestAuthority()
        self.identity = TestIdentity(ORDERS, self.authority)

    def server(self, **options: Any) -> MeshServer:
        options = {"registry": "none", "mesh": mesh_of(self.identity), "policy": OPEN, **options}
        return server("orders", **options)

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator[MeshServer]:
        made = self.server(**options)
        add_methods(made, {"M": handler("unary_unary", echo)})
        await made.start()
        try:
            yield made
        finally:
            await made.stop(0)

    @asynccontextmanager
    async def calling(
        self, target: str, certificate: Certificate | None = None, roots: bytes = b""
    ) -> AsyncIterator[grpc.aio.Channel]:
        certificate = certificate or self.authority.service("gateway")
        credentials = certificate.channel_credentials(roots or self.authority.roots)
        async with grpc.aio.secure_channel(target, credentials, NAME) as channel:
            yield channel

    async def refusal(
        self, target: str, certificate: Certificate | None = None, roots: bytes = b""
    ) -> grpc.aio.AioRpcError:
        """How a call of somebody fails."""
        async with self.calling(target, certificate, roots) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(channel, "unary_unary", "M", [b""], timeout=10.0)
        return caught.value


@pytest.fixture
async def world() -> World:
    return World()


# -- who gets in


async def test_a_caller_with_an_identity_of_the_mesh_is_served_and_the_server_says_who_it_is(world: World) -> None:
    async with world.running() as made, world.calling(made.endpoint.target) as channel:
        responses, _ = await call(channel, "unary_unary", "M", [b"hello"])
        status = made.status()
    assert responses == [b"hello"]
    assert status.health.healthy
    assert status.identity is not None
    assert status.identity.spiffe_id == "spiffe://mesh.internal/service/orders"
    assert world.identity.users == 0


async def test_without_tls_nobody_gets_in(world: World) -> None:
    async with world.running() as made, grpc.aio.insecure_channel(made.endpoint.target) as channel:
        refused = await failure(channel, "unary_unary", "M", timeout=10.0)
    assert refused.code is grpc.StatusCode.UNAVAILABLE


async def test_without_a_certificate_nobody_gets_in(world: World) -> None:
    async with world.running() as made:
        credentials = grpc.ssl_channel_credentials(world.authority.roots)
        async with grpc.aio.secure_channel(made.endpoint.target, credentials, NAME) as channel:
            refused = await failure(channel, "unary_unary", "M", timeout=10.0)
    assert refused.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("kind", ["of another root", "expired", "not yet valid"])
async def test_a_certificate_that_does_not_hold_gets_nobody_in(kind: str, world: World) -> None:
    gateway = Principal.service(DOMAIN, "gateway")
    certificate = {
        "of another root": lambda: TestAuthority().service("gateway"),
        "expired": lambda: world.authority.issue(gateway, starts=-3600.0, ends=-1.0),
        "not yet valid": lambda: world.authority.issue(gateway, starts=3600.0, ends=7200.0),
    }[kind]()
    async with world.running() as made:
        refused = await world.refusal(made.endpoint.target, certificate)
        async with world.calling(made.endpoint.target) as channel:
            await call(channel, "unary_unary", "M", [b""])
    assert refused.code() is grpc.StatusCode.UNAVAILABLE


async def test_the_right_root_and_another_trust_domain_get_nobody_in(world: World) -> None:
    stranger = world.authority.issue(Principal.service("elsewhere.example", "gateway"))
    async with world.running() as made:
        refused = await world.refusal(made.endpoint.target, stranger)
        denied = made.status().denied
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "is of another trust domain than mesh.internal" in (refused.details() or "")
    assert denied == 1


async def test_a_caller_who_means_another_service_does_not_speak_with_this_one(world: World) -> None:
    name = (("grpc.ssl_target_name_override", "payments.mesh.internal"),)
    credentials = world.authority.service("gateway").channel_credentials(world.authority.roots)
    async with world.running() as made, grpc.aio.secure_channel(made.endpoint.target, credentials, name) as channel:
        refused = await failure(channel, "unary_unary", "M", timeout=10.0)
    assert refused.code is grpc.StatusCode.UNAVAILABLE


async def test_a_workload_that_is_revoked_while_it_is_connected_is_refused_from_its_next_call_on(world: World) -> None:
    certificate = world.authority.service("gateway")
    async with world.running() as made, world.calling(made.endpoint.target, certificate) as channel:
        await call(channel, "unary_unary", "M", [b""])
        world.identity.revoke(certificate.workload_id)
        refused = await failure(channel, "unary_unary", "M")
        world.identity.revoke()
        await call(channel, "unary_unary", "M", [b""])
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    assert "has been revoked" in refused.details


# -- what they may do


@pytest.mark.parametrize("generated", [True, False], ids=["registered methods", "generic handlers"])
async def test_every_form_of_handler_serves_whom_a_rule_allows_and_refuses_others(
    generated: bool, world: World
) -> None:
    threads = ThreadPoolExecutor(4)
    made = world.server(policy=ONLY_GATEWAY, migration_thread_pool=threads)
    forms = {f"M{number}": handler(kind, behavior) for number, (kind, behavior) in enumerate(FORMS)}
    add_methods(made, forms, generated=generated)
    await made.start()
    target = made.endpoint.target
    async with world.calling(target) as channel, world.calling(target, world.authority.service("shop")) as other:
        for number, (kind, _) in enumerate(FORMS):
            responses, _ = await call(channel, kind, f"M{number}", REQUESTS)
            assert responses == EXPECTED[kind]
            refused = await failure(other, kind, f"M{number}")
            assert refused.code is grpc.StatusCode.PERMISSION_DENIED
            assert refused.details == (
                f"shop may not call {SERVICE}/M{number}: "
                f"it is not allowed by the authorization rule of policy version {ONLY_GATEWAY.version}"
            )
    assert made.status().denied == len(FORMS)
    await made.stop(0)
    await asyncio.to_thread(threads.shutdown)  # grpc's work in them ends with the loop's help


async def test_handlers_know_who_calls_also_in_threads(world: World) -> None:
    seen: list[Caller | None] = []

    async def in_the_loop(request: bytes, _: object) -> bytes:
        seen.append(current_caller())
        return request

    def in_a_thread(request: bytes, _: object) -> bytes:
        seen.append(current_caller())
        return request

    certificate = world.authority.service("gateway")
    made = world.server()
    add_methods(made, {"A": handler("unary_unary", in_the_loop), "B": handler("unary_unary", in_a_thread)})
    await made.start()
    async with world.calling(made.endpoint.target, certificate) as channel:
        await call(channel, "unary_unary", "A", [b""])
        await call(channel, "unary_unary", "B", [b""])
    await made.stop(0)
    assert seen == [Caller(Principal.service(DOMAIN, "gateway"), certificate.workload_id)] * 2


async def test_health_is_open_and_reflection_is_a_service_like_any_other(world: World) -> None:
    reflecting = policy(("operator:anna", "grpc.reflection.v1alpha.ServerReflection/*"))
    async with world.running(policy=reflecting) as made:
        async with world.calling(made.endpoint.target) as channel:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            refused = await reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo().code()
        async with world.calling(made.endpoint.target, world.authority.operator("anna")) as channel:
            allowed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await allowed.done_writing()
            assert await allowed.code() is grpc.StatusCode.OK
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert refused is grpc.StatusCode.PERMISSION_DENIED


# -- how it starts


async def test_a_start_without_a_certificate_fails_with_the_reason_and_leaves_nothing() -> None:
    identity = TestIdentity(ORDERS, None)
    made = server("orders", registry="none", mesh=mesh_of(identity), policy=OPEN)
    with pytest.raises(IdentityError, match="the test has given no certificate"):
        await made.start()
    assert identity.users == 0
    assert made.port == 0


async def test_a_start_waits_for_the_certificate(world: World) -> None:
    identity = TestIdentity(ORDERS, None)
    made = server("orders", registry="none", mesh=mesh_of(identity), policy=OPEN)
    asyncio.get_running_loop().call_soon(identity.take, world.authority.issue(ORDERS), world.authority.roots)
    await made.start()
    assert made.status().health.healthy
    await made.stop(0)


def test_the_identity_of_another_service_cannot_be_shared() -> None:
    identity = TestIdentity(Principal.service(DOMAIN, "billing"), None)
    with pytest.raises(ConfigError, match="it is billing's, whose identity a server of orders cannot share"):
        server("orders", registry="none", mesh=mesh_of(identity, service="billing"), policy=OPEN)


def test_a_shared_identity_takes_no_arguments_of_its_own(world: World) -> None:
    with pytest.raises(ConfigError, match="token_file: the server shares the identity of its mesh="):
        world.server(token_file="token")


async def test_a_port_without_identities_is_not_added_to_a_secure_server(world: World) -> None:
    made = world.server()
    with pytest.raises(ConfigError, match="on a secure server nobody is served without an identity"):
        made.add_insecure_port("127.0.0.1:0")


async def test_a_plaintext_server_says_so_at_each_start(caplog: pytest.LogCaptureFixture) -> None:
    made = server("orders", registry="none", insecure=True)
    await made.start()
    await made.stop(0)
    (said,) = [record for record in caplog.records if "speaks plaintext (insecure)" in record.getMessage()]
    assert said.levelno == logging.WARNING


# -- rotation


async def test_leaf_and_root_are_rotated_while_calls_run(world: World) -> None:
    old, new = world.authority, TestAuthority()
    both = old.roots + new.roots
    certificate, roots = old.service("gateway"), both
    failed: list[str] = []
    calls = 0
    done = asyncio.Event()

    async def keep_calling(reconnect: bool) -> None:
        nonlocal calls
        while not done.is_set():
            async with world.calling(made.endpoint.target, certificate, roots) as channel:
                for _ in range(1 if reconnect else 20):
                    try:
                        await call(channel, "unary_unary", "M", [b""])
                    except grpc.aio.AioRpcError as error:
                        failed.append(f"{error.code()}: {error.details()}")
                    calls += 1

    async def after_more_calls() -> None:
        target = calls + 40
        while calls < target:
            await asyncio.sleep(0)

    async with world.running(check_interval=0.05) as made:
        callers = [asyncio.create_task(keep_calling(reconnect)) for reconnect in (True, True, False)]
        await after_more_calls()
        world.identity.take(old.issue(ORDERS), old.roots)  # another leaf
        await after_more_calls()
        world.identity.take(old.issue(ORDERS), both)  # the new root is trusted as well
        await after_more_calls()
        certificate = new.service("gateway")  # the client's is signed by it
        await after_more_calls()
        world.identity.take(new.issue(ORDERS), both)  # the server's too
        await after_more_calls()
        roots = new.roots
        await after_more_calls()
        world.identity.take(new.issue(ORDERS), new.roots)  # the old root is trusted no more
        await after_more_calls()
        done.set()
        await asyncio.gather(*callers)
        stale = await world.refusal(made.endpoint.target, old.service("gateway"), both)
        assert made.status().health.healthy
    assert failed == []
    assert stale.code() is grpc.StatusCode.UNAVAILABLE


async def test_connections_end_when_they_have_become_old_and_calls_go_on(world: World) -> None:
    peers: set[str] = set()

    async def peer(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        peers.add(context.peer())
        return b""

    made = world.server(max_connection_age=1.0, max_connection_age_grace=5.0)
    add_methods(made, {"M": handler("unary_unary", peer)})
    await made.start()
    async with world.calling(made.endpoint.target) as channel, asyncio.timeout(20.0):
        while len(peers) < 2:
            await call(channel, "unary_unary", "M", [b""])
    await made.stop(0)


async def test_long_streams_that_end_with_their_connection_leave_the_server_in_good_standing(world: World) -> None:
    held = asyncio.Event()

    async def hold(request: bytes, _: object) -> AsyncIterator[bytes]:
        yield request
        await held.wait()

    gateway = TestIdentity(Principal.service(DOMAIN, "gateway"), world.authority)
    async with secure_plane(world) as plane, mesh_of(gateway, plane.address, "gateway") as mesh:
        options = {"registry": None, "control_plane": plane.address, "policy": OPEN}
        made = world.server(max_connection_age=2.0, max_connection_age_grace=0.0, **options)
        add_methods(made, {"Hold": handler("unary_stream", hold), "M": handler("unary_unary", echo)})
        await made.start()
        await plane.registered("orders")
        channel = mesh.channel("orders")
        method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{SERVICE}/Hold")
        streams = [method(b"", wait_for_ready=True) for _ in range(10)]
        for stream in streams:
            await stream.read()
        codes = {await stream.code() for stream in streams}
        (state,) = mesh.state().services
        await call(channel, "unary_unary", "M", [b""], timeout=10.0)
        held.set()
        await made.stop(0)
    assert codes == {grpc.StatusCode.UNAVAILABLE}
    assert state.breaker is BreakerState.CLOSED
    assert [endpoint.ejected for endpoint in state.endpoints] == [False]


# -- the policy of a control plane


@asynccontextmanager
async def secure_plane(world: World) -> AsyncIterator[InMemoryControlPlane]:
    credentials = world.authority.control_plane().server_credentials(world.authority.roots)
    with held_address() as address:  # a test stops it and starts it again
        async with InMemoryControlPlane(address, credentials) as plane:
            yield plane


async def test_a_server_registers_obeys_its_policy_and_leaves_by_its_identity(world: World) -> None:
    async with secure_plane(world) as plane:
        plane.set_policy(ONLY_BILLING)
        mesh = mesh_of(world.identity, plane.address)
        async with mesh:
            options: dict[str, Any] = {"registry": None, "control_plane": plane.address, "mesh": mesh, "policy": None}
            async with world.running(**options) as made:
                await plane.registered("orders")
                refused = await world.refusal(made.endpoint.target)
                async with world.calling(made.endpoint.target, world.authority.service("billing")) as channel:
                    await call(channel, "unary_unary", "M", [b""])
            assert plane.endpoints("orders") == ()
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_server_whose_service_the_mesh_does_not_know_registers_and_serves_once_it_has_its_policy(
    world: World,
) -> None:
    async with secure_plane(world) as plane:
        mesh = mesh_of(world.identity, plane.address)
        async with mesh:
            options: dict[str, Any] = {"registry": None, "control_plane": plane.address, "mesh": mesh, "policy": None}
            async with world.running(**options) as made:
                await plane.registered("orders")
                async with world.calling(made.endpoint.target) as channel:
                    await call(channel, "unary_unary", "M", [b""])


async def test_defaults_in_place_of_a_policy_that_cannot_be_read_are_no_permission(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.guard.POLICY_PATIENCE", 0.01)
    async with secure_plane(world) as plane:
        plane.set_policy(OPEN, provisional=True)
        mesh = mesh_of(world.identity, plane.address)
        async with mesh:
            options: dict[str, Any] = {"registry": None, "control_plane": plane.address, "mesh": mesh, "policy": None}
            async with world.running(**options) as made:
                await plane.acknowledged("orders")
                assert made.status().registration.state is RegistrationState.WAITING
                refused = await world.refusal(made.endpoint.target)
                assert refused.code() is grpc.StatusCode.UNAVAILABLE
                plane.set_policy(ONLY_BILLING)
                await made.registered()
                plane.set_policy(OPEN, provisional=True)
                await plane.acknowledged("orders")
                refused = await world.refusal(made.endpoint.target)
                assert refused.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_server_without_word_of_its_policy_serves_nobody_and_is_not_registered(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.guard.POLICY_PATIENCE", 0.01)
    caplog.set_level(logging.INFO)
    async with secure_plane(world) as plane:
        address = plane.address
        await plane.stop()
        mesh = mesh_of(world.identity, address)
        async with mesh:
            options: dict[str, Any] = {"registry": None, "control_plane": address, "mesh": mesh, "policy": None}
            async with world.running(**options) as made:
                assert made.status().registration.state is RegistrationState.WAITING
                assert "registers once a control plane has told it whom its policy allows" in caplog.text
                refused = await world.refusal(made.endpoint.target)
                assert refused.code() is grpc.StatusCode.UNAVAILABLE
                plane.set_policy(ONLY_GATEWAY)
                await plane.start()
                await made.registered()
                async with world.calling(made.endpoint.target) as channel:
                    await call(channel, "unary_unary", "M", [b""])
