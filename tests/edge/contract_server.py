"""The services of tests/edge/protos on a real gRPC server: ``python -m tests.edge.contract_server`` prints its port.

In a process of its own, which ends with its standard input. Its argument is JSON: the host to listen on, and for mTLS
the paths of PEM files.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_tools import protoc

from mesh_client.transport import SERVER_OPTIONS
from tests.gateway.compiling import WELL_KNOWN

PROTOS = Path(__file__).parent / "protos"
FILE = "contract/v1/contract.proto"
ECHOED = "x-echo-"
"""Begins the names of metadata that is sent back."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}


@functools.cache
def stubs() -> tuple[ModuleType, ModuleType]:
    """Message and service modules, as protoc generates them for everybody."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [f"--proto_path={path}" for path in (PROTOS, *WELL_KNOWN)]
        out = [f"--python_out={directory}", f"--grpc_python_out={directory}"]
        if protoc.main(["protoc", *paths, *out, FILE]) != 0:
            raise RuntimeError("protoc failed; its messages are on standard error")
        sys.path.insert(0, directory)
        try:
            return (
                importlib.import_module("contract.v1.contract_pb2"),
                importlib.import_module("contract.v1.contract_pb2_grpc"),
            )
        finally:
            sys.path.remove(directory)


class Contract:
    """Both services."""

    async def Echo(self, request: Any, context: Any) -> Any:
        return stubs()[0].EchoResponse(request=request)

    async def Latest(self, request: Any, context: Any) -> Any:
        return stubs()[0].LatestResponse(latest=True)

    async def Remove(self, request: Any, context: Any) -> Any:
        return stubs()[0].RemoveResponse()

    async def Fail(self, request: Any, context: Any) -> Any:
        if request.details:
            status = status_pb2.Status(code=request.code, message=request.message)
            status.details.add().Pack(error_details_pb2.DebugInfo(detail="for colleagues alone"))
            status.details.add(type_url="type.googleapis.com/nobody.Knows")
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        await context.abort(_CODES[request.code], request.message)

    async def Count(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for number in range(1, request.to + 1):
            yield stubs()[0].CountResponse(number=number)
            await asyncio.sleep(request.milliseconds / 1_000)
        if request.code:
            await context.abort(_CODES[request.code], "counted")

    async def Sleep(self, request: Any, context: Any) -> Any:
        left = context.time_remaining()
        await asyncio.sleep(request.milliseconds / 1_000)
        return stubs()[0].SleepResponse(left=0 if left is None else round(left * 1_000))

    async def Metadata(self, request: Any, context: Any) -> Any:
        sent = context.invocation_metadata()
        received = {key: value for key, value in sent if isinstance(value, str)}
        echoed = tuple((key, value) for key, value in sent if key.startswith(ECHOED))
        await context.send_initial_metadata(echoed)
        return stubs()[0].MetadataResponse(metadata=received)

    WithToken = WithKey = WithBoth = LimitedByConsumer = LimitedByAddress = Metadata

    async def Nested(self, request: Any, context: Any) -> Any:
        return stubs()[0].EchoResponse(request=request)

    async def Sum(self, requests: AsyncIterator[Any], context: Any) -> Any:
        return stubs()[0].CountResponse(number=sum([request.to async for request in requests]))


async def main() -> None:
    """Serves until standard input ends."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    contract = Contract()
    stubs()[1].add_ContractServiceServicer_to_server(contract, server)
    stubs()[1].add_ExtraServiceServicer_to_server(contract, server)
    options = json.loads(sys.argv[1])
    address = f"{options['host']}:0"
    if "key" in options:
        key, chain, roots = (Path(options[name]).read_bytes() for name in ("key", "certificate", "roots"))
        port = server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)], roots, True))
    else:
        port = server.add_insecure_port(address)
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main())
