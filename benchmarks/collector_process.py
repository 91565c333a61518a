"""A child process: takes spans by OTLP and forgets them. Says its address."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.processes import serve_parent


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps nothing."""

    async def Export(self, request: Any, context: Any) -> Any:
        """Takes spans."""
        return trace_service_pb2.ExportTraceServiceResponse()


async def _main() -> None:
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        await serve_parent(f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_main())
