"""Attacks by load reports: as somebody else, to fill memory, to falsify what operators see, to break things."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh.v1 import discovery_pb2, telemetry_pb2, telemetry_pb2_grpc, traffic_pb2, traffic_pb2_grpc

from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.subscription import ClientNode
from control_plane.telemetry.convert import report_from_proto
from control_plane.telemetry.recorder import Recorder
from control_plane.telemetry.window import Limits, Window
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.tally import BOUNDS
from tests.security.test_mesh_port import denied
from tests.security.world import TIMEOUT, Raw, World, refused, until

METHOD = "/shop.v1.OrderService/PlaceOrder"
Report = telemetry_pb2.ReportRequest


def hello(service: str, node_id: str = "evil", **fields: Any) -> Report:
    given = {"epoch": "e1", "uptime": Duration(seconds=1), "covers": Duration(seconds=1), **fields}
    return Report(node=discovery_pb2.Node(id=node_id, service=service), **given)


def totals(count: int, bucket: int = 3, code: int = 0) -> telemetry_pb2.Totals:
    return telemetry_pb2.Totals(codes={code: count}, buckets={bucket: count})


def calls(count: int, service: str = "payments", method: str = METHOD) -> telemetry_pb2.CalledService:
    return telemetry_pb2.CalledService(
        service=service,
        methods=[telemetry_pb2.MethodTotals(method=method, calls=totals(count), attempts=count)],
    )


async def end_of(stream: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ends that is read to its end."""

    async def read() -> None:
        while await stream.read() is not grpc.aio.EOF:
            pass

    error = await refused(read())
    return error.code(), error.details() or ""


def reporting(raw: Raw) -> Any:
    return telemetry_pb2_grpc.TelemetryServiceStub(raw.channel).Report(timeout=TIMEOUT)


def callers(world: World) -> set[str]:
    recorder = world.plane.telemetry.recorder
    return {reporter.service for reporter in recorder.reporters}


@asynccontextmanager
async def accepted(raw: Raw, service: str, **fields: Any) -> AsyncIterator[Any]:
    """A stream that the control plane takes reports on."""
    stream = reporting(raw)
    await stream.write(hello(service, **fields))
    assert isinstance(await stream.read(), telemetry_pb2.ReportResponse)
    try:
        yield stream
    finally:
        stream.cancel()


async def test_nobody_reports_as_another_service(world: World) -> None:
    operator, control_plane = world.mint.operator(), world.mint.service("control-plane")
    for who, service in ((await world.join("payments"), "orders"), (operator, "orders"), (control_plane, "orders")):
        async with world.mesh(who) as raw:
            stream = reporting(raw)
            await stream.write(hello(service, called=[calls(1000)]))
            await denied(world, stream.read(), f"may not report as {service}: only {service}'s own workloads may")
    async with world.mesh(await world.join("payments")) as raw:
        stream = reporting(raw)
        await stream.write(hello(""))
        await denied(world, stream.read(), "may not report as a process of no service")
    assert callers(world) == set()


async def test_a_stream_does_not_change_whose_it_is(world: World) -> None:
    async with world.mesh(await world.join("orders")) as raw, accepted(raw, "orders") as stream:
        await stream.write(hello("payments", called=[calls(3)]))
        traffic = world.plane.telemetry.traffic
        await until(lambda: traffic.edges(asyncio.get_running_loop().time()))
        assert [(edge.caller, edge.service) for edge in traffic.edges(asyncio.get_running_loop().time())] == [
            ("orders", "payments")
        ]


async def test_nobody_reports_what_another_service_received(world: World) -> None:
    served = telemetry_pb2.ServedInstance(service="payments", instance_id="p1", received=[])
    async with world.mesh(await world.join("orders")) as raw:
        stream = reporting(raw)
        await stream.write(hello("orders", served=[served]))
        code, words = await end_of(stream)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "served[0].service: 'payments' is not allowed" in words
    assert "load reports of evil (orders) end" in world.log.control_plane


async def test_a_workload_does_not_see_what_operators_see(world: World) -> None:
    async with world.mesh(await world.join("orders")) as raw:
        stub = traffic_pb2_grpc.TrafficServiceStub(raw.channel)
        for method in traffic_pb2.DESCRIPTOR.services_by_name["TrafficService"].methods:
            request = getattr(traffic_pb2, method.input_type.name)()
            made = getattr(stub, method.name)(request, timeout=TIMEOUT)
            attempt = made.read() if method.server_streaming else made
            await denied(world, attempt, f"may not call /mesh.v1.TrafficService/{method.name}", method.name)


