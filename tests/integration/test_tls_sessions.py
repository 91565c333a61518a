"""TLS sessions that clients resume: not for long, for a certificate is not looked at again then."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh_client import transport
from mesh_client.core.identity import Principal
from mesh_client.transport import MutualTls
from tests.certificates import Certificate, TestAuthority
from tests.identities import TestIdentity

ORDERS = Principal.service("mesh.internal", "orders")
SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""What begins an HTTP/2 connection."""


@asynccontextmanager
async def serving(identity: TestIdentity) -> AsyncIterator[int]:
    server = grpc.aio.server()
    port = MutualTls(identity).add_port(server, "127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


class Client:
    """A client that keeps its TLS session for the next connection."""

    def __init__(self, directory: Path, certificate: Certificate, roots: bytes) -> None:
        path = directory / "client.pem"
        path.write_bytes(certificate.key + certificate.chain)
        self._context = ssl.create_default_context(cadata=roots.decode())
        self._context.load_cert_chain(path)
        self._context.set_alpn_protocols(["h2"])
        self._session: ssl.SSLSession | None = None

    def connect(self, port: int) -> bool:
        """Whether the session of the connection before was resumed.

        Raises:
            OSError: the server did not accept the certificate.
        """
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
            self._context.wrap_socket(raw, server_hostname=ORDERS.dns_name, session=self._session) as connection,
        ):
            connection.sendall(SETTINGS)
            if not connection.recv(65536):  # in TLS 1.3 the ticket comes with what is read first
                raise ConnectionResetError("the server did not accept the certificate")
            self._session = connection.session
            return bool(connection.session_reused)


async def test_a_session_is_resumed_within_the_life_of_a_context_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = TestAuthority()
    async with serving(TestIdentity(ORDERS, authority)) as port:
        client = Client(tmp_path, authority.service("billing"), authority.roots)
        await asyncio.to_thread(client.connect, port)
        assert await asyncio.to_thread(client.connect, port)
        monkeypatch.setattr(transport, "CONTEXT_LIFE", 0.0)
        assert not await asyncio.to_thread(client.connect, port)
        assert not await asyncio.to_thread(client.connect, port)


async def test_a_session_does_not_survive_new_roots(tmp_path: Path) -> None:
    authority, other = TestAuthority(), TestAuthority()
    identity = TestIdentity(ORDERS, authority)
    async with serving(identity) as port:
        client = Client(tmp_path, authority.service("billing"), authority.roots)
        await asyncio.to_thread(client.connect, port)
        identity.take(authority.issue(ORDERS), other.roots)
        with pytest.raises(OSError, match="accept|reset|alert"):
            await asyncio.to_thread(client.connect, port)
