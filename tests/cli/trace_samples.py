"""Traces as a control plane answers them, from which golden files are made."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from mesh.v1 import trace_pb2 as pb

from control_plane.traces.convert import summary_to_proto, trace_to_proto
from control_plane.traces.links import TraceLinks
from control_plane.traces.span import Kind, Process, Span, SpanEvent, SpanLink, pack
from control_plane.traces.store import TraceStore
from tests.control_plane.spans import BEGINNING, MS, process, span

PLACE, RESERVE, CHARGE = (
    "shop.v1.OrderService/PlaceOrder",
    "shop.v1.InventoryService/Reserve",
    "shop.v1.PaymentService/Charge",
)
RETRIED, PLAIN, FRAGMENT = "4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c", "c0ffee" + "0" * 26

ENVOY = Process("envoy", instance="edge-1")
ORDERS = process("orders", "1d2f0a9b8c7e6f50", instance="orders-7f3a91", packed=pack([("host.name", "web-3")]))
INVENTORY = process("inventory", "6a37e8ea78e22dc3")
PAYMENTS = process("payments", "9b5d1c3e7a2f4860")


def event(at: float, name: str, **attributes: str) -> SpanEvent:
    return SpanEvent(BEGINNING + round(at * MS), name, pack(attributes.items()))


def retried() -> list[Span]:
    """An order through the edge, one attempt of which failed, and whose payment was made by a clock that is ahead."""
    client, server = Kind.CLIENT, Kind.SERVER
    return [
        span(1, service=ENVOY, start=0, took=231.4, name="POST /v1/orders", kind=server),
        span(2, 1, service=ORDERS, start=1.2, took=228.9, name=PLACE, kind=server),
        span(3, 2, service=ORDERS, start=2.1, took=50.3, name=RESERVE, kind=client),
        span(
            4,
            3,
            service=ORDERS,
            start=2.2,
            took=1.04,
            name=f"{RESERVE} attempt 1",
            kind=client,
            error="UNAVAILABLE: failed to connect to all addresses",
        ),
        span(
            5,
            3,
            service=ORDERS,
            start=30.5,
            took=21.7,
            name=f"{RESERVE} attempt 2",
            kind=client,
            events=(event(30.5, "retry", attempt="2", endpoint="inventory-2"),),
        ),
        span(6, 5, service=INVENTORY, start=31.0, took=20.1, name=RESERVE, kind=server),
        span(
            7,
            2,
            service=ORDERS,
            start=60,
            took=165,
            name=CHARGE,
            kind=client,
            attributes={"rpc.system": "grpc", "server.address": "10.0.1.4", "server.port": "50051"},
            links=(SpanLink(PLAIN, "00f067aa0ba902b7"),),
            dropped=2,
        ),
        span(8, 7, service=PAYMENTS, start=5_062, took=160, name=CHARGE, kind=server),
        span(9, 99, service=PAYMENTS, start=5_120, took=0.05, name="audit \x1b[31mlog"),
    ]


def store(*traces: tuple[str, list[Span]]) -> TraceStore:
    made = TraceStore()
    for trace_id, spans in traces:
        for each in spans:
            made.add(trace_id, each, 0.0)
    return made


def retried_trace(jaeger_ui: str = "") -> pb.GetTraceResponse:
    (trace,) = store((RETRIED, retried())).latest(1, 0.0)
    return trace_to_proto(trace, TraceLinks(jaeger_ui))


def fragment() -> pb.GetTraceResponse:
    """Its first span is missing, and more came than were kept."""
    (trace,) = store((FRAGMENT, [span(2, 1, service=INVENTORY, took=1_250, name=RESERVE, kind=Kind.SERVER)])).latest(
        1, 0.0
    )
    trace.refused = 1
    return trace_to_proto(trace, TraceLinks())


def listing(jaeger_ui: str = "") -> pb.ListTracesResponse:
    made = store(
        (FRAGMENT, [span(2, 1, service=INVENTORY, took=1_250, name=RESERVE, kind=Kind.SERVER)]),
        (PLAIN, [span(1, service=ORDERS, took=9.87, start=-2_500, name=PLACE, kind=Kind.SERVER)]),
        (RETRIED, retried()),
    )
    return pb.ListTracesResponse(
        traces=[summary_to_proto(trace, TraceLinks(jaeger_ui)) for trace in made.latest(9, 0.0)],
        store=pb.TraceStoreState(
            traces=len(made),
            spans=made.spans,
            bytes=12_345_678,
            max_bytes=64 * 1024 * 1024,
            max_age=Duration(seconds=3_600),
        ),
        jaeger_ui=jaeger_ui,
    )
