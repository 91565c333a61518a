"""Quiet calls outlive the pings that keep their connections: servers take as many as clients send.

gRPC counts a ping that comes sooner than the server's minimum, 300 s unless told otherwise, as a strike; the third ends
the connection with GOAWAY too_many_pings. Here all intervals of both sides are a tenth of what they are, and a relay
between them counts the pings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mesh.v1 import discovery_pb2, discovery_pb2_grpc, resource_pb2

import control_plane.ports
from mesh_client.transport import CHANNEL_OPTIONS, SERVER_OPTIONS, open_channel
from tests.integration import orders
from tests.integration.orders import running

Options = Sequence[tuple[str, object]]

PATIENCE = 25.0
ENOUGH = 5
"""Pings, more than gRPC lets pass."""

_PREFACE, _HEADER = 24, 9
_PING, _ACK = 6, 1


def hurried(options: Options) -> list[tuple[str, object]]:
    """The options with intervals of a tenth. Timeouts stay: they are for peers that are gone."""
    return [
        (
            name,
            value // 10
            if isinstance(value, int) and name.endswith(("_time_ms", "_interval_without_data_ms"))
            else value,
        )
        for name, value in options
    ]


class PingCounter:
    """Finds the pings in what a client sends on one connection (RFC 9113, sections 3.4, 4.1 and 6.7)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._skip = _PREFACE

    def feed(self, data: bytes) -> int:
        """How many pings begin in the data, answers to the other side's not counted."""
        self._data += data
        pings = 0
        while len(self._data) >= self._skip + _HEADER:
            del self._data[: self._skip]
            self._skip = _HEADER + int.from_bytes(self._data[:3], "big")
            pings += self._data[3] == _PING and not self._data[4] & _ACK
        return pings


class Relay:
    """A TCP relay to one port that counts the pings of clients.

    Args:
        target: ``host:port`` that it relays to.
    """

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._connections: set[asyncio.Task[None]] = set()
        self._counted = asyncio.Condition()
        self.pings = 0
        self.address = ""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Relays for the ``async with``."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()
            for task in self._connections:
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await server.wait_closed()

    async def counted(self, pings: int) -> None:
        """Returns when clients have sent this many pings, and their connections still stand."""
        async with self._counted:
            await self._counted.wait_for(lambda: self.pings >= pings)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        target_reader, target_writer = await asyncio.open_connection(self._host, self._port)
        try:
            await asyncio.gather(self._relay(reader, target_writer, PingCounter()), self._relay(target_reader, writer))
        finally:
            for each in (writer, target_writer):
                each.close()

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counter: PingCounter | None = None
    ) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
            if counter is not None and (pings := counter.feed(data)):
                async with self._counted:
                    self.pings += pings
                    self._counted.notify_all()
        writer.write_eof()


@asynccontextmanager
async def pinged(target: str) -> AsyncIterator[tuple[Relay, grpc.aio.Channel]]:
    """A channel through a relay, as the mesh opens them, in a hurry."""
    relay = Relay(target)
    async with relay.open(), open_channel(relay.address, hurried(CHANNEL_OPTIONS)) as channel:
        yield relay, channel


async def test_a_quiet_call_to_a_server_outlives_pings() -> None:
    async with (
        asyncio.timeout(PATIENCE),
        running(registry="none", options=hurried(SERVER_OPTIONS)) as server,
        pinged(server.endpoint.target) as (relay, channel),
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await relay.counted(ENOUGH)
        await server.set_serving(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_a_quiet_discovery_stream_outlives_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_plane.ports, "SERVER_OPTIONS", hurried(control_plane.ports.SERVER_OPTIONS))
    endpoints = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS
    async with asyncio.timeout(PATIENCE), orders.control_plane() as plane, pinged(plane.address) as (relay, channel):
        stream = discovery_pb2_grpc.DiscoveryServiceStub(channel).DeltaResources()
        first = discovery_pb2.DeltaResourcesRequest(
            node=discovery_pb2.Node(id="quiet"), type=endpoints, subscribe=["orders"]
        )
        await stream.write(first)
        response = await stream.read()
        assert isinstance(response, discovery_pb2.DeltaResourcesResponse)
        await relay.counted(ENOUGH)
        second = discovery_pb2.DeltaResourcesRequest(
            type=endpoints, subscribe=["payments"], response_nonce=response.nonce
        )
        await stream.write(second)
        assert await stream.read() is not grpc.aio.EOF
        stream.cancel()


async def test_a_server_with_grpcs_own_minimum_ends_the_call() -> None:
    """What the tests above guard against does happen without the options, so they do see it."""
    async with (
        asyncio.timeout(PATIENCE),
        running(registry="none", options=[("grpc.http2.min_ping_interval_without_data_ms", 300_000)]) as server,
        pinged(server.endpoint.target) as (_, channel),
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError, match="[Tt]oo many pings|too_many_pings"):
            await watch.read()
