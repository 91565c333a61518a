"""`mesh top`, `tap`, `explain` and `diff` against a real mesh, and what the control plane refuses to answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import traffic_pb2, traffic_pb2_grpc
from shop.v1.orders_pb2_grpc import OrderServiceStub
from typer.testing import Result

import mesh_client
from control_plane.telemetry.taps import MAX_TAPS
from tests.cli.conftest import Run
from tests.integration.mesh_rig import Rig, open_rig
from tests.integration.orders import ORDER, running
from tests.integration.test_load_reports import eventually

METHOD = "/shop.v1.OrderService/GetOrder"
CALLS = 12
POLICY = """
service: orders
authorization:
- {callers: [checkout], methods: ["shop.v1.OrderService/*"]}
"""

Mesh = Callable[..., Awaitable[Result]]


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setenv("MESH_LOAD_REPORTS", "100ms")
    async with open_rig(tmp_path) as rig:
        yield rig


@pytest.fixture
def mesh(rig: Rig, run: Run) -> Mesh:
    """Runs the command in a thread, so that the control plane in this loop can answer it."""

    async def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return await asyncio.to_thread(run, *arguments, "--control-plane", rig.plane.address, stdin=stdin)

    return invoke


@asynccontextmanager
async def called(rig: Rig) -> AsyncIterator[Any]:
    """A server of orders that web has called so often, once both have reported that."""
    async with running(control_plane=rig.plane.address, instance_id="orders-1"):
        client = await rig.mesh(service="web")
        orders: Any = OrderServiceStub(await rig.channel(client, "orders", {"orders-1"}))
        for _ in range(CALLS):
            await orders.GetOrder(ORDER)
        traffic = rig.plane.telemetry.traffic

        def reported() -> bool:
            # In plaintext a server does not know who calls it.
            now = asyncio.get_running_loop().time()
            received = sum(each.calls.get(("", METHOD), {}).get(0, 0) for each in traffic.received("orders", now))
            return (traffic.calls_to("orders", now).count, received) == (CALLS, CALLS)

        await eventually(reported, lambda: traffic.received("orders", asyncio.get_running_loop().time()))
        yield orders


def shown(result: Result) -> dict[str, Any]:
    assert result.stderr == ""
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


async def test_who_calls_whom(rig: Rig, mesh: Mesh) -> None:
    async with called(rig):
        (edge,) = shown(await mesh("top", "--once", "--json"))["edges"]
        assert (edge["caller"], edge["service"], edge["total"], edge["processes"]) == ("web", "orders", CALLS, 1)
        assert (edge["calls"]["count"], edge["calls"]["success_rate"]) == (CALLS, 1.0)
        assert edge["calls"]["codes"] == {"0": CALLS}
        of_orders = shown(await mesh("top", "orders", "--once", "--json"))
        assert [(each["method"], each["calls"]["count"]) for each in of_orders["methods"]] == [(METHOD, CALLS)]
        assert [(each["endpoint_id"], each["attempts"]["count"]) for each in of_orders["endpoints"]] == [
            ("orders-1", CALLS)
        ]
        table = (await mesh("top", "--once")).stdout.splitlines()
        assert table[3].split()[:2] == ["web", "orders"]
        assert "100%" in table[3]


async def test_single_calls_are_shown_as_they_end(rig: Rig, mesh: Mesh) -> None:
    async with called(rig) as orders:
        tapping = asyncio.ensure_future(mesh("tap", "orders", "--limit", "3", "--slow", "0s", "--json"))
        while not tapping.done():
            await orders.GetOrder(ORDER)
            await asyncio.sleep(0.01)
        result = await tapping
        assert (result.exit_code, result.stderr) == (0, "")
        seen = [json.loads(line) for line in result.stdout.splitlines()]
        assert [(each["caller"], each["call"]["method"], each["call"]["endpoint_id"]) for each in seen] == [
            ("web", METHOD, "orders-1")
        ] * 3
    await eventually(lambda: not len(rig.plane.telemetry.taps))


async def test_whoever_taps_is_told_what_is_waited_for_or_that_it_is_unknown(rig: Rig, mesh: Mesh) -> None:
    result = await mesh("tap", "oders", "--duration", "1s")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "mesh: nobody knows a service oders, and nobody calls one\n"
    async with called(rig):
        result = await mesh("tap", "orders", "--duration", "1s")
        assert result.exit_code == 0
        first, nothing = result.stderr.splitlines()
        assert first == "waiting for calls to orders from 2 processes"  # web, and orders itself
        assert nothing.startswith("mesh: no such call of a mesh client to orders ended meanwhile")
        # In whatever way somebody knows of it: this one is registered nowhere, and calls.
        assert (await mesh("tap", "web", "--duration", "1s", "--json")).exit_code == 0


async def test_why_calls_fail(rig: Rig, mesh: Mesh) -> None:
    await rig.register("orders", "gone", 1)
    client = await rig.mesh(service="web", node_id="web-1")
    orders = OrderServiceStub(await rig.channel(client, "orders", {"gone"}))
    for _ in range(6):
        with pytest.raises(mesh_client.MeshRpcError):
            await orders.GetOrder(ORDER)
    text = ""

    async def explained() -> bool:
        nonlocal text
        text = (await mesh("explain", "orders")).stdout
        return "breaker is open" in text and "6 calls" in text

    await eventually(explained, lambda: text)
    lines = text.splitlines()
    assert lines[0] == "Calls to orders"
    assert lines[1].startswith("error   ")
    assert "no connection to an instance could be made" in text
    assert "tried gone at 127.0.0.1:1: UNAVAILABLE" in text
    answer = shown(await mesh("explain", "orders", "--json"))
    assert {each["severity"] for each in answer["findings"]} >= {"SEVERITY_ERROR"}
    assert all(each["explanation"] for each in answer["failures"])


async def test_nothing_is_known_of_a_service_or_trace(mesh: Mesh) -> None:
    result = await mesh("explain", "oders")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "mesh: nobody knows a service oders, and nobody calls one\n"
    result = await mesh("explain", "ab" * 16)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no failed call of this trace is kept" in result.stderr


async def test_what_a_policy_would_have_refused(rig: Rig, mesh: Mesh, tmp_path: Path) -> None:
    file = tmp_path / "orders.yaml"
    file.write_text(POLICY, encoding="utf-8")
    async with called(rig):
        result = await mesh("diff", str(file), "--json")
        assert result.exit_code == 1
        (tried,) = shown(result)["policies"]
        assert (tried["calls"], tried["instances"], tried["different"]) == (CALLS, 1, True)
        assert (tried["current"]["unauthorized"], tried["proposed"]["unauthorized"]) == (0, CALLS)
        text = (await mesh("diff", str(file))).stdout
        assert f"orders, of {CALLS} calls that 1 instance received" in text
        assert "nobody of the mesh  shop.v1.OrderService/GetOrder" in text
        assert (await mesh("policy", "apply", str(file))).exit_code == 0
        result = await mesh("diff", str(file))
        assert result.exit_code == 0, result.stdout
        assert result.stdout.startswith(f"orders: the policy in {file} is in force as it is\n")


async def test_what_cannot_be_asked_is_refused_in_words(rig: Rig) -> None:
    stub: Any = traffic_pb2_grpc.TrafficServiceStub(rig.control)

    async def refused(answer: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
        return caught.value.code(), caught.value.details() or ""

    async def tapped(**arguments: Any) -> None:
        async for _ in stub.Tap(traffic_pb2.TapRequest(**arguments)):
            pass

    await rig.register("orders", "orders-1", 1)
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for answer, words in (
        (stub.GetTraffic(traffic_pb2.GetTrafficRequest(service="No Service")), "expected a DNS label"),
        (stub.ListFailures(traffic_pb2.ListFailuresRequest(service="No Service")), "expected a DNS label"),
        (stub.Explain(traffic_pb2.ExplainRequest(service="")), "expected a DNS label"),
        (stub.Explain(traffic_pb2.ExplainRequest(trace_id="12")), "expected 32 hex digits"),
        (stub.TryPolicy(traffic_pb2.TryPolicyRequest(document="timeout: soon")), "timeout"),
        (tapped(service="No Service"), "expected a DNS label"),
        (tapped(service="orders", codes=[99]), "gRPC status codes"),
        (tapped(service="orders", method="x"), "expected package.Service/Method"),
        (tapped(service="orders", duration=Duration(seconds=-1)), "above 0 s"),
    ):
        code, details = await refused(answer)
        assert code is invalid
        assert words in details
    code, details = await refused(tapped(service="oders"))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "nobody knows a service oders, and nobody calls one")
    taps = [stub.Tap(traffic_pb2.TapRequest(service="orders")) for _ in range(MAX_TAPS)]
    for tap in taps:
        await tap.read()
    code, details = await refused(tapped(service="orders"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_TAPS) in details
    for tap in taps:
        tap.cancel()
    await eventually(lambda: not len(rig.plane.telemetry.taps))


async def test_windows_that_cannot_be_are_answered_for_what_is_kept(rig: Rig) -> None:
    stub = traffic_pb2_grpc.TrafficServiceStub(rig.control)
    for window in (Duration(), Duration(seconds=-5), Duration(seconds=10**11), Duration(nanos=-(2**31))):
        answer = await stub.GetTraffic(traffic_pb2.GetTrafficRequest(window=window))
        assert 0 <= answer.window.ToNanoseconds() <= 600 * 10**9
        assert not (await stub.ListFailures(traffic_pb2.ListFailuresRequest(window=window))).groups
