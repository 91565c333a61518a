"""A gRPC server that has every unary method: it answers with the request, and the method's name in field 15.

``python -m tests.edge.method_server`` prints its port and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys

import grpc

_FIELD = (15 << 3 | 2).to_bytes(1, "big")


class _Methods(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        name = handler_call_details.method.rpartition("/")[2].encode()

        async def answer(request: bytes, context: object) -> bytes:
            return request + _FIELD + len(name).to_bytes(1, "big") + name

        return grpc.unary_unary_rpc_method_handler(answer)


async def main() -> None:
    """Serves until standard input ends."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Methods(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
