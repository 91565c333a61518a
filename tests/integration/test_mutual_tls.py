"""Calls over mutual TLS: who is refused, what is said then, and what happens to calls when credentials change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest

import mesh_client
from mesh_client import target
from mesh_client.core.errors import ConfigError, IdentityError, Reason
from mesh_client.core.identity import Principal
from mesh_client.core.model import Endpoint, Locality
from mesh_client.mesh import Mesh, make_mesh
from mesh_client.testing import FakeClock, InMemoryControlPlane
from mesh_client.transport import CONTEXT_LIFE, CONTROL_PLANE, CurrentConfiguration, MutualTls, PlaintextTransport
from tests.certificates import Certificate, TestAuthority
from tests.identities import TestIdentity

BILLING = Principal.service("mesh.internal", "billing")
ORDERS = Principal.service("mesh.internal", "orders")


class Echo(grpc.GenericRpcHandler):
    """Echoes; holds back what is called "hold" until released; streams what it gets."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.callers: list[bytes] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def unary(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self.callers += context.auth_context().get("peer_spiffe_id", [])
            if request == b"hold":
                self.entered.set()
                await self.release.wait()
            return request

        async def stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request

        if str(handler_call_details.method).endswith("Stream"):
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


async def until(mesh: Mesh, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await mesh.changed()


async def echo_on(channel: grpc.aio.Channel, request: bytes = b"hello", wait_for_ready: bool | None = None) -> bytes:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Echo/Echo")
    return await call(request, timeout=10, wait_for_ready=wait_for_ready)


@dataclass
class World:
    """A control plane that speaks mutual TLS, and one client of it."""

    authority: TestAuthority
    plane: InMemoryControlPlane
    identity: TestIdentity
    mesh: Mesh
    stack: AsyncExitStack

    async def serve(self, credentials: grpc.ServerCredentials | None, service: str = "orders") -> Echo:
        """A server that is published as an endpoint of orders."""
        server, echo = grpc.aio.server(), Echo()
        server.add_generic_rpc_handlers((echo,))
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        self.stack.push_async_callback(server.stop, None)
        self.plane.set_endpoints(service, Endpoint("a", "127.0.0.1", port))
        return echo

    def shows(self, certificate: Certificate) -> grpc.ServerCredentials:
        return certificate.server_credentials(self.authority.roots)

    async def call(self, request: bytes = b"hello") -> bytes:
        return await echo_on(self.mesh.channel("orders"), request)

    async def failure(self) -> mesh_client.MeshRpcError:
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await self.call()
        return caught.value


@asynccontextmanager
async def open_world(*, has_certificate: bool = True) -> AsyncIterator[World]:
    authority = TestAuthority()
    identity = TestIdentity(BILLING, authority if has_certificate else None)
    credentials = authority.control_plane().server_credentials(authority.roots)
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(InMemoryControlPlane(credentials=credentials))
        transport = MutualTls(identity)
        mesh = make_mesh((plane.address,), "billing", Locality(), transport, cache_dir="", rng=Random(7))
        await stack.enter_async_context(mesh)
        yield World(authority, plane, identity, mesh, stack)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_world() as made:
        yield made


async def test_both_sides_know_who_the_other_is(world: World) -> None:
    echo = await world.serve(world.shows(world.authority.service("orders")))
    assert await world.call() == b"hello"
    assert echo.callers == [b"spiffe://mesh.internal/service/billing"]
    state = world.mesh.state()
    assert state.identity is not None
    assert state.identity.spiffe_id == BILLING.spiffe_id


# -- servers that are not who was meant


async def test_a_server_with_a_good_certificate_of_another_service_is_refused_in_words(world: World) -> None:
    echo = await world.serve(world.shows(world.authority.service("inventory")))
    error = await world.failure()
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "whoever answers there holds a certificate of somebody else than orders, and was refused" in error.mesh.hint
    assert "somebody else than orders" in (error.details() or "")
    assert error.mesh.reason is Reason.ATTEMPTS_FAILED
    assert error.mesh.identity.startswith("a certificate of the test")
    assert echo.callers == []


async def test_an_impostor_is_logged_once_though_the_calls_succeed_elsewhere(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.serve(world.shows(world.authority.service("inventory")))
    (impostor,) = world.plane.endpoints("orders")
    await world.serve(world.shows(world.authority.service("orders")))
    (real,) = world.plane.endpoints("orders")
    world.plane.set_endpoints("orders", Endpoint("impostor", "127.0.0.1", impostor.port), real)
    world.mesh.channel("orders")
    await world.plane.acknowledged("orders")
    for _ in range(30):
        assert await world.call() == b"hello"
    said = [record.getMessage() for record in caplog.records if "somebody else than orders" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"call of orders to endpoint impostor at {impostor.target}: ")
    assert "was refused" in said[0]


@pytest.mark.parametrize(
    ("starts", "ends", "said"),
    [
        (-7200.0, -60.0, "the certificate of orders has expired, and it was refused"),
        (3600.0, 7200.0, "the certificate of orders is not valid yet, and it was refused"),
    ],
)
async def test_a_server_out_of_its_time_is_refused_in_words(
    world: World, starts: float, ends: float, said: str
) -> None:
    echo = await world.serve(world.shows(world.authority.issue(ORDERS, starts=starts, ends=ends)))
    assert said in (await world.failure()).mesh.hint
    assert echo.callers == []


async def test_a_server_that_signed_for_itself_is_refused_in_words(world: World) -> None:
    echo = await world.serve(world.shows(TestAuthority().service("orders")))
    assert "not from an authority that this process trusts" in (await world.failure()).mesh.hint
    assert echo.callers == []


async def test_a_server_of_another_trust_domain_is_refused_though_its_root_is_trusted(world: World) -> None:
    other = world.authority.issue(Principal.service("other.internal", "orders"))
    await world.serve(world.shows(other))
    assert "somebody else than orders" in (await world.failure()).mesh.hint


async def test_a_server_without_a_dns_name_is_refused_though_its_spiffe_id_is_right(world: World) -> None:
    await world.serve(
        world.shows(world.authority.issue(Principal.operator("mesh.internal", "mallory"), uris=[ORDERS.spiffe_id]))
    )
    assert "somebody else than orders" in (await world.failure()).mesh.hint


async def test_a_server_that_speaks_plaintext_is_refused_in_words(world: World) -> None:
    echo = await world.serve(None)
    assert "speaks plaintext, not TLS, and was refused" in (await world.failure()).mesh.hint
    assert echo.callers == []


async def test_a_server_that_does_not_accept_us_is_told_from_one_that_is_gone(world: World) -> None:
    certificate = world.authority.service("orders")
    echo = await world.serve(certificate.server_credentials(TestAuthority().roots))
    assert "may not accept this process's certificate" in (await world.failure()).mesh.hint
    assert echo.callers == []
    world.plane.set_endpoints("orders", Endpoint("b", "127.0.0.1", 1))
    await world.plane.acknowledged("orders")
    assert (await world.failure()).mesh.hint == ""


async def test_a_plaintext_client_is_told_that_tls_may_be_wanted(world: World) -> None:
    await world.serve(world.shows(world.authority.service("orders")))
    (endpoint,) = world.plane.endpoints("orders")
    async with InMemoryControlPlane() as plane, mesh_client.connect(plane.address, cache_dir="") as mesh:
        plane.set_endpoints("orders", endpoint)
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await echo_on(mesh.channel("orders"))
    assert "it may require TLS, and this process speaks plaintext" in caught.value.mesh.hint


async def test_a_workload_cannot_pose_as_the_control_plane(world: World) -> None:
    impostor = world.shows(world.authority.service("orders"))
    async with InMemoryControlPlane(credentials=impostor) as plane:
        mesh = make_mesh((plane.address,), "billing", Locality(), MutualTls(world.identity), cache_dir="")
        async with mesh:
            mesh.channel("orders")
            await until(mesh, lambda: "unreachable" in mesh.state().control_plane)
            assert "holds a certificate of somebody else than the control plane" in mesh.state().control_plane


# -- before there is a certificate


async def test_calls_wait_for_the_first_certificate() -> None:
    async with open_world(has_certificate=False) as world:
        await world.serve(world.shows(world.authority.service("orders")))
        world.identity.hopeless = False
        call = asyncio.ensure_future(world.call())
        await until(world.mesh, lambda: "for want of a certificate" in world.mesh.state().control_plane)
        assert not call.done()
        world.identity.take(world.authority.issue(BILLING), world.authority.roots)
        assert await call == b"hello"


async def test_calls_fail_in_words_when_there_is_no_certificate_to_hope_for_and_succeed_once_there_is() -> None:
    async with open_world(has_certificate=False) as world:
        await world.serve(world.shows(world.authority.service("orders")))
        world.mesh.channel("orders")
        world.identity.revoke()  # tells of a change: all has been tried
        error = await world.failure()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.mesh.reason is Reason.NO_IDENTITY
        assert "check MESH_ENROLMENT and the join token" in error.mesh.hint
        assert error.mesh.identity
        waiting = asyncio.ensure_future(echo_on(world.mesh.channel("orders"), wait_for_ready=True))
        world.identity.take(world.authority.issue(BILLING), world.authority.roots)
        assert await waiting == b"hello"
        assert await world.call() == b"hello"


async def test_nothing_is_opened_without_a_certificate() -> None:
    transport = MutualTls(TestIdentity(BILLING, None))
    with pytest.raises(IdentityError):
        transport.open_channel("127.0.0.1:1", "orders")
    server = grpc.aio.server()
    with pytest.raises(IdentityError):
        transport.add_port(server, "127.0.0.1:0")
    with pytest.raises(IdentityError):
        await transport.ready()
    await server.stop(None)


# -- credentials that change


async def test_calls_in_flight_end_on_the_old_connection_and_new_ones_use_the_new_certificate(world: World) -> None:
    echo = await world.serve(world.shows(world.authority.service("orders")))
    held = asyncio.ensure_future(world.call(b"hold"))
    await echo.entered.wait()
    method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = world.mesh.channel("orders").stream_stream(
        "/test.Echo/Stream"
    )
    stream = method()
    await stream.write(b"before")
    assert await stream.read() == b"before"

    renamed = Principal.service("mesh.internal", "renamed")
    world.identity.take(world.authority.issue(renamed), world.authority.roots)
    await calls_of(world, echo, renamed)

    await stream.write(b"after")
    assert await stream.read() == b"after"
    echo.release.set()
    assert await held == b"hold"
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


async def calls_of(world: World, echo: Echo, principal: Principal) -> None:
    """Calls until the server sees this caller."""
    async with asyncio.timeout(10):
        while not echo.callers or echo.callers[-1] != principal.spiffe_id.encode():
            assert await world.call() == b"hello"


async def test_a_connection_in_use_is_used_until_the_new_one_is_there(world: World) -> None:
    identity = TestIdentity(ORDERS, world.authority)
    server, echo = grpc.aio.server(), Echo()
    server.add_generic_rpc_handlers((echo,))
    port = MutualTls(identity).add_port(server, "127.0.0.1:0")
    await server.start()
    world.stack.push_async_callback(server.stop, None)
    world.plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", port))
    assert await world.call() == b"hello"

    # From now on the server accepts nobody whom it has not accepted before.
    identity.take(world.authority.issue(ORDERS), TestAuthority().roots)
    renamed = Principal.service("mesh.internal", "renamed")
    world.identity.take(world.authority.issue(renamed), world.authority.roots)
    for _ in range(50):
        assert await world.call() == b"hello"
    assert set(echo.callers) == {BILLING.spiffe_id.encode()}

    identity.take(world.authority.issue(ORDERS), world.authority.roots)
    await calls_of(world, echo, renamed)


async def test_a_connection_whose_successor_cannot_be_made_is_given_up_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "REPLACE_TIMEOUT", 0.1)
    identity = TestIdentity(ORDERS, world.authority)
    server, echo = grpc.aio.server(), Echo()
    server.add_generic_rpc_handlers((echo,))
    port = MutualTls(identity).add_port(server, "127.0.0.1:0")
    await server.start()
    world.stack.push_async_callback(server.stop, None)
    world.plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", port))
    assert await world.call() == b"hello"
    identity.take(world.authority.issue(ORDERS), TestAuthority().roots)
    world.identity.take(world.authority.issue(BILLING), world.authority.roots)

    async def call_on() -> None:
        while True:
            await world.call()

    with pytest.raises(mesh_client.MeshRpcError) as caught:
        await asyncio.wait_for(call_on(), 10)
    assert "may not accept this process's certificate" in caught.value.mesh.hint


async def test_an_endpoint_that_leaves_while_its_connection_is_replaced_leaves_nothing_behind(world: World) -> None:
    await world.serve(world.shows(world.authority.service("orders")))
    await world.call()
    (followed,) = world.mesh._resolver.targets
    world.identity.take(world.authority.issue(BILLING), world.authority.roots)
    world.plane.set_endpoints("orders")
    async with asyncio.timeout(10):
        while followed._connections:
            await asyncio.sleep(0.01)
    assert followed._replacing == set()


async def test_no_call_fails_while_credentials_change_again_and_again(world: World) -> None:
    echo = await world.serve(world.shows(world.authority.service("orders")))
    await world.call()

    async def call_on() -> None:
        for _ in range(100):
            assert await world.call() == b"hello"

    async def rotate() -> None:
        for _ in range(20):
            world.identity.take(world.authority.issue(BILLING), world.authority.roots)
            before = len(echo.callers)
            while len(echo.callers) < before + 10:
                await asyncio.sleep(0)

    await asyncio.gather(*(call_on() for _ in range(8)), rotate())
    renamed = Principal.service("mesh.internal", "renamed")
    world.identity.take(world.authority.issue(renamed), world.authority.roots)
    await calls_of(world, echo, renamed)


async def test_old_connections_are_closed_when_their_calls_have_ended(world: World) -> None:
    await world.serve(world.shows(world.authority.service("orders")))
    await world.call()
    (followed,) = world.mesh._resolver.targets
    (old,) = followed._connections
    world.identity.take(world.authority.issue(BILLING), world.authority.roots)
    async with asyncio.timeout(10):
        while old in followed._connections:
            await asyncio.sleep(0.01)
    assert old.channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
    assert len(followed._connections) == 1
    await world.call()


async def test_servers_show_the_new_certificate_to_new_connections_and_trust_the_new_roots() -> None:
    old_root, new_root = TestAuthority(), TestAuthority()
    both = old_root.roots + new_root.roots
    identity = TestIdentity(ORDERS, old_root)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = MutualTls(identity).add_port(server, "127.0.0.1:0")
    await server.start()

    async def call_as(certificate: Certificate, roots: bytes) -> bytes:
        caller = TestIdentity(BILLING, None)
        caller.take(certificate, roots)
        async with MutualTls(caller).open_channel(f"127.0.0.1:{port}", "orders") as channel:
            return await echo_on(channel)

    old, new = old_root.issue(BILLING), new_root.issue(BILLING)
    assert await call_as(old, old_root.roots) == b"hello"
    with pytest.raises(grpc.aio.AioRpcError):
        await call_as(new, both)
    identity.take(new_root.issue(ORDERS), both)
    assert await call_as(old, both) == b"hello"
    assert await call_as(new, new_root.roots) == b"hello"
    with pytest.raises(grpc.aio.AioRpcError, match="CERTIFICATE_VERIFY_FAILED"):
        await call_as(old, old_root.roots)
    identity.take(new_root.issue(ORDERS), new_root.roots)
    assert await call_as(new, new_root.roots) == b"hello"
    with pytest.raises(grpc.aio.AioRpcError):
        await call_as(old, both)
    await server.stop(None)


async def test_a_ports_tls_context_is_made_anew_now_and_then_so_that_sessions_do_not_outlive_certificates() -> None:
    clock = FakeClock(100.0)
    identity = TestIdentity(ORDERS, TestAuthority())
    current = CurrentConfiguration(identity, clock)
    clock.advance(CONTEXT_LIFE - 1)
    assert current.news() is None
    clock.advance(1)
    assert current.news() is current.configuration
    assert current.news() is None
    identity.take(TestAuthority().issue(ORDERS), b"")
    assert current.news() is identity.server_configuration()
    assert current.news() is None


async def test_a_port_that_is_taken_is_an_error(world: World) -> None:
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    transport = MutualTls(TestIdentity(ORDERS, world.authority))
    port = transport.add_port(server, "127.0.0.1:0")
    other = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    with pytest.raises(ConfigError, match="cannot listen"):
        transport.add_port(other, f"127.0.0.1:{port}")
    await server.stop(None)
    await other.stop(None)


async def test_nothing_overrides_whom_a_channel_is_for(world: World) -> None:
    await world.serve(world.shows(world.authority.service("inventory")))
    (endpoint,) = world.plane.endpoints("orders")
    sly: tuple[tuple[str, Any], ...] = (("grpc.ssl_target_name_override", "inventory.mesh.internal"),)
    async with MutualTls(world.identity).open_channel(endpoint.target, "orders", sly) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="Hostname Verification"):
            await echo_on(channel)
    async with MutualTls(world.identity).open_channel(endpoint.target, CONTROL_PLANE) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="Hostname Verification"):
            await echo_on(channel)


async def test_plaintext_says_so_at_each_start(caplog: pytest.LogCaptureFixture) -> None:
    transport = PlaintextTransport()
    await transport.start()
    assert "insecure, as asked" in caplog.text
    await transport.ready()
    transport.on_change(lambda: None)()
    await transport.stop()
    assert (transport.secure, transport.identity, transport.problem, transport.failing) == (False, None, "", False)