async def test_an_operator_sees_it_and_an_end_is_put_to_what_they_tap(world: World) -> None:
    async with (
        world.mesh(world.mint.operator()) as operator,
        world.mesh(await world.join("orders")) as raw,
        accepted(raw, "orders", called=[calls(7)]) as stream,
    ):
        stub = traffic_pb2_grpc.TrafficServiceStub(operator.channel)
        answer = await stub.GetTraffic(traffic_pb2.GetTrafficRequest(), timeout=TIMEOUT)
        assert [(edge.caller, edge.total) for edge in answer.edges] == [("orders", 7)]
        tap = stub.Tap(traffic_pb2.TapRequest(service="payments"), timeout=TIMEOUT)
        assert isinstance(await tap.read(), traffic_pb2.TapResponse)
        asked = await stream.read()
        assert [(order.service, order.method) for order in asked.taps] == [("payments", "*")]
        tap.cancel()
        assert len((await stream.read()).taps) == 0
        await until(lambda: len(world.plane.telemetry.taps) == 0)
    assert "taps calls to payments" in world.log.control_plane


async def test_the_stream_of_a_revoked_workload_ends_and_what_it_said_counts_on(world: World) -> None:
    who = await world.join("orders")
    async with world.mesh(who) as raw, accepted(raw, "orders", called=[calls(7)]) as stream:
        await world.revoke(who.workload_id)
        assert await end_of(stream) == (grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
        again = reporting(raw)
        await again.write(hello("orders"))
        await denied(world, again.read(), "the workload has been revoked")


async def test_streams_of_one_workload_are_bounded_and_others_get_theirs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.plane.telemetry.reports._limits, "_most", 2)
    async with world.mesh(await world.join("orders")) as greedy, world.mesh(await world.join("payments")) as other:
        async with accepted(greedy, "orders", node_id="1"), accepted(greedy, "orders", node_id="2"):
            third = reporting(greedy)
            await third.write(hello("orders", node_id="3"))
            code, words = await end_of(third)
            assert (code, words) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the workload reports on 20 streams already")
            async with accepted(other, "payments"):
                assert world.plane.telemetry.recorder.connected == 3
        await until(lambda: world.plane.telemetry.recorder.connected == 0)
        async with accepted(greedy, "orders", node_id="3"):
            pass


async def test_one_that_says_nothing_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("control_plane.telemetry.reports.FIRST_REQUEST", 0.05)
    async with world.mesh(await world.join("orders")) as raw:
        stream = reporting(raw)
        code, words = await end_of(stream)
        assert (code, words) == (grpc.StatusCode.INVALID_ARGUMENT, "the first request must say who reports")


async def test_one_that_talks_too_much_is_heard_later_and_does_not_keep_others_waiting(world: World) -> None:
    began = time.monotonic()
    async with world.mesh(await world.join("orders")) as raw, world.mesh(await world.join("payments")) as other:
        async with accepted(raw, "orders") as stream:

            async def flood() -> None:
                for count in range(1, 2000):
                    await stream.write(Report(covers=Duration(seconds=1), called=[calls(count)]))

            flooding = asyncio.ensure_future(flood())
            async with accepted(other, "payments", called=[calls(1, "orders")]):
                recorder = world.plane.telemetry.recorder
                await until(lambda: recorder.taken > 50)
                await asyncio.sleep(0.3)
                assert recorder.taken < 60 + 10 * (time.monotonic() - began)  # 50 at once, and 10 a second
            flooding.cancel()
            await asyncio.gather(flooding, return_exceptions=True)


BAD: dict[str, Report] = {
    "node.id": hello("orders", node_id=""),
    "node.id too long": hello("orders", node_id="x" * 300),
    "locality": Report(
        # Protobuf takes a mapping for a message, which its stubs do not know.
        node=discovery_pb2.Node(id="evil", service="orders", locality={"zone": "\x1b[31m"}),  # type: ignore[arg-type]
        epoch="e",
    ),
    "epoch": hello("orders", epoch="../../etc"),
    "epoch empty": hello("orders", epoch=""),
    "service": hello("orders", called=[calls(1, "Not A Service")]),
    "method": hello("orders", called=[calls(1, method="\x1b[31m")]),
    "method too long": hello("orders", called=[calls(1, method="/" + "x" * 5000)]),
    "code": hello("orders", called=[telemetry_pb2.CalledService(service="payments", methods=[
        telemetry_pb2.MethodTotals(method=METHOD, calls=telemetry_pb2.Totals(codes={99: 1}, buckets={1: 1}))])]),
    "buckets": hello("orders", called=[telemetry_pb2.CalledService(service="payments", methods=[
        telemetry_pb2.MethodTotals(method=METHOD, calls=totals(1, bucket=len(BOUNDS) + 1))])]),
    "sums": hello("orders", called=[telemetry_pb2.CalledService(service="payments", methods=[
        telemetry_pb2.MethodTotals(method=METHOD, calls=telemetry_pb2.Totals(codes={0: 2}, buckets={1: 1}))])]),
    "huge": hello("orders", called=[calls(2**64 - 1)]),
    "twice": hello("orders", called=[calls(1), calls(2)]),
    "endpoint": hello("orders", called=[telemetry_pb2.CalledService(service="payments", endpoints=[
        telemetry_pb2.EndpointTotals(endpoint_id="a b", attempts=totals(1))])]),
    "caller": hello("orders", served=[telemetry_pb2.ServedInstance(service="orders", instance_id="o1", received=[
        telemetry_pb2.ReceivedTotals(caller="\x00", method=METHOD, calls=totals(1))])]),
    "tapped": hello("orders", tapped=[telemetry_pb2.TappedCall(method="x", service="payments")]),
    "tapped code": hello("orders", tapped=[telemetry_pb2.TappedCall(method=METHOD, service="payments", code=77)]),
}  # fmt: skip


