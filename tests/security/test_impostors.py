"""Servers that are not who they say they are: none of them learns anything, and whoever refuses them says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from mesh.v1 import admin_pb2

import mesh_client
from mesh_cli.client import AdminClient, UnreachableError
from mesh_cli.credentials import OperatorCredentials
from mesh_client.core.errors import ConfigError, IdentityError, MeshError
from mesh_client.core.identity import Principal
from mesh_client.core.model import Endpoint
from mesh_client.mesh import Mesh
from mesh_client.testing import InMemoryControlPlane
from tests.security.mint import Credential, Mint, self_signed
from tests.security.world import DOMAIN, SECRET_REQUEST, TIMEOUT, Log, World, refused, until

ORDERS = Principal.service(DOMAIN, "orders")
CONTROL_PLANE = Principal.control_plane(DOMAIN)


@asynccontextmanager
async def eavesdropper(answer: bytes = b"") -> AsyncIterator[tuple[str, bytearray]]:
    """Keeps what comes, in plaintext, and answers with what it is told to."""
    heard = bytearray()
    talks: set[asyncio.Task[None]] = set()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        try:
            writer.write(answer)
            while part := await reader.read(65536):
                heard.extend(part)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


async def _call(mesh: Mesh, timeout: float = TIMEOUT) -> bytes:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = mesh.channel("orders").unary_unary("/test.Echo/Unary")
    return await call(SECRET_REQUEST, timeout=timeout)


# -- in place of a service


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda mint: mint.service("payments"), "a certificate of somebody else than orders, and was refused"),
        (lambda mint: mint.sign(CONTROL_PLANE), "a certificate of somebody else than orders, and was refused"),
        (
            lambda mint: mint.sign(Principal.service("evil.example", "orders")),
            "is not from an authority that this process trusts, and it was refused",
        ),
        (
            lambda mint: mint.sign(ORDERS, dns=[f"orders.{DOMAIN}.evil.example"]),
            "is not from an authority that this process trusts, and it was refused",
        ),
        (lambda mint: mint.sign(ORDERS, dns=[f"xorders.{DOMAIN}"]), "somebody else than orders, and was refused"),
        (lambda mint: mint.sign(ORDERS, issuer=mint.service("payments")), "was refused"),
        (lambda mint: mint.sign(ORDERS, starts=-7200, ends=-1), "the certificate of orders has expired"),
        (lambda mint: mint.sign(ORDERS, starts=3600, ends=7200), "the certificate of orders is not valid yet"),
        (
            lambda mint: mint.sign(ORDERS, usages=[ExtendedKeyUsageOID.CLIENT_AUTH]),
            "is not from an authority that this process trusts, and it was refused",
        ),
        (lambda mint: self_signed(ORDERS), "is not from an authority that this process trusts, and it was refused"),
        (lambda mint: None, "whoever answers there speaks plaintext, not TLS, and was refused"),
    ],
    ids=[
        "another service",
        "the control plane",
        "another trust domain",
        "the name and more",
        "more and the name",
        "signed by a workload",
        "expired",
        "not yet valid",
        "an operator's kind of certificate",
        "self-signed",
        "plaintext",
    ],
)
async def test_whoever_stands_in_for_orders_gets_no_request(
    make: Callable[[Mint], Credential | None], said: str, world: World
) -> None:
    """The attacker took over an address at which the mesh believes orders to be."""
    credential = make(world.mint)
    credentials = None if credential is None else credential.for_server(asks=False)
    async with world.impostor(credentials) as (target, echo), world.client() as mesh:
        await world.publish("orders", target)
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await _call(mesh)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert said in caught.value.mesh.hint
    assert said in str(caught.value)
    assert said in world.log.mesh_client
    assert target in world.log.mesh_client
    assert echo.received == []


async def test_a_client_that_means_orders_and_reaches_payments_is_told_so(world: World) -> None:
    """Both sides of the library; payments keeps orders' old address."""
    async with world.serving("payments", registry="none") as payments, world.client() as mesh:
        await world.publish("orders", payments.endpoint.target)
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await _call(mesh)
        assert world.echoes[payments].received == []
    assert "a certificate of somebody else than orders, and was refused" in caught.value.mesh.hint
    assert "the address may belong to another service by now" in caught.value.mesh.hint


