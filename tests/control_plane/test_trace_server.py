"""Traces through a whole control plane: who may send what, what becomes of it, and what operators get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import trace_pb2 as pb
from mesh.v1 import trace_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.traces import following, queries, receiver
from control_plane.traces.allowance import Rate, ReportLimits
from control_plane.traces.settings import TraceSettings
from control_plane.traces.store import TraceLimits
from mesh_client.core.errors import ConfigError
from tests.control_plane.otlp import EXPORT, attributes, export, otlp_request, otlp_span
from tests.control_plane.spans import trace_id
from tests.control_plane.test_secure_server import DENIED, TIMEOUT, World, refusal, running

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
SMALL = ReportLimits(requests=Rate(0.1, 10), spans=Rate(0.1, 40), size=Rate(1e6, 4_000_000))
"""They fill so slowly that nothing is allowed anew while a test lasts."""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


def asking(channel: grpc.aio.Channel) -> trace_pb2_grpc.TraceQueryServiceAsyncStub:
    return trace_pb2_grpc.TraceQueryServiceStub(channel)


async def listed(channel: grpc.aio.Channel, **wanted: Any) -> list[int]:
    request = pb.ListTracesRequest(filter=pb.TraceFilter(**wanted))
    answer = await asking(channel).ListTraces(request, timeout=TIMEOUT)
    return [int(trace.trace_id, 16) for trace in answer.traces]


# -- who may send what


async def test_spans_of_several_workloads_are_one_trace_under_their_identities(world: World) -> None:
    orders, orders_id = await world.workload("orders")
    payments, payments_id = await world.workload("payments")
    operator = await world.operator()
    client = otlp_span(1, 2, 1, kind=Span.SPAN_KIND_CLIENT, name="shop.v1.PaymentService/Charge", took=8)
    served = otlp_span(1, 3, 2, kind=Span.SPAN_KIND_SERVER, name="shop.v1.PaymentService/Charge", took=7, error="oh")
    assert not (await export(payments, otlp_request(served, service_name="payments"))).HasField("partial_success")
    await export(orders, otlp_request(otlp_span(1, 1), client, service_name="orders", service_instance_id="o-1"))

    answer = await asking(operator).ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT)
    (summary,) = answer.traces
    assert (summary.trace_id, summary.service, summary.name, summary.complete) == (
        *(trace_id(1), "orders", "span 1", True),
    )
    assert (summary.spans, summary.errors, list(summary.services)) == (3, 1, ["orders", "payments"])
    assert summary.reason == pb.TRACE_REASON_ERROR
    assert (answer.store.traces, answer.store.spans, answer.store.max_bytes) == (1, 3, 64 * 1024 * 1024)
    assert 0 < answer.store.bytes < 10_000

    trace = await asking(operator).GetTrace(pb.GetTraceRequest(trace_id=trace_id(1).upper()), timeout=TIMEOUT)
    assert trace.summary == summary
    assert [(row.depth, row.service, row.workload_id, row.instance) for row in trace.spans] == [
        *((0, "orders", orders_id, "o-1"), (1, "orders", orders_id, "o-1"), (2, "payments", payments_id, "")),
    ]
    assert [row.status for row in trace.spans][2] == pb.SPAN_STATUS_ERROR
    assert trace.spans[2].status_message == "oh"


async def test_a_workload_sends_in_no_other_s_name(world: World, caplog: pytest.LogCaptureFixture) -> None:
    orders, workload_id = await world.workload("orders")
    operator = await world.operator()
    answer = await export(orders, otlp_request(otlp_span(1, 1), service_name="payments"))
    # Nothing is lost for it, and whoever runs it is told.
    assert answer.partial_success.rejected_spans == 0
    assert answer.partial_success.error_message == (
        "service.name is 'payments', which is not the identity's: spans are kept under the latter"
    )
    assert f"traces of orders (workload {workload_id}): service.name is 'payments'" in caplog.text
    assert await listed(operator, service="payments") == []
    assert await listed(operator, service="orders") == [1]
    trace = await asking(operator).GetTrace(pb.GetTraceRequest(trace_id=trace_id(1)), timeout=TIMEOUT)
    assert dict(trace.spans[0].resource) == {"service.name": "payments"}


async def test_operators_send_nothing_and_workloads_see_nothing(world: World) -> None:
    orders, _ = await world.workload("orders")
    operator = await world.operator()
    code, said = await refusal(export(operator, otlp_request(otlp_span(1, 1))))
    assert (code, said) == (
        DENIED,
        "spiffe://mesh.internal/operator/alice may not send traces: that takes the identity of a service",
    )
    for call in (
        asking(orders).ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT),
        asking(orders).GetTrace(pb.GetTraceRequest(trace_id="1"), timeout=TIMEOUT),
        asking(orders).WatchTraces(pb.WatchTracesRequest(), timeout=TIMEOUT).read(),
    ):
        assert (await refusal(call))[0] is DENIED


async def test_a_revoked_workload_sends_nothing_more(world: World) -> None:
    orders, workload_id = await world.workload("orders")
    other, _ = await world.workload("orders")
    await export(orders, otlp_request(otlp_span(1, 1)))
    assert world.plane.authority is not None
    await world.plane.authority.revoke(workload_id=workload_id)
    code, said = await refusal(export(orders, otlp_request(otlp_span(2, 1))))
    assert (code, "the workload has been revoked" in said) == (DENIED, True)
    await export(other, otlp_request(otlp_span(3, 1)))
    assert await listed(await world.operator()) == [3, 1]


# -- how much


async def test_requests_that_are_too_large_are_refused_whole_and_spans_one_by_one(world: World) -> None:
    orders, _ = await world.workload("orders")
    whole = otlp_request(otlp_span(1, 1, attributes=attributes(key="x" * 5_000_000)))
    assert (await refusal(export(orders, whole)))[0] is EXHAUSTED
    assert (await refusal(export(orders, whole, compression=grpc.Compression.Gzip)))[0] is EXHAUSTED
    one = otlp_span(1, 1, attributes=attributes(key="x" * 100_000))
    answer = await export(orders, otlp_request(one, otlp_span(1, 2), Span(), otlp_span(1, 3)))
    assert answer.partial_success.rejected_spans == 2
    assert answer.partial_success.error_message == (
        "2 of 4 spans were not kept: 1 larger than 64 KiB, 1 without a valid trace id and span id"
    )
    operator = await world.operator()
    answered = await asking(operator).ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT)
    assert (answered.store.spans, answered.store.refused) == (2, 2)


async def test_what_is_no_request_is_refused(world: World, caplog: pytest.LogCaptureFixture) -> None:
    orders, workload_id = await world.workload("orders")
    # As small as it is, protobuf would make 300 MiB of the last one.
    bomb = b"\x0a\x8a\xa4\xe8\x03" + b"\x12\x85\xa4\xe8\x03" + b"\x12\x00" * 4_000_000
    for junk in (b"\xff", b"\x0a\x7f", bomb[: 4 * 1024 * 1024 - 100]):
        code, said = await refusal(export(orders, junk))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said == "the request is no ExportTraceServiceRequest"
    half = b"\x12\x00" * 1_000_000
    whole = b"\x12" + _varint(len(half)) + half
    code, said = await refusal(export(orders, b"\x0a" + _varint(len(whole)) + whole))
    assert (code, "more than 10000 parts" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert not (await export(orders, b"")).HasField("partial_success")
    # However often it happens, the log says so once a minute.
    assert caplog.text.count(f"traces of orders (workload {workload_id})") == 1


def _varint(number: int) -> bytes:
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*coded, number])


async def test_a_flood_is_refused_and_harms_nobody_else(tmp_path: Path) -> None:
    settings = TraceSettings(limits=TraceLimits(max_traces=30), report_limits=SMALL)
    async with running(tmp_path, traces=settings) as world:
        orders, _ = await world.workload("orders")
        payments, _ = await world.workload("payments")
        await export(payments, otlp_request(otlp_span(1_000, 1)))
        spans = [otlp_span(number, 1, error="made up") for number in range(1, 101)]
        answer = await export(orders, otlp_request(*spans))
        assert answer.partial_success.rejected_spans == 60
        assert "60 beyond what may be sent a second: sample" in answer.partial_success.error_message
        sent = await asyncio.gather(*(refusal_or_none(export(orders, otlp_request(*spans))) for _ in range(20)))
        assert {code for code in sent if code} == {EXHAUSTED}
        assert sum(code is EXHAUSTED for code in sent) >= 15
        code, said = await refusal(export(orders, otlp_request(*spans)))
        assert (code, said.startswith("more than")) == (EXHAUSTED, True)
        assert not (await export(payments, otlp_request(otlp_span(1_001, 1)))).HasField("partial_success")
        found = await listed(await world.operator(), service="payments")
        assert found == [1_001, 1_000]
        assert world.plane.traces.store is not None
        assert len(world.plane.traces.store) == 30
        answered = await asking(await world.operator("bob")).ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT)
        assert answered.store.refused >= 60
        assert answered.store.refused_requests >= 15


async def refusal_or_none(call: Any) -> grpc.StatusCode | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


async def test_whoever_begins_requests_and_does_not_send_them_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, _ = await world.workload("orders")
    begun: list[Any] = []
    for _ in range(receiver.MAX_OF_ONE):
        call: grpc.aio.StreamUnaryCall[bytes, bytes] = orders.stream_unary(EXPORT)(timeout=TIMEOUT)
        await call.wait_for_connection()
        begun.append(call)
    await until_refused(orders)
    payments, _ = await world.workload("payments")
    await export(payments, otlp_request(otlp_span(2, 1)))
    for call in begun:
        call.cancel()
    while await refusal_or_none(export(orders, otlp_request(otlp_span(3, 1)))) is EXHAUSTED:
        await asyncio.sleep(0.01)
    monkeypatch.setattr(receiver, "SEND_TIMEOUT", 0.05)
    late: grpc.aio.StreamUnaryCall[bytes, bytes] = orders.stream_unary(EXPORT)(timeout=TIMEOUT)
    code, said = await refusal(late)
    assert (code, said) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not come within 0.05 s")


async def until_refused(channel: grpc.aio.Channel) -> None:
    """Those that were begun are being read when one more is refused."""
    async with asyncio.timeout(TIMEOUT):
        while await refusal_or_none(export(channel, otlp_request(otlp_span(1, 1)))) is not EXHAUSTED:
            pass


async def test_a_trace_takes_so_many_spans_and_no_more(tmp_path: Path) -> None:
    async with running(tmp_path, traces=TraceSettings(limits=TraceLimits(max_spans=3))) as world:
        orders, _ = await world.workload("orders")
        answer = await export(orders, otlp_request(*(otlp_span(1, number) for number in range(1, 6))))
        assert answer.partial_success.error_message == (
            "2 of 5 spans were not kept: 2 too many or too large for their trace"
        )
        # Those that are there already are no failure: exporters send again what they did not hear of.
        again = await export(orders, otlp_request(otlp_span(1, 1), otlp_span(1, 2)))
        assert not again.HasField("partial_success")
        (summary,) = (await asking(await world.operator()).ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT)).traces
        assert (summary.spans, summary.refused) == (3, 2)


async def test_much_is_taken_in_with_others_having_their_turn(world: World) -> None:
    orders, _ = await world.workload("orders")
    many = [otlp_span(number, 1) for number in range(1, 2_001)]
    answer = await export(orders, otlp_request(*many, service_name="orders"))
    assert not answer.HasField("partial_success")
    operator = await world.operator()
    request = pb.ListTracesRequest(filter=pb.TraceFilter(method="span 1", min_duration=Duration(nanos=1)), limit=1_000)
    assert len((await asking(operator).ListTraces(request, timeout=TIMEOUT)).traces) == 1_000
    assert await listed(operator, errors=True) == []


async def test_processes_with_a_resource_of_their_own_are_told_apart(world: World) -> None:
    orders, _ = await world.workload("orders")
    request = otlp_request(otlp_span(1, 1), host_name="a")
    request.MergeFrom(otlp_request(otlp_span(1, 2, 1), host_name="x" * 5_000))
    request.MergeFrom(otlp_request(otlp_span(1, 3), host_name="x" * 20_000))
    request.MergeFrom(otlp_request())
    answer = await export(orders, request)
    assert answer.partial_success.error_message == ("1 of 3 spans were not kept: 1 its resource has more than 16 KiB")
    operator = await world.operator()
    trace = await asking(operator).GetTrace(pb.GetTraceRequest(trace_id=trace_id(1)), timeout=TIMEOUT)
    assert [len(row.resource["host.name"]) for row in trace.spans] == [1, 4_096]


async def test_a_bounded_number_of_resources_is_remembered(world: World) -> None:
    orders, _ = await world.workload("orders")
    request = otlp_request()
    for number in range(600):
        request.MergeFrom(otlp_request(otlp_span(1, number + 1), host_name=str(number)))
    await export(orders, request)
    assert world.plane.traces.intake is not None
    assert len(world.plane.traces.intake._processes) == 500


# -- what operators get


async def test_a_trace_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    async with running(tmp_path, traces=TraceSettings(jaeger_ui="http://jaeger:16686/")) as world:
        orders, _ = await world.workload("orders")
        operator = await world.operator()
        first = 0xAB << 120
        for number in range(7):
            await export(orders, otlp_request(otlp_span(first + number, 1), otlp_span(0xAC << 120, number + 1)))
        stub = asking(operator)
        trace = await stub.GetTrace(pb.GetTraceRequest(trace_id="ac"), timeout=TIMEOUT)
        assert trace.summary.link == f"http://jaeger:16686/trace/ac{'0' * 30}"
        code, said = await refusal(stub.GetTrace(pb.GetTraceRequest(trace_id="ab"), timeout=TIMEOUT))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said.startswith(f"trace_id: 7 traces begin with ab: ab{'0' * 29}6, ab")
        assert said.endswith(", ...")
        code, said = await refusal(stub.GetTrace(pb.GetTraceRequest(trace_id="f"), timeout=TIMEOUT))
        assert (code, said) == (
            grpc.StatusCode.NOT_FOUND,
            (
                "no trace that begins with f is kept: it was not sampled, not sent here, or has made room for others; "
                "see http://jaeger:16686"
            ),
        )
        _, said = await refusal(stub.GetTrace(pb.GetTraceRequest(trace_id="f" * 32), timeout=TIMEOUT))
        assert said.endswith(f"; see http://jaeger:16686/trace/{'f' * 32}")
        assert (await stub.ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT)).jaeger_ui == "http://jaeger:16686"


async def test_what_cannot_be_asked_is_refused(world: World) -> None:
    stub = asking(await world.operator())
    bad = pb.TraceFilter(min_duration=Duration(seconds=-1))
    for call in (
        stub.ListTraces(pb.ListTracesRequest(limit=1_001), timeout=TIMEOUT),
        stub.ListTraces(pb.ListTracesRequest(filter=bad), timeout=TIMEOUT),
        stub.ListTraces(
            pb.ListTracesRequest(filter=pb.TraceFilter(min_duration=Duration(seconds=86_401))), timeout=TIMEOUT
        ),
        stub.GetTrace(pb.GetTraceRequest(trace_id="not hex"), timeout=TIMEOUT),
        stub.WatchTraces(pb.WatchTracesRequest(filter=bad), timeout=TIMEOUT).read(),
    ):
        code, said = await refusal(call)
        assert (code, "expected" in said) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    code, said = await refusal(stub.GetTrace(pb.GetTraceRequest(trace_id="1" * 32), timeout=TIMEOUT))
    assert said.endswith("has made room for others")


Watch = grpc.aio.UnaryStreamCall[pb.WatchTracesRequest, pb.WatchTracesResponse]


async def watching(channel: grpc.aio.Channel, **wanted: Any) -> Watch:
    call = asking(channel).WatchTraces(pb.WatchTracesRequest(filter=pb.TraceFilter(**wanted)), timeout=6 * TIMEOUT)
    await call.initial_metadata()
    return call


async def following_on(call: Watch) -> int:
    answer = await asyncio.wait_for(call.read(), TIMEOUT)
    assert isinstance(answer, pb.WatchTracesResponse)
    return int(answer.trace.trace_id, 16)


async def test_whoever_follows_is_told_of_new_traces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "QUIET", 0.05)
    monkeypatch.setattr(queries, "LOOK_INTERVAL", 0.01)
    orders, _ = await world.workload("orders")
    operator = await world.operator()
    await export(orders, otlp_request(otlp_span(1, 1)))
    everything, errors = await watching(operator), await watching(operator, errors=True)
    await export(orders, otlp_request(otlp_span(2, 1)))
    assert await following_on(everything) == 2
    await export(orders, otlp_request(otlp_span(3, 1, error="INTERNAL")))
    assert await following_on(everything) == 3
    assert await following_on(errors) == 3
    everything.cancel()
    errors.cancel()


async def test_following_ends_with_the_operator_and_with_the_control_plane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "MAX_FOLLOWERS", 2)
    async with running(tmp_path) as world:
        alice, bob = await world.operator("alice"), await world.operator("bob")
        one, two = await watching(alice), await watching(bob)
        code, said = await refusal(asking(alice).WatchTraces(pb.WatchTracesRequest(), timeout=TIMEOUT).read())
        assert (code, said) == (EXHAUSTED, "2 follow the traces already; ask for lists")
        authority = world.plane.authority
        assert authority is not None
        (workload_id,) = [each.id for each in (await authority.status()).workloads if each.spiffe_id.endswith("bob")]
        await authority.revoke(workload_id=workload_id)
        code, said = await refusal(asyncio.wait_for(two.read(), TIMEOUT))
        assert (code, said) == (DENIED, "the operator has been revoked")
        reading = asyncio.ensure_future(refusal(asyncio.wait_for(one.read(), TIMEOUT)))
        await world.plane.stop(1.0)
        code, said = await reading
        assert (code, said) == (grpc.StatusCode.UNAVAILABLE, "the control plane is stopping")


# -- options


async def test_a_control_plane_that_keeps_no_traces_takes_none_and_says_where_they_are(tmp_path: Path) -> None:
    async with running(tmp_path, traces=TraceSettings(limits=None, jaeger_ui="http://jaeger:16686")) as world:
        orders, _ = await world.workload("orders")
        assert (await refusal(export(orders, otlp_request(otlp_span(1, 1)))))[0] is grpc.StatusCode.UNIMPLEMENTED
        code, said = await refusal(asking(await world.operator()).ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT))
        assert (code, said) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "this control plane was started to keep no traces; Jaeger is at http://jaeger:16686",
        )


async def test_the_plain_port_takes_traces_in_any_name_and_never_in_the_mesh_s(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, traces=TraceSettings(otlp_address="127.0.0.1:0")) as world:
        assert "OTLP in plaintext on 127.0.0.1:" in caplog.text
        orders, _ = await world.workload("orders")
        await export(orders, otlp_request(otlp_span(1, 1), service_name="orders"))
        plain = grpc.aio.insecure_channel(f"127.0.0.1:{world.plane.traces.port}")
        async with plain:
            answer = await export(plain, otlp_request(otlp_span(1, 1), otlp_span(1, 2), service_name="orders"))
            assert not answer.HasField("partial_success")
            assert (await refusal(asking(plain).ListTraces(pb.ListTracesRequest(), timeout=TIMEOUT)))[0] is (
                grpc.StatusCode.UNIMPLEMENTED
            )
        operator = await world.operator()
        trace = await asking(operator).GetTrace(pb.GetTraceRequest(trace_id=trace_id(1)), timeout=TIMEOUT)
        assert sorted((row.service, bool(row.workload_id)) for row in trace.spans) == [
            *(("orders", False), ("orders", False), ("orders", True)),
        ]


async def test_without_identities_everybody_is_whom_they_say() -> None:
    plane = ControlPlane(ControlPlaneOptions(insecure=True))
    await plane.start()
    try:
        async with grpc.aio.insecure_channel(plane.address) as channel:
            await export(channel, otlp_request(otlp_span(1, 1), service_name="orders"))
            await export(channel, otlp_request(otlp_span(1, 2, 1), service_name="payments"))
            trace = await asking(channel).GetTrace(pb.GetTraceRequest(trace_id=trace_id(1)), timeout=TIMEOUT)
            assert [(row.service, row.workload_id) for row in trace.spans] == [("orders", ""), ("payments", "")]
            call = await watching(channel)
            call.cancel()
    finally:
        await plane.stop(0.0)


@pytest.mark.parametrize("address", ["0.0.0.0:4317", "10.0.0.1:4317", "example.com:4317", "[::]:4317", "4317"])
def test_the_plain_port_is_on_the_loopback_interface_alone(address: str) -> None:
    with pytest.raises(ConfigError, match="otlp_address"):
        ControlPlaneOptions(traces=TraceSettings(otlp_address=address))


@pytest.mark.parametrize("address", ["127.0.0.1:4317", "localhost:0", "[::1]:4317", "127.8.9.1:1"])
def test_addresses_of_the_loopback_interface_are_fine(address: str) -> None:
    assert ControlPlaneOptions(traces=TraceSettings(otlp_address=address)).traces.otlp_address == address


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="no traces are kept"):
        TraceSettings(limits=None, otlp_address="127.0.0.1:4317")
    with pytest.raises(ConfigError, match="jaeger_ui"):
        TraceSettings(jaeger_ui="jaeger")
    with pytest.raises(ConfigError, match="otlp_address"):
        ControlPlaneOptions(traces=replace(TraceSettings(), otlp_address="127.0.0.1:99999"))


async def test_a_plain_port_that_is_taken_is_an_error_that_says_so(tmp_path: Path) -> None:
    async with running(tmp_path, traces=TraceSettings(otlp_address="127.0.0.1:0")) as world:
        taken = f"127.0.0.1:{world.plane.traces.port}"
        second = ControlPlane(ControlPlaneOptions(insecure=True, traces=TraceSettings(otlp_address=taken)))
        with pytest.raises(ConfigError, match="cannot listen on"):
            await second.start()
