"""Everything of load reports, wired: what the control plane's server adds, and what its web page asks."""

from __future__ import annotations

import asyncio

import grpc.aio
from mesh.v1 import telemetry_pb2_grpc, traffic_pb2_grpc

from control_plane.access import Access
from control_plane.catalog import Catalog
from control_plane.discovery import StreamHub
from control_plane.policies import PolicyBook
from control_plane.publisher import Publisher
from control_plane.telemetry.operators import TrafficServicer
from control_plane.telemetry.recorder import Recorder
from control_plane.telemetry.reports import TelemetryServicer
from control_plane.telemetry.taps import Taps
from control_plane.telemetry.traffic import Traffic
from control_plane.telemetry.window import Window
from mesh_client.core.policy import ServicePolicy


class Telemetry:
    """Load reports of one control plane. To be made inside the event loop.

    Args:
        catalog: services and endpoints.
        book: which policies hold.
        publisher: what is published.
        hub: what clients hold of it.
        access: who may report as which service.

    Attributes:
        window: what happened in the last minutes.
        recorder: who reports.
        traffic: answers questions about both; times are those of the event loop.
        taps: what somebody looks at.
        reports: TelemetryService.
        operators: TrafficService.
    """

    def __init__(
        self, catalog: Catalog, book: PolicyBook[ServicePolicy], publisher: Publisher, hub: StreamHub, access: Access
    ) -> None:
        self.window = Window()
        self.recorder = Recorder(self.window)
        self.traffic = Traffic(self.recorder, self.window, asyncio.get_running_loop().time())
        self.taps = Taps()
        self.reports = TelemetryServicer(self.recorder, self.taps, access)
        self.operators = TrafficServicer(
            self.traffic,
            self.recorder,
            self.taps,
            self.reports,
            catalog=catalog,
            book=book,
            publisher=publisher,
            hub=hub,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serves both on a server that has not started."""
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(self.reports, server)
        traffic_pb2_grpc.add_TrafficServiceServicer_to_server(self.operators, server)

    def close(self) -> None:
        """Ends every stream, so that processes go to another control plane at once."""
        self.reports.close()