async def test_an_impostor_beside_a_good_instance_gets_no_request_and_is_told_of(world: World) -> None:
    """Calls succeed, so nobody but the log tells."""
    credentials = world.mint.service("payments").for_server(asks=False)
    async with (
        world.serving("orders") as server,
        world.impostor(credentials) as (target, echo),
        world.client() as mesh,
    ):
        await world.publish("orders", target)
        for _ in range(10):
            assert await _call(mesh) == SECRET_REQUEST
        await until(lambda: "a certificate of somebody else than orders, and was refused" in world.log.mesh_client)
        assert echo.received == []
        assert len(world.echoes[server].received) == 10


async def test_a_secure_client_sends_plaintext_nothing_but_a_greeting(world: World) -> None:
    async with eavesdropper() as (target, heard), world.client() as mesh:
        await world.publish("orders", target)
        waiting = asyncio.ensure_future(_call(mesh))
        await until(lambda: len(heard) > 100)
        assert heard.startswith(b"\x16\x03")  # a TLS record: the client's hello
        assert SECRET_REQUEST not in heard
        assert b"/test.Echo/Unary" not in heard
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


# -- in place of the control plane's enrolment port


ENROLMENT: dict[str, tuple[Callable[[Mint, Mint], Credential], str]] = {
    "with another root": (
        lambda ours, theirs: theirs.sign(CONTROL_PLANE),
        "it presents none of the trust roots that the join token names, so it was not believed",
    ),
    "with the right root in the chain of another": (
        lambda ours, theirs: _with_root(theirs.sign(CONTROL_PLANE), ours),
        "the certificate of the control plane is not from an authority that this process trusts, and it was refused",
    ),
    "self-signed, with the right root in the chain": (
        lambda ours, theirs: _with_root(self_signed(CONTROL_PLANE), ours),
        "the certificate of the control plane is not from an authority that this process trusts, and it was refused",
    ),
    "as a workload of the mesh": (
        lambda ours, theirs: _with_root(ours.service("payments"), ours),
        "holds a certificate of somebody else than the control plane, and was refused",
    ),
    "as a service called control-plane": (
        lambda ours, theirs: _with_root(ours.service("control-plane"), ours),
        "holds a certificate of somebody else than the control plane, and was refused",
    ),
    "as a service called mesh": (
        lambda ours, theirs: _with_root(ours.service("mesh"), ours),
        "holds a certificate of somebody else than the control plane, and was refused",
    ),
    "with a certificate that a workload signed": (
        lambda ours, theirs: _with_root(ours.sign(CONTROL_PLANE, issuer=ours.service("payments")), ours),
        "the certificate of the control plane is not from an authority that this process trusts, and it was refused",
    ),
    "as an operator": (
        lambda ours, theirs: _with_root(ours.operator(), ours),
        "the certificate of the control plane is not from an authority that this process trusts, and it was refused",
    ),
}


def _with_root(credential: Credential, mint: Mint) -> Credential:
    return Credential(credential.key, credential.chain + mint.roots, credential.roots)


@pytest.mark.parametrize("name", ENROLMENT)
async def test_whoever_stands_in_for_the_enrolment_port_gets_no_token(name: str, world: World, tmp_path: Path) -> None:
    make, said = ENROLMENT[name]
    credential = make(world.mint, Mint(tmp_path / "theirs"))
    async with (
        world.impostor(credential.for_server(asks=False)) as (target, echo),
        world.client("orders", enrolment=target) as mesh,
    ):
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await _call(mesh)
    assert echo.received == []
    assert said in str(caught.value)
    assert said in world.log.mesh_client


