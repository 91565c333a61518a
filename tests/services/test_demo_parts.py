"""The demo's load, figures, screen, policies and Consul, each by itself."""

from __future__ import annotations

import asyncio
import io
import json
import math
import os
import re
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path

import grpc
import pytest
from aiohttp import web
from google.protobuf import json_format
from rich.console import Console
from shop.v1.orders_pb2 import PlaceOrderRequest
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.demo import policies
from mesh_cli.demo.consul import find_consul, free_ports, start_consul
from mesh_cli.demo.edge import RestError, RestOrders
from mesh_cli.demo.identity import Identities
from mesh_cli.demo.load import Customers, Tally
from mesh_cli.demo.policies import Operator
from mesh_cli.demo.promises import Promise, at_least, at_most, closing_table, exactly, figure, write_json
from mesh_cli.demo.stage import service
from mesh_cli.demo.supervisor import ProcessError, Supervisor
from mesh_cli.demo.system import Instance, System
from mesh_cli.demo.view import Screen
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import ConfigError
from mesh_client.core.policy import Algorithm, ServicePolicy
from tests.services.shop import Shop

# -- figures


def test_promises_compare_figures_with_goals() -> None:
    assert exactly("a", "a", 0, 0, "").ok
    assert not exactly("a", "a", 1, 0, "").ok
    assert at_most("a", "a", 2, 2, "").ok
    assert not at_most("a", "a", math.inf, 2, "").ok
    assert at_least("a", "a", 2, 2, "").ok
    assert not at_least("a", "a", 1.9, 2, "").ok


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 s"), (3.0, "3 s"), (0.123, "0.12 s"), (12.34, "12.3 s"), (math.inf, "never")]
)
def test_figures_are_short(value: float, shown: str) -> None:
    assert figure(at_most("a", "a", value, 1, "s")) == shown


def test_the_table_says_what_was_broken() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(
        closing_table([exactly("a.b", "nothing fails", 3, 0, "of 9", "it did"), at_most("c", "fast", 1, 2, "s")])
    )
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    assert "3 of 9" in text
    assert "NO" in text
    assert "it did" in text


