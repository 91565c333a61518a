"""Servers take metadata up to a size, and all of it, however often: gRPC alone refuses some of that at random."""

from __future__ import annotations

import collections

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh_client.transport import MAX_METADATA, open_channel
from tests.integration.orders import running

REQUESTS = 20


async def answers(target: str, size: int) -> collections.Counter[grpc.StatusCode]:
    """What is answered to requests with so much metadata."""
    found: collections.Counter[grpc.StatusCode] = collections.Counter()
    async with open_channel(target) as channel:
        for _ in range(REQUESTS):
            call = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), metadata=(("x-large", "a" * size),), timeout=10
            )
            found[await call.code()] += 1
    return found


@pytest.mark.parametrize("size", [9_000, 15_000, MAX_METADATA - 1_000])
async def test_metadata_of_any_size_up_to_the_largest_is_taken(size: int) -> None:
    async with running(registry="none") as server:
        assert await answers(server.endpoint.target, size) == {grpc.StatusCode.OK: REQUESTS}


async def test_more_is_refused() -> None:
    async with running(registry="none") as server:
        assert await answers(server.endpoint.target, MAX_METADATA) == {grpc.StatusCode.RESOURCE_EXHAUSTED: REQUESTS}


async def test_what_the_user_says_wins() -> None:
    options = [("grpc.max_metadata_size", 4_000), ("grpc.absolute_max_metadata_size", 4_000)]
    async with running(registry="none", options=options) as server:
        assert await answers(server.endpoint.target, 3_000) == {grpc.StatusCode.OK: REQUESTS}
        assert await answers(server.endpoint.target, 5_000) == {grpc.StatusCode.RESOURCE_EXHAUSTED: REQUESTS}
