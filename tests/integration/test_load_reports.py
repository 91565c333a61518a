"""Load reports from real calls to a real control plane: what arrives equals what was called, whatever restarts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import telemetry_pb2, traffic_pb2, traffic_pb2_grpc
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.core.errors import ConfigError
from mesh_client.mesh import Mesh
from mesh_client.telemetry import INTERVAL, report_interval
from mesh_client.transport import open_channel
from tests.integration.echo_service import EchoService
from tests.integration.mesh_rig import PATIENCE, Rig, open_rig, until
from tests.integration.system import ORDER, System, follows
from tests.ports import held_address

ECHO = "/test.Echo/UnaryUnary"
FAST = 0.1


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def eventually(condition: Callable[[], bool | Awaitable[bool]], what: Callable[[], object] = str) -> None:
    """Returns once it is so. What another side does cannot set an event here."""
    deadline = time.monotonic() + PATIENCE
    while True:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < deadline, what()
        await asyncio.sleep(0.02)


async def call(channel: grpc.aio.Channel, request: bytes = b"hello", method: str = ECHO, **options: Any) -> bytes:
    multicallable: Any = channel.unary_unary(method)
    answer: bytes = await multicallable(request, timeout=5.0, **options)
    return answer


def totals(plane: ControlPlane) -> dict[str, int]:
    """Calls to echo by the service that made them, since their processes began to count."""
    found: dict[str, int] = {}
    for reporter in plane.telemetry.recorder.reporters:
        found[reporter.service] = found.get(reporter.service, 0) + reporter.calls.get("echo", 0)
    return {service: count for service, count in found.items() if count}


def windowed(plane: ControlPlane) -> int:
    now = asyncio.get_running_loop().time()
    return plane.telemetry.traffic.calls_to("echo", now, 600.0).count


async def test_what_arrives_is_what_was_called(rig: Rig) -> None:
    await rig.serve("echo", "e1", EchoService().add_to)
    mesh = await rig.mesh(service="web", load_reports=FAST)
    channel = await rig.channel(mesh, "echo", {"e1"})
    for _ in range(20):
        await call(channel)
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await call(channel, b"fail")
    await eventually(lambda: totals(rig.plane) == {"web": 23}, lambda: totals(rig.plane))
    now = asyncio.get_running_loop().time()
    traffic = rig.plane.telemetry.traffic
    (edge,) = traffic.edges(now)
    assert (edge.caller, edge.service, edge.calls.count, edge.processes) == ("web", "echo", 23, 1)
    assert edge.calls.codes == {"OK": 20, "NOT_FOUND": 3}
    assert edge.calls.success_rate == 1.0
    assert edge.calls.p99 is not None
    assert 0 < edge.calls.p99 < 5
    assert [(each.method, each.calls.count) for each in traffic.methods("echo", now)] == [(ECHO, 23)]
    assert [(each.endpoint_id, each.attempts.count) for each in traffic.endpoints("echo", now)] == [("e1", 23)]
    (failures,) = traffic.failures(now)
    assert (failures.code, failures.count, failures.example) == ("NOT_FOUND", 3, None)


async def test_a_process_that_ends_sends_what_it_has_not_reported_yet(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_client.telemetry.LAST_WORDS", PATIENCE)
    await rig.serve("echo", "e1", EchoService().add_to)
    async with mesh_client.connect(rig.plane.address, service="job", cache_dir="", load_reports=60.0) as mesh:
        channel = await rig.channel(mesh, "echo", {"e1"})
        await eventually(lambda: rig.plane.telemetry.recorder.connected == 1)
        for _ in range(5):
            await call(channel)
        assert totals(rig.plane) == {}
    assert totals(rig.plane) == {"job": 5}
    assert windowed(rig.plane) == 5
    await eventually(lambda: rig.plane.telemetry.recorder.connected == 0)


async def test_totals_stay_right_through_restarts_of_control_plane_and_clients(tmp_path: Path) -> None:
    with held_address() as address:
        options = ControlPlaneOptions(
            insecure=True, address=address, data_dir=tmp_path, debounce_quiet=0.002, debounce_maximum=0.02
        )
        plane = ControlPlane(options)
        await plane.start()
        made = 0

        async def whole() -> None:
            await eventually(lambda: totals(plane) == {"web": made}, lambda: (made, totals(plane)))

        async with contextlib.AsyncExitStack() as stack:
            control = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            rig = Rig(plane, stack, control)
            await rig.serve("echo", "e1", EchoService().add_to)
            mesh = await rig.mesh(service="web", node_id="web-1", load_reports=FAST)
            channel = await rig.channel(mesh, "echo", {"e1"})
            for round_number in range(3):
                for _ in range(10):
                    await call(channel)
                made += 10
                if round_number:  # else the control plane stops before it has heard of them
                    await whole()
                await plane.stop(0.0)
                for _ in range(7):
                    await call(channel)
                made += 7
                plane = ControlPlane(options)
                await plane.start()
                await whole()
                assert windowed(plane) <= made
        await plane.stop(0.0)


async def test_totals_are_right_after_the_control_plane_was_killed_under_load(tmp_path: Path) -> None:
    async with System(tmp_path) as system:
        process = await system.start_control_plane()
        await system.start_orders("orders-1", control_plane=process.address)
        mesh = await system.connect(process.address, service="web", node_id="web-1", load_reports=FAST)
        await follows(mesh, "orders-1")
        stub = OrderServiceStub(mesh.channel("orders"))
        made = 0
        for kills in (1, 0):
            for _ in range(20):
                await stub.GetOrder(ORDER, timeout=5.0)
            made += 20
            if kills:
                await process.kill()
                for _ in range(20):
                    await stub.GetOrder(ORDER, timeout=5.0)
                made += 20
                await process.start()

        async def whole() -> bool:
            async with open_channel(process.address) as channel:
                answer = await traffic_pb2_grpc.TrafficServiceStub(channel).GetTraffic(
                    traffic_pb2.GetTrafficRequest(service="orders"), timeout=5.0
                )
            return [edge.total for edge in answer.edges if edge.caller == "web"] == [made]

        await eventually(whole)


async def test_calls_that_fail_are_explained_by_their_last_example(rig: Rig) -> None:
    await rig.register("echo", "gone", 1)
    mesh = await rig.mesh(service="web", load_reports=FAST)
    channel = await rig.channel(mesh, "echo", {"gone"})
    with pytest.raises(mesh_client.MeshRpcError):
        await call(channel)
    with pytest.raises(mesh_client.MeshRpcError):
        await call(mesh.channel("nothing"))

    stub = traffic_pb2_grpc.TrafficServiceStub(rig.control)
    answer = traffic_pb2.ListFailuresResponse()

    async def both() -> bool:
        nonlocal answer
        answer = await stub.ListFailures(traffic_pb2.ListFailuresRequest())
        return len(answer.groups) == 2

    await eventually(both)
    unreached = next(group for group in answer.groups if group.service == "echo")
    assert unreached.explanation == "no connection to an instance could be made"
    assert [attempt.endpoint_id for attempt in unreached.example.attempts] == ["gone"] * 3
    assert unreached.example.attempts[0].target == "127.0.0.1:1"
    unknown = next(group for group in answer.groups if group.service == "nothing")
    assert unknown.reason == telemetry_pb2.FAILURE_REASON_UNKNOWN_SERVICE
    explained = await stub.Explain(traffic_pb2.ExplainRequest(service="nothing"))
    assert "no registry lists nothing" in [finding.message for finding in explained.findings]


async def test_somebody_who_taps_sees_calls_as_they_end_and_nobody_else_is_disturbed(rig: Rig) -> None:
    await rig.serve("echo", "e1", EchoService().add_to)
    mesh = await rig.mesh(service="web", node_id="web-1", load_reports=60.0)
    other = await rig.mesh(service="jobs", load_reports=60.0)
    channel, others = await rig.channel(mesh, "echo", {"e1"}), await rig.channel(other, "echo", {"e1"})
    await eventually(lambda: rig.plane.telemetry.recorder.connected == 2)
    stub = traffic_pb2_grpc.TrafficServiceStub(rig.control)
    tap = stub.Tap(traffic_pb2.TapRequest(service="echo", caller="web", duration=Duration(seconds=30)))
    first = await tap.read()
    assert isinstance(first, traffic_pb2.TapResponse)
    assert first.processes == 1
    service = mesh._resolver.target("echo").service
    await eventually(lambda: service.tap is not None)
    await call(channel)
    await call(others)
    with pytest.raises(grpc.aio.AioRpcError):
        await call(channel, b"fail")
    seen: list[traffic_pb2.CallRecord] = []
    while len(seen) < 2:
        response = await tap.read()
        assert isinstance(response, traffic_pb2.TapResponse)
        seen += response.calls
    assert [(each.caller, each.node_id, each.call.method, each.call.code) for each in seen] == [
        ("web", "web-1", ECHO, 0),
        ("web", "web-1", ECHO, 5),
    ]
    assert seen[1].call.details == "no such thing"
    assert seen[0].call.endpoint_id == "e1"
    assert abs(seen[0].at.ToDatetime().timestamp() - time.time()) < 24 * 3600
    assert other._resolver.target("echo").service.tap is None
    tap.cancel()
    await eventually(lambda: service.tap is None)


async def test_a_tap_ends_by_itself(rig: Rig) -> None:
    mesh = await rig.mesh(service="web", load_reports=60.0)
    await rig.serve("echo", "e1", EchoService().add_to)
    await rig.channel(mesh, "echo", {"e1"})
    await eventually(lambda: rig.plane.telemetry.recorder.connected == 1)
    stub = traffic_pb2_grpc.TrafficServiceStub(rig.control)
    tap = stub.Tap(traffic_pb2.TapRequest(service="echo", duration=Duration(nanos=300_000_000)))
    assert [response.processes async for response in tap] == [1]
    assert len(rig.plane.telemetry.taps) == 0


async def test_a_control_plane_that_takes_no_reports_disturbs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    from mesh_client.testing import InMemoryControlPlane

    caplog.set_level("INFO")
    async with (
        InMemoryControlPlane() as plane,
        mesh_client.connect(plane.address, cache_dir="", load_reports=FAST) as mesh,
    ):
        mesh.channel("echo")
        await until(mesh, lambda: mesh.state().in_sync)
        await eventually(lambda: "takes no load reports" in caplog.text)


async def test_reports_can_be_turned_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LOAD_REPORTS", "off")
    mesh: Mesh = await rig.mesh(service="web")
    await until(mesh, lambda: mesh.state().in_sync)
    assert mesh._resolver.reports is None


@pytest.mark.parametrize(
    ("variable", "given", "interval"),
    [("", None, INTERVAL), ("on", None, INTERVAL), ("250ms", None, 0.25), ("off", None, 0.0), ("off", 2.0, 2.0)],
)
def test_how_often_is_set_by_argument_or_environment(
    variable: str, given: float | None, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_LOAD_REPORTS", variable)
    assert report_interval(given) == interval


@pytest.mark.parametrize(("variable", "given"), [("often", None), ("1ms", None), ("", 1e9), ("", float("nan"))])
def test_an_interval_that_cannot_be_is_refused(
    variable: str, given: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_LOAD_REPORTS", variable)
    with pytest.raises(ConfigError, match="0.1s to 60s, or off"):
        report_interval(given)
