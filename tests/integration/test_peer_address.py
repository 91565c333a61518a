"""Who calls is what the connection's certificate says, never what somebody at the same address was before."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from mesh_client import current_caller, server
from mesh_client.core.identity import Principal
from mesh_client.core.model import Locality
from mesh_client.core.policy import ServicePolicy
from mesh_client.mesh import make_mesh
from mesh_client.transport import MutualTls
from tests.certificates import Certificate, TestAuthority
from tests.identities import TestIdentity
from tests.integration.methods import SERVICE, add_methods, call, failure, handler
from tests.ports import hold_port

ORDERS = Principal.service("mesh.internal", "orders")
RULES = ServicePolicy.parse(
    {"service": "orders", "authorization": [{"callers": ["gateway", "billing"], "methods": [f"{SERVICE}/*"]}]}
)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
    sink.close()
    with contextlib.suppress(ConnectionError):
        await sink.wait_closed()


@contextlib.asynccontextmanager
async def always_from(port: int, target: str) -> AsyncIterator[str]:
    """A relay to a server whose connections all come from one port, one after the other; its address."""
    host, _, server_port = target.rpartition(":")
    free = asyncio.Lock()
    relaying: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with free:
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Its end leaves nothing behind that would keep the port busy.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            made.setblocking(False)
            made.bind((host, port))
            await asyncio.get_running_loop().sock_connect(made, (host, int(server_port)))
            onward, back = await asyncio.open_connection(sock=made)
            await asyncio.gather(_pump(reader, back), _pump(onward, writer))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(relay(reader, writer))
        relaying.add(task)
        task.add_done_callback(relaying.discard)

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with listening:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        await asyncio.gather(*relaying)


async def test_nobody_inherits_the_identity_of_who_had_their_address_before() -> None:
    authority = TestAuthority()
    mesh = make_mesh(("127.0.0.1:1",), "orders", Locality(), MutualTls(TestIdentity(ORDERS, authority)), cache_dir="")
    made = server("orders", registry="none", mesh=mesh, policy=RULES)
    seen: list[tuple[str, str]] = []

    async def note(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        caller = current_caller()
        assert caller is not None
        seen.append((context.peer(), str(caller)))
        return b""

    add_methods(made, {"M": handler("unary_unary", note)})
    await made.start()
    names = ("gateway", "billing", "gateway")
    certificates = [authority.service(name) for name in names]
    stranger = authority.service("stranger")

    def connect(certificate: Certificate) -> grpc.aio.Channel:
        credentials = certificate.channel_credentials(authority.roots)
        return grpc.aio.secure_channel(address, credentials, (("grpc.ssl_target_name_override", ORDERS.dns_name),))

    try:
        with hold_port() as held:
            port = held.getsockname()[1]
            async with always_from(port, made.endpoint.target) as address:
                for certificate in certificates:
                    async with connect(certificate) as channel:
                        await call(channel, "unary_unary", "M", [b""], timeout=10.0)
                async with connect(stranger) as channel:
                    refused = await failure(channel, "unary_unary", "M", timeout=10.0)
    finally:
        await made.stop(0)
    assert seen == [
        (f"ipv4:127.0.0.1:{port}", f"spiffe://mesh.internal/service/{name} (workload {certificate.workload_id})")
        for name, certificate in zip(names, certificates, strict=True)
    ]
    assert refused.code is grpc.StatusCode.PERMISSION_DENIED
    assert refused.details.startswith("stranger may not call ")