async def test_what_is_malformed_is_refused_by_name_and_counts_for_nothing(world: World) -> None:
    async with world.mesh(await world.join("orders")) as raw:
        for name, request in BAD.items():
            stream = reporting(raw)
            await stream.write(request)
            code, words = await end_of(stream)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, name
            assert words, name
        now = asyncio.get_running_loop().time()
        assert world.plane.telemetry.traffic.edges(now) == []
        assert world.plane.telemetry.recorder.connected == 0
        assert world.plane.telemetry.reports.refused == len(BAD)
        async with accepted(raw, "orders", called=[calls(3)]):
            assert [edge.total for edge in world.plane.telemetry.traffic.edges(now + 1)] == [3]


async def test_texts_are_cut_and_times_are_kept_within_what_can_be(world: World) -> None:
    long = "\x1b]0;evil\x07" * 1000
    failed = telemetry_pb2.FailedCall(
        ago=Duration(seconds=-(10**9)),
        attempts=[
            telemetry_pb2.FailedAttempt(endpoint_id="a", target=long, code=14, details=long, elapsed=Duration(nanos=-5))
        ]
        * 50,
        endpoints_version=long,
        snapshot_age=Duration(seconds=10**11),
        control_plane=long,
        identity=long,
        hint=long,
        trace_id=long,
    )
    called = telemetry_pb2.CalledService(
        service="payments",
        state=telemetry_pb2.CalledServiceState(policy_version=long, endpoints_version=long, ejected=["a"] * 5000),
        failures=[telemetry_pb2.FailureTotals(method=METHOD, code=14, count=1, example=failed)],
        ejections=[telemetry_pb2.EjectionEvent(endpoint_id="a", ago=Duration(seconds=10**11))] * 500,
        transitions=[telemetry_pb2.BreakerTransition(new_state=telemetry_pb2.BREAKER_STATE_OPEN)] * 500,  # from nowhere
    )
    process = telemetry_pb2.ProcessState(
        control_plane=long, identity_warning=long, certificate_expires=Timestamp(seconds=2**62)
    )
    async with world.mesh(await world.join("orders")) as raw, accepted(raw, "orders", called=[called], process=process):
        (reporter,) = world.plane.telemetry.recorder.reporters
        (group,) = world.plane.telemetry.traffic.failures(asyncio.get_running_loop().time())
        assert group.example is not None
        detail = group.example.example.detail
        texts = [
            detail.control_plane,
            detail.identity,
            detail.hint,
            detail.attempts[0].details,
            detail.attempts[0].target,
        ]
        assert {len(text) for text in (*texts, reporter.process.control_plane)} == {300}
        assert (len(detail.attempts), detail.trace_id, len(detail.snapshot_version)) == (10, "", 64)
        state = reporter.called["payments"]
        assert (len(state.ejections), len(state.transitions)) == (20, 0)
        async with world.mesh(world.mint.operator()) as operator:
            stub = traffic_pb2_grpc.TrafficServiceStub(operator.channel)
            answer = await stub.ListFailures(traffic_pb2.ListFailuresRequest(), timeout=TIMEOUT)
            assert [each.count for each in answer.groups] == [1]
            explained = await stub.Explain(traffic_pb2.ExplainRequest(service="payments"), timeout=TIMEOUT)
            assert explained.findings


