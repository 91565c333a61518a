from __future__ import annotations

import asyncio
import contextlib
import socket

import grpc.aio
import pytest

from mesh_client.transport import SERVER_OPTIONS, add_port
from tests.ports import held_address, hold_port, hold_ports


def test_a_held_port_refuses_connections_and_is_taken() -> None:
    with hold_port() as held, socket.socket() as caller, socket.socket() as another:
        with pytest.raises(ConnectionRefusedError):
            caller.connect(held.getsockname())
        with pytest.raises(OSError, match="in use"):
            another.bind(held.getsockname())


async def test_servers_can_listen_on_a_held_port_again_and_again() -> None:
    with held_address() as address:
        for _ in range(2):
            server = grpc.aio.server(options=SERVER_OPTIONS)
            assert f"127.0.0.1:{add_port(server, address)}" == address
            await server.start()
            await server.stop(None)
            plain = await asyncio.start_server(lambda _, writer: writer.close(), *address.split(":"))
            plain.close()
            await plain.wait_closed()


def test_several_ports_differ_and_are_given_back() -> None:
    with contextlib.ExitStack() as stack:
        ports = hold_ports(stack, 5)
        assert len(set(ports)) == 5
    with hold_port(ports[0]) as held:
        assert held.getsockname()[1] == ports[0]
