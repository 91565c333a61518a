"""Who does not get in: bad certificates, none, and plaintext, at a server of the mesh and at the control plane."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Principal
from mesh_client.core.policy import ServicePolicy
from mesh_client.mesh_server import MeshServer
from tests.security.mint import Credential, Mint, self_signed
from tests.security.world import DOMAIN, SECRET_REQUEST, Log, World, open_world, refused, status

GATEWAY = Principal.service(DOMAIN, "gateway")
ALICE = Principal.operator(DOMAIN, "alice")
OPEN = ServicePolicy(service="orders")


@asynccontextmanager
async def victims(world: World) -> AsyncIterator[MeshServer]:
    """A server of orders that everybody of the mesh may call, beside the control plane."""
    async with world.serving("orders", registry="none", policy=OPEN) as server:
        yield server


def forged_by(workload: Callable[[Mint], Credential]) -> Callable[[Mint, Principal], Credential]:
    """A workload signs others as if its certificate were an authority's."""
    return lambda mint, who: mint.sign(who, issuer=workload(mint))


HANDSHAKE: dict[str, Callable[[Mint, Principal], Credential]] = {
    "self-signed": lambda mint, who: Credential(*_key_and_chain(self_signed(who)), mint.roots),
    "expired": lambda mint, who: mint.sign(who, starts=-7200, ends=-1),
    "not yet valid": lambda mint, who: mint.sign(who, starts=3600, ends=7200),
    "signed by a workload": forged_by(lambda mint: mint.sign(GATEWAY)),
    "signed by a workload that says it is an authority": forged_by(lambda mint: mint.sign(GATEWAY, authority=True)),
    "signed by an operator": forged_by(lambda mint: mint.operator()),
    "of another trust domain below the same root": lambda mint, _: mint.sign(
        Principal.service("evil.example", "gateway")
    ),
    "of a trust domain that ends alike": lambda mint, _: mint.sign(Principal.service("evilmesh.internal", "gateway")),
    "for servers alone": lambda mint, who: mint.sign(who, usages=[ExtendedKeyUsageOID.SERVER_AUTH]),
    "for code signing": lambda mint, who: mint.sign(who, usages=[ExtendedKeyUsageOID.CODE_SIGNING]),
}


def _key_and_chain(credential: Credential) -> tuple[bytes, bytes]:
    return credential.key, credential.chain


async def test_a_certificate_that_does_not_hold_gets_nobody_in(world: World) -> None:
    async with victims(world) as server:
        got_in: list[str] = []
        for name, make in HANDSHAKE.items():
            async with world.to(server, make(world.mint, GATEWAY)) as raw:
                if (await refused(raw.echo(), name)).code() is not grpc.StatusCode.UNAVAILABLE:
                    got_in.append(f"{name}, to the server")
            async with world.mesh(make(world.mint, ALICE)) as raw:
                if (await refused(status(raw), name)).code() is not grpc.StatusCode.UNAVAILABLE:
                    got_in.append(f"{name}, to the control plane")
        assert got_in == []
        assert world.echoes[server].received == []


async def test_without_a_certificate_nobody_gets_in(world: World) -> None:
    async with victims(world) as server:
        trusting = grpc.ssl_channel_credentials(world.mint.roots)
        for target, name in ((server.endpoint.target, f"orders.{DOMAIN}"), (world.plane.address, world.name)):
            async with world.channel(target, trusting, name) as raw:
                assert (await refused(raw.echo())).code() is grpc.StatusCode.UNAVAILABLE
        assert world.echoes[server].received == []


async def test_a_certificate_of_another_mesh_gets_nobody_in(world: World, tmp_path: Path) -> None:
    """Same names, another root."""
    other = Mint(tmp_path / "other")
    async with victims(world) as server:
        for who, target, name in (
            (GATEWAY, server.endpoint.target, f"orders.{DOMAIN}"),
            (ALICE, world.plane.address, world.name),
        ):
            stranger = Credential(*_key_and_chain(other.sign(who)), world.mint.roots)
            async with world.channel(target, stranger.for_channel(), name) as raw:
                assert (await refused(raw.echo())).code() is grpc.StatusCode.UNAVAILABLE
        assert world.echoes[server].received == []


# -- names smuggled into certificates that the mesh's own authority signed

_ORDERS, _ROOT = f"spiffe://{DOMAIN}/service/orders", f"spiffe://{DOMAIN}/operator/alice"
_ID = "0123456789abcdef"

