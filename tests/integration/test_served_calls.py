"""What a server counts of its calls: each once, by method, caller and how it ended, those included that it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.telemetry.dry_run import try_policy
from mesh_client.admission import Admission
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.tally import MAX_METHODS, OTHER
from mesh_client.guard import Guard
from mesh_client.transport import open_channel
from tests.integration import methods
from tests.integration.methods import FORMS, KINDS, REQUESTS, SERVICE, call, failure, handler, serving
from tests.integration.orders import ORDER, Orders, make_server, running
from tests.integration.test_load_reports import FAST, eventually


def admission(**policy: Any) -> Admission:
    made = Admission(Random(1), Guard("orders", secure=False))
    made.apply(ServicePolicy.parse({"service": "orders", **policy}))
    return made


def counted(gate: Admission) -> dict[str, dict[str, int]]:
    """Calls by method and status, all callers together."""
    with gate.counted() as book:
        return {
            method.rpartition("/")[2]: {
                code: count
                for tally in tallies.values()
                for code, count in {"OK": tally.ok, **tally.failures}.items()
                if count
            }
            for method, tallies in book
        }


async def counts(gate: Admission, **expected: dict[str, int]) -> None:
    """Returns once the server has counted so; the end of a call is told to its caller first."""
    await eventually(lambda: counted(gate) == expected, lambda: counted(gate))


@pytest.mark.parametrize(("kind", "behavior"), FORMS, ids=lambda value: getattr(value, "__name__", None))
async def test_every_form_of_handler_is_counted_with_how_long_it_took(kind: str, behavior: Callable[..., Any]) -> None:
    gate = admission()
    async with serving(("M", handler(kind, behavior)), wrap=gate) as target, open_channel(target) as channel:
        await call(channel, kind, "M", REQUESTS)
        await counts(gate, M={"OK": 1})
    with gate.counted() as book:
        ((method, tallies),) = book
        assert method == f"/{SERVICE}/M"
        (tally,) = tallies.values()
        assert 0 < tally.seconds < 5
        assert (sum(tally.buckets), book.peak) == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_how_a_call_ended_is_counted(kind: str) -> None:
    async def raises(*_: object) -> Any:
        raise ValueError("no such thing")

    async def aborts(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(grpc.StatusCode.NOT_FOUND, "not here")

    asleep, slept = asyncio.Event(), 0

    async def sleeps(_: object, context: object) -> Any:
        nonlocal slept
        slept += 1
        asleep.set()
        await asyncio.Event().wait()

    gate = admission()
    handlers: dict[str, Callable[..., Any]] = {"Raises": raises, "Aborts": aborts, "Sleeps": sleeps, "Late": sleeps}
    async with (
        serving(*((name, handler(kind, each)) for name, each in handlers.items()), wrap=gate) as target,
        open_channel(target) as channel,
    ):
        await failure(channel, kind, "Raises")
        await failure(channel, kind, "Aborts")
        multicallable = getattr(channel, kind)(f"/{SERVICE}/Sleeps")
        rpc = multicallable() if kind.startswith("stream") else multicallable(b"")
        await asleep.wait()
        rpc.cancel()
        asleep.clear()
        for timeout in (0.2, 1.0, 5.0):  # on a busy machine the first may pass before the server has heard of the call
            await failure(channel, kind, "Late", timeout=timeout)
            if asleep.is_set():
                break
        await eventually(lambda: gate.in_flight == 0)
        found = counted(gate)
    # Which of the two a server sees first, the deadline or the reset that comes with it, is a race.
    late = found.pop("Late")
    assert late.keys() <= {"DEADLINE_EXCEEDED", "CANCELLED"}
    assert sum(late.values()) == slept - 1 > 0
    assert found == {"Raises": {"UNKNOWN": 1}, "Aborts": {"NOT_FOUND": 1}, "Sleeps": {"CANCELLED": 1}}


async def test_a_status_that_a_handler_sets_is_counted() -> None:
    async def sets(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        context.set_code(grpc.StatusCode.ALREADY_EXISTS)
        return b""

    def sets_plainly(_: object, context: grpc.ServicerContext) -> bytes:
        context.set_code(grpc.StatusCode.OUT_OF_RANGE)
        return b""

    def aborts_plainly(_: object, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.DATA_LOSS, "gone")
        raise AssertionError

    gate = admission()
    forms: dict[str, Callable[..., Any]] = {"Sets": sets, "SetsPlainly": sets_plainly, "AbortsPlainly": aborts_plainly}
    async with (
        serving(*((name, handler("unary_unary", each)) for name, each in forms.items()), wrap=gate) as target,
        open_channel(target) as channel,
    ):
        for name in forms:
            await failure(channel, "unary_unary", name)
        await counts(gate, Sets={"ALREADY_EXISTS": 1}, SetsPlainly={"OUT_OF_RANGE": 1}, AbortsPlainly={"DATA_LOSS": 1})


async def test_refused_calls_are_counted_by_why() -> None:
    release, entered = asyncio.Event(), asyncio.Event()

    async def holds(*_: object) -> bytes:
        entered.set()
        await release.wait()
        return b""

    gate = admission(
        server_concurrency_limit={"max_in_flight": 1},
        rate_limits=[{"method": f"{SERVICE}/Limited", "requests_per_second": 0.001, "burst": 1}],
    )
    async with (
        serving(
            ("Holds", handler("unary_unary", holds)),
            ("Limited", handler("unary_unary", methods.echo_unary)),
            wrap=gate,
        ) as target,
        open_channel(target) as channel,
    ):
        await call(channel, "unary_unary", "Limited", REQUESTS)
        await failure(channel, "unary_unary", "Limited")
        held = asyncio.ensure_future(call(channel, "unary_unary", "Holds", REQUESTS))
        await entered.wait()
        await failure(channel, "unary_unary", "Holds")
        release.set()
        await held
        gate.apply(ServicePolicy.parse({"service": "orders", "authorization": [{"callers": ["a"], "methods": ["*"]}]}))
        await failure(channel, "unary_unary", "Holds")
        await counts(
            gate,
            Holds={"OK": 1, "RESOURCE_EXHAUSTED": 1, "PERMISSION_DENIED": 1},
            Limited={"OK": 1, "RESOURCE_EXHAUSTED": 1},
        )
    with gate.counted() as book:
        assert (book.rate_limited, book.shed, book.unauthorized, book.peak) == (1, 1, 1, 1)


async def test_the_busiest_moment_is_noted() -> None:
    release, all_in = asyncio.Event(), asyncio.Barrier(4)

    async def holds(*_: object) -> bytes:
        await all_in.wait()
        await release.wait()
        return b""

    gate = admission()
    async with (
        serving(("Holds", handler("unary_unary", holds)), wrap=gate) as target,
        open_channel(target) as channel,
    ):
        held = [asyncio.ensure_future(call(channel, "unary_unary", "Holds", REQUESTS)) for _ in range(3)]
        await all_in.wait()
        release.set()
        await asyncio.gather(*held)
        await counts(gate, Holds={"OK": 3})
    with gate.counted() as book:
        assert book.take_peak(0) == 3
        assert book.take_peak(0) == 0


def test_methods_of_a_proxy_that_serves_any_are_bounded() -> None:
    gate = admission()
    for number in range(MAX_METHODS + 50):
        gate.wrap(f"/proxied.v1.S/M{number}", handler("unary_unary", methods.echo_unary))
    with gate.counted() as book:
        names = [name for name, _ in book]
    assert (len(names), names[-1]) == (MAX_METHODS + 1, OTHER)


async def test_health_checks_are_not_counted() -> None:
    async with (
        running(registry="none", control_plane="127.0.0.1:1", policy=ServicePolicy(service="orders")) as server,
        open_channel(server.endpoint.target) as channel,
    ):
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert "Check" not in counted(server._admission)


async def test_a_server_reports_by_caller_what_it_received_and_what_a_policy_would_refuse(tmp_path: Path) -> None:
    plane = ControlPlane(ControlPlaneOptions(data_dir=tmp_path, debounce_quiet=0.002, debounce_maximum=0.02))
    await plane.start()
    try:
        assert plane.authority is not None
        where: dict[str, Any] = {"enrolment": plane.enrolment_address, "insecure": False}

        async def token(service: str) -> str:
            assert plane.authority is not None
            return (await plane.authority.create_token(service, 600.0, 1, "test")).text

        orders = mesh_client.connect(
            plane.address, service="orders", token=await token("orders"), cache_dir="", load_reports=FAST, **where
        )
        web = mesh_client.connect(
            plane.address, service="web", token=await token("web"), cache_dir="", load_reports=FAST, **where
        )
        async with orders, web:
            server = make_server(Orders("one"), control_plane=plane.address, mesh=orders, instance_id="orders-1")
            await server.start()
            try:
                stub = OrderServiceStub(web.channel("orders"))
                for _ in range(12):
                    await stub.GetOrder(ORDER, timeout=10.0, wait_for_ready=True)
                traffic = plane.telemetry.traffic
                loop = asyncio.get_running_loop()

                def received() -> dict[tuple[str, str], int]:
                    sums: dict[tuple[str, str], int] = {}
                    for step in traffic.received("orders", loop.time()):
                        for key, counters in step.calls.items():
                            sums[key] = sums.get(key, 0) + counters.get(0, 0)
                    return sums

                await eventually(lambda: received() == {("web", "/shop.v1.OrderService/GetOrder"): 12}, received)
                strict = ServicePolicy.parse(
                    {"service": "orders", "authorization": [{"callers": ["checkout"], "methods": ["*"]}]}
                )
                assert try_policy(strict, traffic.received("orders", loop.time())).unauthorized == 12
            finally:
                await server.stop(0.0)
        (served,) = [each.served for each in plane.telemetry.recorder.reporters if each.service == "orders"]
        assert served["orders-1"].service == "orders"
    finally:
        await plane.stop(0.0)
