"""A child process: many subscribers, each with a stream and a store of its own, as mesh clients have.

Asked for a number it answers when each of them had applied the change of that number.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc.aio
from mesh.v1 import discovery_pb2, discovery_pb2_grpc

from benchmarks.fanout_plane import SERVICE
from benchmarks.processes import PATIENCE, serve_parent
from mesh_client.convert import acknowledge_to_proto, subscribe_to_proto, update_from_proto
from mesh_client.core.store import Store
from mesh_client.transport import open_channel

STREAMS_PER_CONNECTION = 50


class Subscriber:
    """One client of the control plane."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._store = Store()
        self._store.subscribe(SERVICE)
        self.applied: dict[int, float] = {}
        self.latest = -1

    async def follow(self, channel: grpc.aio.Channel, changed: asyncio.Event) -> None:
        """Until cancelled."""
        call = discovery_pb2_grpc.DiscoveryServiceStub(channel).DeltaResources()
        node = discovery_pb2.Node(id=f"subscriber-{self._number}")
        for request in self._store.opened():
            await call.write(subscribe_to_proto(request, node))
        async for response in call:
            acknowledge, services = self._store.apply(update_from_proto(response))
            endpoints = self._store.endpoints(SERVICE)
            if SERVICE in services and endpoints is not None:
                self.latest = int(endpoints.endpoints[0].metadata["change"])
                self.applied[self.latest] = time.monotonic()
                changed.set()
            await call.write(acknowledge_to_proto(acknowledge))


async def _main(address: str, first: int, count: int) -> None:
    subscribers = [Subscriber(first + index) for index in range(count)]
    changed = asyncio.Event()
    channels = [
        open_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(0, count, STREAMS_PER_CONNECTION)
    ]
    tasks = [
        asyncio.create_task(subscriber.follow(channels[index // STREAMS_PER_CONNECTION], changed))
        for index, subscriber in enumerate(subscribers)
    ]

    async def all_have(number: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while any(subscriber.latest < number for subscriber in subscribers):
                await changed.wait()
                changed.clear()

    async def times(number: Any) -> list[float]:
        await all_have(number)
        return [subscriber.applied.pop(number) for subscriber in subscribers]

    try:
        await all_have(0)
        await serve_parent(len(subscribers), times)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