NAMES: dict[str, Any] = {
    "two SPIFFE IDs": {"uris": [_ORDERS, _ROOT]},
    "two SPIFFE IDs, the other way round": {"uris": [_ROOT, _ORDERS]},
    "the same SPIFFE ID twice": {"uris": [_ROOT, _ROOT]},
    "no SPIFFE ID": {"uris": []},
    "an escaped letter": {"uris": [f"spiffe://{DOMAIN}/operator/%61lice"]},
    "an escaped slash": {"uris": [f"spiffe://{DOMAIN}/operator%2falice"]},
    "a scheme in capitals": {"uris": [f"SPIFFE://{DOMAIN}/operator/alice"]},
    "a trailing slash": {"uris": [f"{_ROOT}/"]},
    "a doubled slash": {"uris": [f"spiffe://{DOMAIN}//operator/alice"]},
    "dots": {"uris": [f"spiffe://{DOMAIN}/service/../operator/alice"]},
    "a query": {"uris": [f"{_ROOT}?x"]},
    "a fragment": {"uris": [f"{_ROOT}#x"]},
    "a port": {"uris": [f"spiffe://{DOMAIN}:443/operator/alice"]},
    "somebody before the domain": {"uris": [f"spiffe://alice@{DOMAIN}/operator/alice"]},
    "a NUL after the name": {"uris": [f"{_ROOT}\0.evil"]},
    "a NUL before the name": {"uris": [f"spiffe://{DOMAIN}/operator/\0alice"]},
    "a newline": {"uris": [f"{_ROOT}\n"]},
    "a space": {"uris": [f"{_ROOT} "]},
    "another scheme": {"uris": [f"https://{DOMAIN}/operator/alice"]},
    "a path of no kind": {"uris": [f"spiffe://{DOMAIN}/root"]},
    "the trust domain alone": {"uris": [f"spiffe://{DOMAIN}"]},
    "the SPIFFE ID as common name": {"uris": [], "common_names": [_ROOT]},
    "the SPIFFE ID as DNS name": {"uris": [], "dns": [f"alice.{DOMAIN}"], "common_names": [_ID]},
    "two common names": {"common_names": [_ID, _ID[::-1]]},
    "no common name": {"common_names": []},
    "a common name that is no workload id": {"common_names": ["alice"]},
    "a common name with a NUL": {"common_names": [f"{_ID}\0"]},
    "a common name in capitals": {"common_names": [_ID.upper()]},
}


async def test_names_that_are_not_exactly_one_of_the_mesh_are_nobodys(world: World) -> None:
    """Refused in the handshake, or taken for nobody: never for one of those whom they name."""
    async with victims(world) as server:
        for name, changed in NAMES.items():
            sly = world.mint.sign(ALICE, **changed)
            async with world.to(server, sly) as raw:
                error = await refused(raw.echo(), name)
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED, name
                assert "the caller's certificate names nobody of this mesh" in (error.details() or ""), name
            before = len(world.log.lines)
            async with world.mesh(sly) as raw:
                error = await refused(status(raw), name)
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                assert error.code() is grpc.StatusCode.PERMISSION_DENIED, name
                assert any("refused: a caller without identity" in line for line in world.log.lines[before:]), name
        assert world.echoes[server].received == []
        assert "nobody of this mesh: the caller's certificate names nobody" in world.log.mesh_client


async def test_what_a_caller_says_of_itself_does_not_count(world: World) -> None:
    rules = ServicePolicy.parse({"service": "orders", "authorization": [{"callers": ["gateway"], "methods": ["*"]}]})
    claims = (("mesh-caller", "gateway"), ("x-spiffe-id", GATEWAY.spiffe_id), ("x-forwarded-client-cert", "gateway"))
    async with world.serving("orders", registry="none", policy=rules) as server:
        async with world.to(server, await world.join("inventory")) as raw:
            error = await refused(raw.echo(metadata=claims))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "inventory may not call test.Echo/Unary" in (error.details() or "")
        assert "inventory may not call test.Echo/Unary" in world.log.mesh_client
        async with world.to(server, await world.join("gateway")) as raw:
            assert await raw.echo(metadata=(("mesh-caller", "inventory"),)) == SECRET_REQUEST
        (caller,) = world.echoes[server].callers
        assert caller is not None
        assert caller.spiffe_id == GATEWAY.spiffe_id


# -- plaintext