async def test_an_enrolment_port_that_listens_in_plaintext_hears_no_token(world: World) -> None:
    token = await world.token()
    async with eavesdropper(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (target, heard):
        async with world.client("orders", enrolment=target, token=token) as mesh:
            with pytest.raises(mesh_client.MeshRpcError):
                await _call(mesh)
        assert heard.startswith(b"\x16\x03")
        assert token.encode() not in heard
        assert token.split(".")[2].encode() not in heard
        assert "orders gets no certificate" in world.log.mesh_client


async def test_roots_that_were_pinned_come_before_those_that_a_token_names(world: World, tmp_path: Path) -> None:
    """Somebody hands out tokens of another mesh; the roots in the file say no."""
    roots = tmp_path / "pinned.pem"
    roots.write_bytes(Mint(tmp_path / "theirs").roots)
    async with world.client("orders", trust_roots=roots) as mesh:
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await _call(mesh)
    assert "is not from an authority that this process trusts, and it was refused" in str(caught.value)
    assert "is not from an authority that this process trusts, and it was refused" in world.log.mesh_client


# -- in place of the control plane's mesh port


@pytest.mark.parametrize(
    "make",
    [lambda mint: mint.service("payments"), lambda mint: mint.service("control-plane"), lambda mint: None],
    ids=["a workload", "a service called control-plane", "plaintext"],
)
async def test_whoever_stands_in_for_the_mesh_port_is_not_believed(
    make: Callable[[Mint], Credential | None], world: World
) -> None:
    """It says where orders is; nobody goes there, and nobody registers with it."""
    credential = make(world.mint)
    credentials = None if credential is None else credential.for_server()
    async with (
        InMemoryControlPlane(credentials=credentials) as plane,
        world.impostor(world.mint.service("orders").for_server(asks=False)) as (target, echo),
    ):
        host, _, port = target.rpartition(":")
        plane.set_endpoints("orders", Endpoint("a", host, int(port)))
        async with world.client(control_plane=plane.address) as mesh:
            with pytest.raises(mesh_client.MeshRpcError) as caught:
                await _call(mesh)
            await until(lambda: "gateway cannot follow the trust bundle" in world.log.mesh_client)
        assert echo.received == []
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "make",
    [lambda mint: mint.service("payments"), lambda mint: mint.service("control-plane"), lambda mint: None],
    ids=["a workload", "a service called control-plane", "plaintext"],
)
async def test_the_mesh_command_tells_an_impostor_nothing(
    make: Callable[[Mint], Credential | None], world: World
) -> None:
    files = await world.authority.create_operator("alice", world.directory / "alice")
    world.log.keep_out(files.key.read_bytes())
    operator = OperatorCredentials.load(files.key.parent)

    def ask(address: str) -> admin_pb2.GetStatusResponse:
        with AdminClient((address,), TIMEOUT, operator) as client:
            return client.call(client.stub.GetStatus, admin_pb2.GetStatusRequest())

    credential = make(world.mint)
    async with world.impostor(None if credential is None else credential.for_server()) as (target, echo):
        with pytest.raises(UnreachableError):
            await asyncio.to_thread(ask, target)
    assert echo.received == []
    assert (await asyncio.to_thread(ask, world.plane.address)).control_plane


# -- downgrades


async def test_a_plaintext_client_learns_nothing_from_a_secure_mesh(world: World) -> None:
    async with (
        world.serving("orders", registry="none") as server,
        InMemoryControlPlane() as plane,
        mesh_client.connect(plane.address, insecure=True, cache_dir="") as mesh,
    ):
        plane.set_endpoints("orders", Endpoint("a", "127.0.0.1", server.port))
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await _call(mesh)
        assert world.echoes[server].received == []
    assert "it may require TLS, and this process speaks plaintext" in caught.value.mesh.hint


async def test_a_plaintext_client_gets_no_word_from_a_secure_control_plane(world: World) -> None:
    async with mesh_client.connect(world.plane.address, insecure=True, cache_dir="") as mesh:
        mesh.channel("orders")
        await until(lambda: "unreachable" in mesh.state().control_plane, mesh.changed)
        with pytest.raises(mesh_client.MeshRpcError):
            await _call(mesh, 0.2)


