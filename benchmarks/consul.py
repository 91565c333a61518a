"""From a write to Consul to the first call on the new endpoint, through a real Consul and a control plane."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
from shop.v1 import inventory_pb2, inventory_pb2_grpc

import mesh_client
from benchmarks.figures import Figure, percentile
from benchmarks.processes import child
from mesh_cli.demo.consul import find_consul, start_consul
from mesh_cli.demo.supervisor import Supervisor

GOAL = 300.0
"""Milliseconds, p99."""
REQUEST = inventory_pb2.GetStockRequest(sku="espresso-beans-1kg")


async def first_call(quick: bool) -> list[Figure]:
    """A new service each time: its registration is written while a call waits for it to be ready."""
    async with AsyncExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        supervisor = await stack.enter_async_context(Supervisor(logs))
        _, consul = await start_consul(supervisor, find_consul(Path(__file__).parents[1]), dict(os.environ))
        plane = await stack.enter_async_context(child("benchmarks.control_plane_process", f"consul://{consul}"))
        server = await stack.enter_async_context(child("benchmarks.shop_server"))
        http = await stack.enter_async_context(aiohttp.ClientSession(f"http://{consul}"))
        mesh = await stack.enter_async_context(mesh_client.connect(plane.ready, cache_dir="", insecure=True))
        lags = []
        for number in range(20 if quick else 100):
            stub = inventory_pb2_grpc.InventoryServiceStub(mesh.channel(f"new-{number}"))
            call = asyncio.ensure_future(stub.GetStock(REQUEST, wait_for_ready=True, timeout=30))
            await mesh.synced()
            started = time.monotonic()
            body = {
                "ID": f"new-{number}-1",
                "Name": f"new-{number}",
                "Tags": ["grpc-mesh"],
                "Address": "127.0.0.1",
                "Port": server.ready,
            }
            async with http.put("/v1/agent/service/register", json=body) as answer:
                answer.raise_for_status()
            await call
            lags.append((time.monotonic() - started) * 1000)
    return [
        Figure(
            f"consul.first_call.{name}",
            percentile(lags, share),
            "ms",
            goal,
            (min(lags), max(lags)),
            f"Consul write to first call on the new endpoint: {name} of {len(lags)}",
        )
        for name, share, goal in (("p50", 0.5, None), ("p99", 0.99, GOAL))
    ]