async def test_plaintext_gets_nobody_in(world: World) -> None:
    async with victims(world) as server:
        for target in (server.endpoint.target, world.plane.address, world.plane.enrolment_address):
            async with world.channel(target, None) as raw:
                assert (await refused(raw.echo())).code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(ConfigError, match="on a secure server nobody is served without an identity"):
            server.add_insecure_port("127.0.0.1:0")
        assert world.echoes[server].received == []


async def test_versions_of_tls_before_1_2_get_nobody_in(world: World) -> None:
    async with victims(world) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="is deprecated"):
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        for port in (server.port, world.plane.port, world.plane.enrolment_port):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=context)


async def test_handshakes_that_are_never_ended_stop_nobody_else(world: World) -> None:
    async with victims(world) as server, AsyncExitStack() as stack:
        for number in range(200):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            slow.sendall((b"", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n")[number % 3])
        async with world.to(server, await world.join("gateway")) as raw:
            assert await raw.echo() == SECRET_REQUEST


# -- sessions that are taken up again


@pytest.mark.parametrize("past", [False, True], ids=["within its time", "past its time"])
async def test_a_session_is_not_taken_up_again_past_its_time(
    past: bool, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that is resumed shows no certificate: the one that it began with may have ended since."""
    if past:
        monkeypatch.setattr("mesh_client.transport.CONTEXT_LIFE", 0.0)
        monkeypatch.setattr("control_plane.identity.own_identity.TICKET_LIFETIME", 0.0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])

    def connect(port: int, name: str, session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname=name, session=session) as secure,
        ):
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            assert secure.recv(100)
            return bool(secure.session_reused), secure.session

    async with open_world(tmp_path, log) as world, victims(world) as server:
        stolen = world.mint.sign(GATEWAY)
        path = tmp_path / "stolen.pem"
        path.write_bytes(stolen.key + stolen.chain)
        context.load_cert_chain(path)
        for port, name in ((server.port, f"orders.{DOMAIN}"), (world.plane.port, world.name)):
            _, session = await asyncio.to_thread(connect, port, name, None)
            reused, _ = await asyncio.to_thread(connect, port, name, session)
            assert reused is not past


# -- what the log says: handshakes are gRPC's, and programs of the mesh take its record of them over

_VICTIM = """
import asyncio, logging, os, sys
from pathlib import Path
import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.identity.options import IdentityOptions
from control_plane.server import ControlPlane

async def main():
    directory = Path(sys.argv[1])
    identity = IdentityOptions(
        ca_certificate=directory / "ca.pem", ca_key=directory / "ca.key", ca_roots=directory / "roots.pem"
    )
    plane = ControlPlane(ControlPlaneOptions(identity=identity))
    await plane.start()
    print(plane.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await plane.stop(0)

mesh_client.adopt_grpc_log()
logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
os.write(2, b"from a library in C\\n")
asyncio.run(main())
"""


async def test_the_log_says_why_a_handshake_was_refused_however_often_it_is_tried(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    mint = Mint(tmp_path / "logged")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _VICTIM, str(tmp_path / "logged")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        attempts: list[grpc.ChannelCredentials | None] = [
            HANDSHAKE[name](mint, ALICE).for_channel()
            for name in ("self-signed", "expired", "not yet valid", "signed by a workload", "for servers alone")
        ]
        attempts += [grpc.ssl_channel_credentials(mint.roots), None]
        for credentials in attempts:
            async with world.channel(address, credentials, world.name) as raw:
                assert (await refused(status(raw))).code() is grpc.StatusCode.UNAVAILABLE
        for _ in range(100):
            await _knock(address)
    finally:
        _, errors = await process.communicate(b"")
    said = errors.decode()
    for reason in (
        "the other side's certificate was refused: self signed certificate",
        "the other side's certificate was refused: certificate has expired",
        "the other side's certificate was refused: certificate is not yet valid",
        "the other side's certificate was refused: invalid CA certificate",
        "the other side's certificate was refused: unsupported certificate purpose",
        "the other side showed no certificate",
        "the other side speaks plaintext, not TLS",
    ):
        assert f"WARNING grpc.core: a TLS handshake failed: {reason}\n" in said
    assert 1 <= said.count("plaintext HTTP") < 50
    assert "from a library in C\n" in said
    assert "ssl_transport_security" not in said
    world.log.check(said)


async def _knock(address: str) -> None:
    """A web browser, or whoever scans ports."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\nhost: mesh\r\n\r\n")
    await reader.read()
    writer.close()
    await writer.wait_closed()