async def test_plaintext_and_a_token_are_never_taken_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    token = await world.token()
    for options in ({"insecure": True}, {"insecure": None}):
        monkeypatch.setenv("MESH_INSECURE", "1")
        with pytest.raises(ConfigError, match="a process either proves who it is or speaks plaintext"):
            mesh_client.connect(world.plane.address, service="orders", token=token, **options)
        with pytest.raises(ConfigError, match="a process either proves who it is or speaks plaintext"):
            mesh_client.server("orders", control_plane=world.plane.address, token=token, **options)
    monkeypatch.setenv("MESH_TOKEN", token)
    with pytest.raises(ConfigError, match="MESH_INSECURE and MESH_TOKEN"):
        mesh_client.connect(world.plane.address, service="orders")


async def test_a_process_with_an_identity_does_not_become_plaintext_by_a_variable(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = str(tmp_path / "identity")
    async with world.client("gateway", identity_dir=kept, token=await world.token("gateway")) as mesh:
        await mesh.transport.ready()
    monkeypatch.setenv("MESH_INSECURE", "1")
    arguments: list[dict[str, Any]] = [
        {"identity_dir": kept},
        {"trust_roots": "/roots.pem"},
        {"enrolment": world.plane.enrolment_address},
    ]
    for options in arguments:
        with pytest.raises(ConfigError, match="drop MESH_INSECURE"):
            mesh_client.connect(world.plane.address, service="gateway", **options)
        with pytest.raises(ConfigError, match="drop MESH_INSECURE"):
            mesh_client.server("gateway", control_plane=world.plane.address, **options)
    monkeypatch.delenv("MESH_INSECURE")
    again = mesh_client.connect(
        world.plane.address,
        service="gateway",
        cache_dir="",
        enrolment=world.plane.enrolment_address,
        identity_dir=kept,
    )
    async with again as mesh:
        await mesh.transport.ready()
        assert mesh.transport.secure


async def test_a_token_secures_a_process_whatever_the_environment_says(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_INSECURE", "1")
    async with world.client("orders") as mesh:
        assert mesh.transport.secure
        await mesh.transport.ready()


async def test_a_server_whose_enrolment_fails_does_not_serve_in_plaintext(world: World) -> None:
    token = await world.token("orders")
    await world.authority.revoke_token((await world.authority.tokens())[0].id)
    made = mesh_client.server(
        "orders",
        control_plane=world.plane.address,
        enrolment=world.plane.enrolment_address,
        token=token,
        insecure=False,
    )
    with pytest.raises((IdentityError, MeshError), match="the attestation is not accepted"):
        await made.start()
    assert made.port == 0
    assert "is unknown, revoked" in world.log.control_plane
    assert "refused: UNAUTHENTICATED" in world.log.mesh_client


async def test_an_operator_is_no_server(world: World, log: Log, tmp_path: Path) -> None:
    """The operator's own files, as the control plane makes them."""
    files = await world.authority.create_operator("alice", tmp_path / "alice")
    log.keep_out(files.key.read_bytes())
    operator = Credential(files.key.read_bytes(), files.chain.read_bytes(), files.roots.read_bytes())
    assert operator.leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value == x509.ExtendedKeyUsage(
        [ExtendedKeyUsageOID.CLIENT_AUTH]
    )
    async with world.impostor(operator.for_server(asks=False)) as (target, echo), world.client() as mesh:
        await world.publish("orders", target)
        with pytest.raises(mesh_client.MeshRpcError) as caught:
            await _call(mesh)
        # Nor for somebody who would take any name.
        async with world.channel(target, grpc.ssl_channel_credentials(world.mint.roots), "alice") as raw:
            error = await refused(raw.echo())
    assert "was refused" in caught.value.mesh.hint
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert echo.received == []