_NUMBERS = st.integers(0, 2**64 - 1)
_TEXT = st.text(max_size=20)
_SPANS = st.builds(Duration, seconds=st.integers(-(2**63), 2**63 - 1), nanos=st.integers(-(2**31), 2**31 - 1))
_TOTALS = st.builds(
    telemetry_pb2.Totals,
    codes=st.dictionaries(st.integers(0, 20), _NUMBERS, max_size=3),
    buckets=st.dictionaries(st.integers(0, 90), _NUMBERS, max_size=3),
) | st.builds(totals, st.integers(0, 50))
_METHODS = st.sampled_from([METHOD, "/s/M", ""]) | _TEXT
_CALLED = st.builds(
    telemetry_pb2.CalledService,
    service=st.sampled_from(["payments", "stock"]) | _TEXT,
    methods=st.lists(
        st.builds(telemetry_pb2.MethodTotals, method=_METHODS, calls=_TOTALS, attempts=_NUMBERS), max_size=3
    ),
    endpoints=st.lists(st.builds(telemetry_pb2.EndpointTotals, endpoint_id=_TEXT, attempts=_TOTALS), max_size=2),
    failures=st.lists(
        st.builds(
            telemetry_pb2.FailureTotals,
            method=_METHODS,
            code=st.integers(0, 2**32 - 1),
            count=_NUMBERS,
            example=st.builds(telemetry_pb2.FailedCall, ago=_SPANS, snapshot_age=_SPANS, hint=_TEXT),
        ),
        max_size=2,
    ),
    ejections=st.lists(
        st.builds(telemetry_pb2.EjectionEvent, endpoint_id=_TEXT, ago=_SPANS, duration=_SPANS), max_size=2
    ),
)
_SERVED = st.builds(
    telemetry_pb2.ServedInstance,
    service=st.sampled_from(["orders", "payments"]),
    instance_id=st.just("o1") | _TEXT,
    peak_in_flight=st.integers(0, 2**32 - 1),
    shed=_NUMBERS,
    received=st.lists(
        st.builds(telemetry_pb2.ReceivedTotals, caller=_TEXT, method=_METHODS, calls=_TOTALS), max_size=2
    ),
)
_CONSUMED = st.builds(
    telemetry_pb2.ConsumedGroup,
    group=st.sampled_from(["orders", "labels"]) | _TEXT,
    events=st.lists(
        st.builds(
            telemetry_pb2.EventTotals,
            publisher=st.sampled_from(["payments", "/other"]) | _TEXT,
            type=st.sampled_from(["shop.v1.OrderPlaced", "/other"]) | _TEXT,
            handled=_TOTALS,
        ),
        max_size=3,
    ),
)
_REPORTS = st.builds(
    Report,
    covers=_SPANS,
    called=st.lists(_CALLED, max_size=3),
    served=st.lists(_SERVED, max_size=2),
    consumed=st.lists(_CONSUMED, max_size=2),
    more=st.booleans(),
)


@settings(max_examples=150)
@given(st.lists(_REPORTS, max_size=6), st.floats(0.0, 1e9))
def test_whatever_comes_nothing_breaks_and_memory_stays_bounded(reports: list[Report], uptime: float) -> None:
    limits = Limits(keys=20, keys_of_one=8, series=20, series_of_one=15)
    window = Window(limits)
    recorder = Recorder(window, limits)
    session = recorder.open(ClientNode("evil", "orders"), "e", min(uptime, 1e8), "w", 1000.0)
    for number, request in enumerate(reports):
        now = 1000.0 + number
        with contextlib.suppress(InvalidValueError):
            report = report_from_proto(request, "orders", now)
            recorder.take(session, report, now, more=request.more)
    assert len(window) <= 8 + 5
    assert len(window.served) <= 8 + 1
    assert len(session.reporter.known) <= 15
    recorder.close(session, 2000.0)
    recorder.expire(5000.0)
    assert len(window) == len(window.served) == 0


async def test_a_newer_stream_of_a_process_ends_the_older_one(world: World) -> None:
    async with world.mesh(await world.join("orders")) as raw, accepted(raw, "orders") as old:
        async with accepted(raw, "orders"):
            await old.write(Report(covers=Duration(seconds=1), called=[calls(1)]))
            code, words = await end_of(old)
            assert code is grpc.StatusCode.ABORTED
            assert "another stream" in words
            assert world.plane.telemetry.recorder.connected == 1


async def test_no_more_processes_report_than_may(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.plane.telemetry.recorder, "_limits", Limits(reporters=1))
    async with world.mesh(await world.join("orders")) as raw, accepted(raw, "orders"):
        second = reporting(raw)
        await second.write(hello("orders", node_id="another"))
        code, words = await end_of(second)
        assert (code, words) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "1 processes report already, as many as may")


async def test_a_control_plane_that_stops_sends_its_reporters_elsewhere(tmp_path: Any) -> None:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, data_dir=tmp_path))
    await plane.start()
    try:
        async with grpc.aio.insecure_channel(plane.address) as channel:
            async with accepted(Raw(channel), "orders") as stream:
                stopping = asyncio.ensure_future(plane.stop(1.0))
                code, words = await end_of(stream)
                assert (code, words) == (
                    grpc.StatusCode.UNAVAILABLE,
                    "this control plane is stopping; use another",
                )
                await stopping
    finally:
        await plane.stop(0)
