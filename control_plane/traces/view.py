"""The trace view of one control plane: takes spans in, keeps the last traces, answers what operators ask."""

from __future__ import annotations

import logging

import grpc.aio
from google.protobuf.descriptor import FileDescriptor
from mesh.v1 import trace_pb2, trace_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from control_plane.access import Access
from control_plane.credentials import add_port
from control_plane.ports import otlp_server
from control_plane.traces.allowance import Reporters
from control_plane.traces.intake import Intake
from control_plane.traces.links import TraceLinks
from control_plane.traces.queries import Changes, TraceQueryServicer
from control_plane.traces.receiver import OtlpReceiver
from control_plane.traces.settings import TraceSettings
from control_plane.traces.store import TraceStore

_log = logging.getLogger(__name__)


class TraceView:
    """Everything of it, to be added to the servers of a control plane.

    Args:
        settings: what the operator chose.
        access: who may do what on the mesh port.

    Attributes:
        store: the traces; None when none are kept.
        intake: what fills it; likewise.
        links: to Jaeger.
        queries: TraceQueryService.
        port: of the plain port, once it is bound; 0 without one.
    """

    def __init__(self, settings: TraceSettings, access: Access) -> None:
        self._settings = settings
        self._access = access
        self._changes = Changes()
        self.links = TraceLinks(settings.jaeger_ui)
        self.store: TraceStore | None = None
        self.intake: Intake | None = None
        if settings.limits is not None:
            self.store = TraceStore(settings.limits)
            self.intake = Intake(self.store, Reporters(settings.report_limits), self._changes.notify)
        self.queries = TraceQueryServicer(self.store, self.intake, self.links, self._changes, access)
        self.port = 0

    def add_mesh_services(self, server: grpc.aio.Server) -> list[FileDescriptor]:
        """Adds what is on the mesh port to a server that is not started. Returns the files that describe it."""
        trace_pb2_grpc.add_TraceQueryServiceServicer_to_server(self.queries, server)
        if self.intake is None:
            return [trace_pb2.DESCRIPTOR]
        OtlpReceiver(self.intake, self._access).add_to(server)
        return [trace_pb2.DESCRIPTOR, trace_service_pb2.DESCRIPTOR]

    def plain_server(self) -> grpc.aio.Server | None:
        """A server on the plain port, not started; None if there is to be none.

        Raises:
            ConfigError: the address cannot be bound.
        """
        address = self._settings.otlp_address
        if address is None or self.intake is None:
            return None
        server = otlp_server()
        OtlpReceiver(self.intake, Access(None)).add_to(server)
        self.port = add_port(server, address)
        _log.warning(
            "OTLP in plaintext on %s:%d, as asked: every process of this host may send traces there, in the name of "
            "any service",
            address.rpartition(":")[0],
            self.port,
        )
        return server

    def close(self) -> None:
        """Ends the streams of those who follow."""
        self._changes.close()
