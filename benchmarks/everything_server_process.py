"""A child process: the shop's inventory with mutual TLS, in one of several ways. Says its port.

Arguments: the way, the service that it joins as, the collector's address, and the share of traces to sample. Ways:
``bare`` is grpc's own server, ``contrib`` the same with OpenTelemetry's contrib interceptors, ``mesh`` the mesh's with
everything on. Asked anything, it answers with the CPU time that the process has spent, in seconds.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc.aio
from opentelemetry.instrumentation.grpc import aio_server_interceptor
from shop.v1 import inventory_pb2_grpc

import mesh_client
from benchmarks.processes import serve_parent
from benchmarks.shop_server import Inventory
from benchmarks.spans import provider
from mesh_client.core.policy import ServicePolicy
from mesh_client.transport import SERVER_OPTIONS


async def _cpu(_: Any) -> float:
    return time.process_time()


def _rules(service: str) -> ServicePolicy:
    rule = {"callers": ["orders"], "methods": ["shop.v1.InventoryService/*"]}
    limit = {"method": "shop.v1.InventoryService/*", "requests_per_second": 1e6, "scope": "PER_CALLER"}
    return ServicePolicy.parse({"service": service, "authorization": [rule], "rate_limits": [limit]})


async def _main(way: str, service: str, collector: str, share: str) -> None:
    spans = provider(collector, float(share))
    async with mesh_client.connect(service=service, cache_dir="", tracer_provider=spans) as mesh:
        server: grpc.aio.Server
        if way == "mesh":
            made = mesh_client.server(service, mesh=mesh, policy=_rules(service))
            inventory_pb2_grpc.add_InventoryServiceServicer_to_server(Inventory(), made)
            await made.start()
            await made.registered()
            server, port = made, made.port
        else:
            await mesh.transport.ready()
            interceptors = [aio_server_interceptor(tracer_provider=spans)] if way == "contrib" else []
            server = grpc.aio.server(interceptors=interceptors, options=SERVER_OPTIONS)
            inventory_pb2_grpc.add_InventoryServiceServicer_to_server(Inventory(), server)
            port = mesh.transport.add_port(server, "127.0.0.1:0")
            await server.start()
        try:
            await serve_parent(port, _cpu)
        finally:
            await server.stop(0)
            await asyncio.to_thread(spans.shutdown)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