def test_json_holds_every_figure_and_null_for_never(tmp_path: Path) -> None:
    write_json([at_most("a", "soon", math.inf, 2, "s"), exactly("b", "none", 0, 0, "calls")], tmp_path / "file.json")
    first, second = json.loads((tmp_path / "file.json").read_text())
    assert (first["value"], first["goal"], first["ok"]) == (None, "<= 2", False)
    assert (second["id"], second["value"], second["ok"]) == ("b", 0, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


# -- load


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with AsyncExitStack() as stack:
        yield Shop(tmp_path, stack)


async def customers(shop: Shop, rate: float = 200) -> Customers:
    inventory, payments = await shop.inventory(), await shop.payments()
    return Customers(await shop.orders(inventory, payments, "orders-a"), rate)


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_burst_counts_every_order(shop: Shop) -> None:
    customer = await customers(shop)
    tally = await customer.burst(20, 4)
    assert (tally.sent, tally.placed, tally.failed) == (20, 20, 0)
    assert tally.taken_by == {"orders-a": 20}
    assert len(customer.orders) == 20
    assert 0 < tally.slowest_percent() < 10
    assert tally.explain() == ""


async def test_load_flows_pauses_and_goes_on(shop: Shop) -> None:
    customer = await customers(shop)
    running = asyncio.create_task(customer.run())
    async with customer.watched() as tally:
        await customer.finish(10)
    assert tally.placed >= 10
    await customer.pause()
    sent = customer.total.sent
    assert customer.total.placed == sent
    assert (await customer.burst(3, 1)).placed == 3
    assert customer.total.sent == sent + 3
    customer.go_on()
    await customer.finish(5)
    await customer.pause()
    await stop(running)


async def test_failures_are_told_in_words(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    customer = await customers(shop)
    shop.outage.switch(True)
    tally = await customer.burst(2, 1)
    assert (tally.placed, tally.failed) == (0, 2)
    assert "ABORTED" in tally.explain()
    shop.outage.switch(False)
    monkeypatch.setattr("services.payments.service.LIMIT_CENTS", 1)
    tally = await customer.burst(1, 1)
    assert tally.failures == ["the payment was declined"]
    assert math.isnan(tally.slowest_percent())


# -- the edge


class Edge:
    """Answers orders as an edge would: these answers first, then every order is placed, by gRPC if it has a channel."""

    def __init__(self, *answers: tuple[int, str], orders: grpc.aio.Channel | None = None) -> None:
        self.answers = list(answers)
        self.keys: list[str] = []
        self.note = ""
        """What it makes of the note of orders."""
        self._orders = orders

    async def order(self, request: web.Request) -> web.Response:
        order = await request.json()
        self.keys.append(order["idempotencyKey"])
        if self.answers:
            status, body = self.answers.pop(0)
            return web.Response(status=status, text=body)
        if self._orders is not None:
            answer = await OrderServiceStub(self._orders).PlaceOrder(json_format.ParseDict(order, PlaceOrderRequest()))
            answer.order.note = self.note
            return web.json_response(json_format.MessageToDict(answer))
        placed = {"orderId": "1", "sku": order["sku"], "quantity": 1, "state": "ORDER_STATE_PLACED", "takenBy": "a"}
        return web.json_response({"order": placed})


@asynccontextmanager
async def edge(
    *answers: tuple[int, str], orders: grpc.aio.Channel | None = None
) -> AsyncIterator[tuple[Edge, RestOrders]]:
    made, app = Edge(*answers, orders=orders), web.Application()
    app.add_routes([web.post("/v1/orders", made.order)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with RestOrders(f"http://127.0.0.1:{runner.addresses[0][1]}") as rest:
            yield made, rest
    finally:
        await runner.cleanup()


async def test_an_order_without_an_answer_is_placed_again_with_the_same_key() -> None:
    async with edge((503, "no service"), (504, "too late")) as (made, rest):
        order, repeated = await rest.place("key", "beans", 10.0)
    assert (order.order_id, order.taken_by, repeated) == ("1", "a", 2)
    assert made.keys == ["key"] * 3


@pytest.mark.parametrize(
    ("answer", "words"),
    [((409, '{"code": 10}'), '409: {"code": 10}'), ((200, "no JSON"), "not an order")],
)
async def test_an_order_that_was_refused_is_not_placed_again(answer: tuple[int, str], words: str) -> None:
    async with edge(answer) as (made, rest):
        with pytest.raises(RestError, match=re.escape(words)):
            await rest.place("key", "beans", 10.0)
    assert len(made.keys) == 1


async def test_an_edge_that_gives_no_answer_is_waited_for_as_long_as_a_customer_waits() -> None:
    async with edge(*[(503, "no service")] * 1000) as (_, rest):
        with pytest.raises(RestError, match=r"no answer for 1 s, at last: 503: no service"):
            await rest.place("key", "beans", 1.0)
    with pytest.raises(RestError, match="enter it first"):
        await RestOrders("http://127.0.0.1:1").place("key", "beans", 1.0)


async def placed_by_rest(channel: grpc.aio.Channel, rest: RestOrders) -> Tally:
    """What became of ten orders or more through the edge."""
    customer = Customers(channel, 200, rest)
    running = asyncio.create_task(customer.run())
    async with customer.watched() as tally:
        await customer.finish(10)
        await customer.pause()
    await stop(running)
    assert customer.unanswered == []
    return tally


async def test_the_load_goes_through_the_edge_and_each_order_is_looked_up(shop: Shop) -> None:
    channel = await shop.orders(await shop.inventory(), await shop.payments(), "orders-a")
    async with edge((503, "no service"), orders=channel) as (_, rest):
        tally = await placed_by_rest(channel, rest)
    assert tally.failures == []
    assert tally.looked_up == tally.by_rest == tally.placed == tally.taken_by["orders-a"] >= 10
    assert tally.rest() == f"; {tally.placed} by REST, 1 placed again, {tally.placed} looked up by gRPC"


async def test_orders_that_cannot_be_looked_up_as_they_were_placed_are_failures(shop: Shop) -> None:
    channel = await shop.orders(await shop.inventory(), await shop.payments(), "orders-a")
    async with edge(orders=channel) as (changed, rest):
        changed.note = "as no customer wrote it"
        tally = await placed_by_rest(channel, rest)
    assert set(tally.failures) == {"looked up: it is not what was placed"}
    async with edge() as (_, rest):
        tally = await placed_by_rest(channel, rest)
    assert tally.failed == tally.placed >= 10
    assert tally.explain().startswith("looked up: NOT_FOUND: there is no order '1'")


def test_the_policy_of_the_edge_is_valid() -> None:
    assert EdgePolicy.parse(policies.edge()).upstreams == ("inventory", "orders")


# -- policies


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_policies_are_valid(algorithm: Algorithm) -> None:
    assert ServicePolicy.parse(policies.orders(algorithm)).load_balancer.algorithm is algorithm
    assert ServicePolicy.parse(policies.payments()).circuit_breaker.open_duration == policies.OPEN_DURATION
    ServicePolicy.parse(policies.inventory())


async def test_the_operator_applies_policies_and_asks_for_endpoints(tmp_path: Path) -> None:
    plane = ControlPlane(ControlPlaneOptions(data_dir=tmp_path / "state"))
    await plane.start()
    identities = Identities(tmp_path)
    try:
        await identities.set_up(tmp_path / "state", plane.address, ["orders"])
        async with (
            Operator(plane.address, identities) as operator,
            mesh_client.connect(
                plane.address,
                service="orders",
                enrolment=plane.enrolment_address,
                token_file=identities.token_file("orders"),
                insecure=False,
                cache_dir="",
            ) as mesh,
        ):
            assert await operator.endpoints("orders") == set()
            server = mesh_client.server("orders", control_plane=plane.address, instance_id="orders-1", mesh=mesh)
            await server.start()
            await operator.until_listed("orders", "orders-1")
            mesh.channel("orders")
            await mesh.synced()
            before = service(mesh.state(), "orders").policy_version
            await operator.apply(policies.orders())
            after = service(mesh.state(), "orders").policy_version
            assert after != before
            await operator.apply(policies.orders())
            assert service(mesh.state(), "orders").policy_version == after
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await operator.apply({"service": "orders", "unknown": 1})
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError):
                await operator.endpoints("no such name")
            with pytest.raises(KeyError):
                service(mesh.state(), "payments")
            await server.stop()
    finally:
        await plane.stop()


# -- Consul


def test_consul_is_found_by_variable_then_in_the_checkout_then_on_the_path(tmp_path: Path) -> None:
    def program(path: Path) -> Path:
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    on_path = program(tmp_path / "bin" / "consul")
    environment = {"PATH": str(on_path.parent)}
    root = tmp_path / "checkout"
    assert find_consul(root, environment) == on_path
    fetched = program(root / ".tools" / "consul" / "consul")
    assert find_consul(root, environment) == fetched
    assert find_consul(root, {**environment, "MESH_CONSUL_BINARY": str(on_path)}) == on_path
    with pytest.raises(ConfigError, match="MESH_CONSUL_BINARY"):
        find_consul(root, {"MESH_CONSUL_BINARY": str(tmp_path)[:-1] + "nothing"})
    with pytest.raises(ConfigError, match="make tools"):
        find_consul(tmp_path / "elsewhere", {"PATH": str(tmp_path)})


async def test_a_consul_that_does_not_start_is_tried_again_and_then_given_up_on(tmp_path: Path) -> None:
    program = tmp_path / "consul"
    program.write_text("#!/bin/sh\necho the port is taken\nexit 1\n")
    program.chmod(0o755)
    async with Supervisor(tmp_path) as supervisor:
        with pytest.raises(ProcessError, match="the port is taken"):
            await start_consul(supervisor, program, os.environ)
    assert (tmp_path / "consul.log").read_text().count("taken") == 3


def test_free_ports_differ() -> None:
    assert len(set(free_ports(10))) == 10


# -- system


async def test_an_instance_is_not_frozen_while_it_holds_the_shared_file(tmp_path: Path) -> None:
    system = System(tmp_path)
    script = f"""if True:
        import sqlite3, time
        connection = sqlite3.connect({str(system.database("orders"))!r}, timeout=60, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (n)")
        print("writes", flush=True)
        while True:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO t VALUES (1)")
            time.sleep(0.001)
            connection.execute("COMMIT")
            time.sleep(0.001)
    """
    async with Supervisor(tmp_path) as supervisor:
        process = await supervisor.start("orders-1", [sys.executable, "-c", script], os.environ, re.compile("^writes"))
        await process.wait_ready()
        instance = Instance("orders", "orders-1", 1, "127.0.0.1:1", process)
        for _ in range(20):
            await system.freeze(instance)
            assert (instance.state, process.frozen) == ("hung", True)
            with closing(sqlite3.connect(system.database("orders"), timeout=0.0, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
            system.thaw(instance)


# -- screen


def promise(ok: bool) -> Promise:
    return exactly("a", "nothing fails", 0 if ok else 1, 0, "of 9", "note")


@pytest.mark.parametrize(
    ("terminal", "environment", "live"), [(True, {}, True), (True, {"CI": "1"}, False), (False, {}, False)]
)
def test_the_screen_is_live_on_a_terminal_alone(terminal: bool, environment: dict[str, str], live: bool) -> None:
    assert Screen(Console(file=io.StringIO(), force_terminal=terminal), environment=environment).live is live


async def test_plain_lines_tell_everything(tmp_path: Path) -> None:
    file = io.StringIO()
    screen = Screen(Console(file=file, width=200), live=False)
    screen.scenario(1, 7, "it begins")
    screen.tell("now this")
    screen.promise(promise(True))
    screen.promise(promise(False))
    lines = file.getvalue().splitlines()
    assert [line.split(" s ", 1)[1].strip() for line in lines] == [
        "== 1/7 it begins",
        "now this",
        "kept   nothing fails: 0 of 9 (note)",
        "BROKEN nothing fails: 1 of 9 (note)",
    ]


async def test_the_live_table_shows_instances_counts_and_events(tmp_path: Path, shop: Shop) -> None:
    class Drawn(io.StringIO):
        """Says when something was written."""

        def __init__(self) -> None:
            super().__init__()
            self.drawn = asyncio.Event()

        def flush(self) -> None:
            self.drawn.set()

    file = Drawn()
    screen = Screen(Console(file=file, force_terminal=True, width=120, height=40), live=True)
    customer = await customers(shop)
    await customer.burst(3, 1)
    system = System(tmp_path)
    async with Supervisor(tmp_path) as supervisor, mesh_client.connect("127.0.0.1:1", cache_dir="") as mesh:
        mesh.channel("orders")
        process = await supervisor.start("sleeper", ["sleep", "60"], os.environ, re.compile("never"))
        system.instances += [
            Instance("orders", "orders-a", 1, "127.0.0.1:1", process, "hung"),
            Instance("payments", "payments-1", 1, "127.0.0.1:2", process),
        ]
        screen.scenario(2, 7, "something")
        screen.tell("SIGSTOP orders-a")
        following = asyncio.create_task(screen.follow(system, mesh, customer))
        while "3 orders placed" not in file.getvalue():
            file.drawn.clear()
            await asyncio.wait_for(file.drawn.wait(), 30)
        await stop(following)
    text = file.getvalue()
    for part in ("2/7 something", "orders-a", "hung", "payments-1", "0 failed", "orders closed", "SIGSTOP orders-a"):
        assert part in text
