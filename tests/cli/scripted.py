"""A real gRPC server whose services for operators answer what a test has put into it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from mesh.v1 import admin_pb2, authority_pb2, operations_pb2, trace_pb2, traffic_pb2

_SERVICES = (
    (admin_pb2, "AdminService"),
    (authority_pb2, "AuthorityService"),
    (trace_pb2, "TraceQueryService"),
    (traffic_pb2, "TrafficService"),
    (operations_pb2, "OperationsService"),
)


@dataclass(frozen=True)
class Refusal:
    """An answer that is an error."""

    code: grpc.StatusCode
    details: str


class ScriptedAdmin:
    """Answers each method with what is in ``answers`` under its name, or makes of the request, else with nothing.

    A method that streams answers with what is in ``streams``, and then as above if there is a refusal.
    """

    def __init__(self) -> None:
        self.address = ""
        self.answers: dict[str, Message | Refusal | Callable[[Message], Message | Refusal]] = {}
        self.streams: dict[str, list[Message]] = {}
        self.requests: list[Message] = []
        self.held = threading.Event()
        """Answers wait for it; set unless a test clears it."""
        self.held.set()

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        services = [file.DESCRIPTOR.services_by_name[name] for file, name in _SERVICES]
        return [
            grpc.method_handlers_generic_handler(
                service.full_name, {method.name: self._handler(method) for method in service.methods}
            )
            for service in services
        ]

    def _handler(self, method: MethodDescriptor) -> grpc.RpcMethodHandler[Message, Message]:
        response = GetMessageClass(method.output_type)

        def answer(request: Message, context: grpc.ServicerContext) -> Message:
            self.requests.append(request)
            assert self.held.wait(10)
            scripted = self.answers.get(method.name, response())
            if not isinstance(scripted, Message | Refusal):
                scripted = scripted(request)
            if isinstance(scripted, Refusal):
                context.abort(scripted.code, scripted.details)
            assert isinstance(scripted, response)
            return scripted

        def stream(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
            self.requests.append(request)
            yield from self.streams.get(method.name, [])
            if isinstance(scripted := self.answers.get(method.name), Refusal):
                context.abort(scripted.code, scripted.details)

        parse: Callable[[bytes], Message] = GetMessageClass(method.input_type).FromString
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, parse, response.SerializeToString)
        return grpc.unary_unary_rpc_method_handler(answer, parse, response.SerializeToString)


@contextmanager
def scripted_admin(address: str = "127.0.0.1:0") -> Iterator[ScriptedAdmin]:
    """Serves a `ScriptedAdmin` until the end of the block."""
    scripted = ScriptedAdmin()
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    server.add_generic_rpc_handlers(scripted.handlers())
    scripted.address = f"127.0.0.1:{server.add_insecure_port(address)}"
    server.start()
    try:
        yield scripted
    finally:
        scripted.held.set()
        server.stop(None).wait()
