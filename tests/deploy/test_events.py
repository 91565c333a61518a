"""Events over the deployment's RabbitMQ: its configuration, users and certificates, who is let in; and their traces.

Everything but Consul runs as a container would have it: see `tests.deploy.confinement`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import aio_pika
import grpc
import grpc.aio
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection
from mesh.v1 import event_pb2
from shop.v1 import notifications_pb2, orders_pb2, shipping_pb2
from shop.v1.events_pb2 import OrderPlaced
from shop.v1.notifications_pb2_grpc import NotificationServiceStub
from shop.v1.orders_pb2_grpc import OrderServiceStub
from shop.v1.shipping_pb2_grpc import ShippingServiceStub

import mesh_client
from deploy.prepare import BROKER_USERS, CREDENTIALS, VIRTUAL_HOST
from mesh_cli.demo.supervisor import Supervisor
from mesh_client.core.events.topology import EXCHANGE, Group, permissions
from mesh_client.events.settings import Credentials, read_credentials
from mesh_client.mesh import Mesh
from tests.deploy.broker import DeployedBroker
from tests.deploy.confinement import Box
from tests.deploy.consul import DEPLOY
from tests.deploy.deployment import Containers, Deployment, deployed, prepare
from tests.deploy.test_prepare import write_as_the_version_before
from tests.events.services import Seen, started
from tests.integration.otlp import ReceivedSpan, Receiver, open_receiver
from tests.integration.system import PATIENCE
from tests.ports import hold_ports

SHIPPING = Group("shipping", "shipping")
SERVICES = ("inventory", "payments", "orders", "shipping", "notifications")
ORDER = {
    "orders server",
    "orders server > orders call",
    "orders server > orders call > orders attempt",
    "orders server > orders call > orders attempt > inventory server",
    "orders server > orders call > orders attempt > payments server",
    "orders server > orders publish",
}
"""The spans of a placed order, each with those above it."""
EVENTS = (
    ("publish", "orders", "OrderPlaced"),
    ("process", "shipping", "OrderPlaced"),
    ("process", "notifications", "OrderPlaced"),
    ("publish", "shipping", "OrderShipped"),
    ("process", "notifications", "OrderShipped"),
)
"""And those of the events that it leads to."""


class Doors:
    """The broker as whoever is on its network finds it."""

    def __init__(self, box: Box, port: int) -> None:
        self._secrets = box.directory / "secrets"
        self._port = port
        self.roots = self._secrets / "rabbitmq" / "ca.pem"

    def file(self, part: str) -> Path:
        return self._secrets / part / CREDENTIALS

    def credentials(self, part: str) -> Credentials:
        return read_credentials(self.file(part))

    async def connect(
        self, user: Credentials, vhost: str = VIRTUAL_HOST, *, tls: ssl.TLSVersion | None = ssl.TLSVersion.TLSv1_3
    ) -> AbstractConnection:
        context = ssl.create_default_context(cafile=self.roots)
        if tls is not None:
            context.minimum_version = context.maximum_version = tls
        return await aio_pika.connect(
            host="localhost",
            port=self._port,
            login=user.user,
            password=user.password,
            virtualhost=vhost,
            ssl=tls is not None,
            ssl_context=context,
            timeout=PATIENCE,
        )

    async def let_in(
        self, user: Credentials, vhost: str = VIRTUAL_HOST, *, tls: ssl.TLSVersion | None = ssl.TLSVersion.TLSv1_3
    ) -> bool:
        try:
            connection = await self.connect(user, vhost, tls=tls)
        except aio_pika.exceptions.AMQPError:
            return False
        await connection.close()
        return True


class Shop:
    """The whole deployment without its edge, one instance of each service.

    Args:
        deployment: what is prepared.
        directory: for logs.
        stack: ends what is started.
    """

    def __init__(self, deployment: Deployment, directory: Path, stack: AsyncExitStack) -> None:
        self.deployment = deployment
        self.directory = directory
        self._stack = stack
        self._ports = stack.enter_context(ExitStack())

    async def start(self) -> None:
        """Everything but the broker and Jaeger. Every trace is sampled."""
        self.supervisor = await self._stack.enter_async_context(Supervisor(self.directory))
        self.containers = Containers(self.deployment, self.supervisor, self._ports)
        self.control_plane = await self.containers.start_control_plane()
        await asyncio.to_thread(self.containers.run, "create-operator", "test")
        await self.mesh("policy", "apply", *(f"/policies/{file.name}" for file in (DEPLOY / "policies").glob("*.yaml")))
        self.services = [
            await self.containers.start_service(f"{name}-1", OTEL_TRACES_SAMPLER_ARG="1") for name in SERVICES
        ]
        port = self.containers.broker_port
        self.broker = DeployedBroker(self.deployment.box, self.supervisor, self._ports, port)
        self.doors = Doors(self.deployment.box, port)

    async def subscribed(self, *services: str) -> None:
        """Returns when these have their queues at the broker: what was published before does not get there."""
        logs = [self.directory / f"{service}-1.log" for service in services]

        async def ask() -> bool:
            return all(
                f"the group {name}.{name} gets events" in log.read_text()
                for name, log in zip(services, logs, strict=True)
            )

        await comes_true(ask)

    async def mesh(self, *arguments: str) -> str:
        return await asyncio.to_thread(self.containers.mesh, *arguments)

    async def member(self, service: str, monkeypatch: pytest.MonkeyPatch) -> Mesh:
        """A client of the mesh outside of the box, with a service's token."""
        monkeypatch.setenv("CONSUL_HTTP_TOKEN", self.deployment.token(service))
        roots = self.directory / "roots.pem"
        roots.write_bytes((self.deployment.box.directory / "data/control-plane/ca/roots.pem").read_bytes())
        plane, enrolment = self.containers.plane, self.containers.enrolment
        mesh = mesh_client.connect(
            plane, service=service, enrolment=enrolment, attestation="consul", trust_roots=roots, cache_dir=""
        )
        async with asyncio.timeout(PATIENCE):
            return await self._stack.enter_async_context(mesh)

    async def outbox(self, service: str) -> int:
        """How many events wait in a service's database."""
        file = f"{self.deployment.box.state}/data/{service}/shop.sqlite"
        command = ("-m", "mesh_cli", "events", "status", service, "--outbox", file, "--json")
        size = json.loads(await asyncio.to_thread(self.deployment.box.output, *command))["outbox"]
        return int(size["events"])


@pytest.mark.timeout(180)
async def test_an_order_becomes_a_shipment_and_a_notification(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By events over TLS, each service with its own credentials; and it is a trace, which Jaeger gets.

    Without a broker all start, and orders are taken; without Jaeger nothing is missing but traces.
    """
    monkeypatch.delenv("MESH_INSECURE")
    async with AsyncExitStack() as stack:
        shop = Shop(stack.enter_context(deployed(tmp_path_factory.mktemp("events"))), tmp_path, stack)
        await shop.start()
        edge = await shop.member("edge", monkeypatch)
        await shop.broker.start()
        await shop.subscribed("shipping", "notifications")
        async with open_receiver(shop.containers.jaeger_port) as jaeger:
            first = await place(edge, "first")
            await arrives(edge, first)
            await shop.broker.stop()
            second = await place(edge, "second")
            assert await shop.outbox("orders") == 1
            await shop.broker.start()
            await arrives(edge, second)

            async def is_empty() -> bool:
                return await shop.outbox("orders") == 0

            await comes_true(is_empty)
            await is_traced(jaeger, first, shop)

        notifications = await shop.member("notifications", monkeypatch)
        await the_control_plane_tells(notifications, shop)
        await operators_see_what_nobody_could_handle(notifications, shop)
        await strangers_are_refused(shop.doors)
        await services_have_their_own_names_alone(shop.doors)

        log = (tmp_path / "rabbitmq.log").read_text()
        for user in BROKER_USERS.values():
            assert f"user '{user}' authenticated and granted access to vhost '{VIRTUAL_HOST}'" in log
        assert "started TLS (SSL) listener" in log
        assert "started TCP listener" not in log
        await arrives(edge, await place(edge, "without Jaeger"))
        assert set(await asyncio.gather(*(process.stop() for process in shop.services))) == {0}
        # Which is all that it holds them up for; their exporter alone would try for 10 s.
        assert "their collector did not take them within 0.5 s" in shop.services[-1].log.read_text()
        assert await shop.control_plane.stop() == 0
    secrets = [shop.doors.credentials(part).password for part in BROKER_USERS]
    for file in tmp_path.glob("*.log"):
        text = file.read_text()
        assert not [secret for secret in secrets if secret in text], file
        assert "Logging error" not in text, file


async def place(edge: Mesh, key: str) -> str:
    """An order's id."""
    request = orders_pb2.PlaceOrderRequest(idempotency_key=key, sku="grinder", quantity=1)
    stub = OrderServiceStub(edge.channel("orders"))
    placed = await stub.PlaceOrder(request, wait_for_ready=True, timeout=PATIENCE)
    assert placed.order.state == orders_pb2.ORDER_STATE_PLACED
    return placed.order.order_id


async def arrives(edge: Mesh, order: str) -> None:
    """Returns when an order has its shipment and the customer was told of both."""
    shipping, notifications = (
        ShippingServiceStub(edge.channel("shipping")),
        NotificationServiceStub(edge.channel("notifications")),
    )
    shipment = shipping_pb2.GetShipmentResponse()
    texts: list[str] = []

    async def ask() -> bool:
        call = shipping.GetShipment(shipping_pb2.GetShipmentRequest(order_id=order), wait_for_ready=True)
        if await call.code() is grpc.StatusCode.NOT_FOUND:
            return False
        shipment.CopyFrom(await call)
        request = notifications_pb2.ListNotificationsRequest(order_id=order)
        texts[:] = (await notifications.ListNotifications(request, wait_for_ready=True)).texts
        return len(texts) == 2

    await comes_true(ask)
    assert (shipment.sku, shipment.quantity) == ("grinder", 1)
    assert set(texts) == {
        "Thank you for your order of 1 grinder, 189.00 EUR.",
        f"Your order is on its way as {shipment.shipment_id}.",
    }


async def is_traced(jaeger: Receiver, order: str, shop: Shop) -> None:
    """Returns when Jaeger has an order's trace and those that are linked to it, and the control plane has it too."""

    def first(kind: str, service: str, event: str) -> ReceivedSpan | None:
        spans = (
            span
            for span in jaeger.spans
            if (span.name, span.resource["service.name"]) == (f"{kind} shop.v1.{event}", service)
            and span.attributes["cloudevents.event_subject"] == order
        )
        # Of an event that came again while the broker stopped there are several.
        return min(spans, key=lambda span: int(span.proto.start_time_unix_nano), default=None)

    async def ask() -> bool:
        found[:] = [span for event in EVENTS if (span := first(*event)) is not None]
        return len(found) == len(EVENTS) and paths(jaeger, found[0].proto.trace_id) >= ORDER

    found: list[ReceivedSpan] = []
    await comes_true(ask)
    placed, shipping, told, shipped, told_too = found
    assert paths(jaeger, placed.proto.trace_id) == ORDER
    for span, cause in ((shipping, placed), (told, placed), (told_too, shipped)):
        (link,) = span.proto.links
        assert (link.trace_id, link.span_id) == (cause.proto.trace_id, cause.proto.span_id)
        assert span.proto.trace_id != cause.proto.trace_id
        assert span.resource["service.instance.id"] == f"{span.resource['service.name']}-1"
    assert (shipped.proto.trace_id, shipped.proto.parent_span_id) == (shipping.proto.trace_id, shipping.proto.span_id)
    trace_id = placed.proto.trace_id.hex()

    async def ask_the_control_plane() -> bool:
        traces = json.loads(await shop.mesh("trace", "--service", "orders", "--json"))["traces"]
        return f"http://127.0.0.1:16686/trace/{trace_id}" in [trace["link"] for trace in traces]

    await comes_true(ask_the_control_plane)


def paths(jaeger: Receiver, trace: bytes) -> set[str]:
    """What a trace consists of: its spans with those above them, as ``service kind``."""
    spans = {span.proto.span_id: span for span in jaeger.spans if span.proto.trace_id == trace}

    def path(span: ReceivedSpan) -> str:
        own = f"{span.resource['service.name']} {span.kind}"
        parent = span.proto.parent_span_id
        return f"{path(spans[parent]) if parent in spans else parent.hex()} > {own}" if parent else own

    return set(map(path, spans.values()))


async def comes_true(ask: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await ask():
            await asyncio.sleep(0.05)


async def the_control_plane_tells(notifications: Mesh, shop: Shop) -> None:
    """What happens in the mesh arrives at a service that is subscribed to it."""
    seen = Seen()
    bus = notifications.events(
        broker=f"amqps://localhost:{shop.containers.broker_port}/{VIRTUAL_HOST}",
        credentials=shop.doors.file("notifications"),
        roots=shop.doors.roots,
        outbox=shop.directory / "outbox.sqlite",
    )
    bus.subscribe(event_pb2.PolicyApplied, group="audit")(seen)
    await started(bus)
    await shop.mesh("policy", "delete", "payments")
    await seen.count(1)
    assert seen.events[0].key == "payments"
    caller = seen.events[0].caller
    assert caller is not None
    assert caller.is_control_plane


async def operators_see_what_nobody_could_handle(notifications: Mesh, shop: Shop) -> None:
    """An event that shipping takes of orders alone, published by another."""
    await notifications.events().publish(OrderPlaced(order_id="free of charge"))
    found: list[dict[str, str]] = []

    async def ask() -> bool:
        found[:] = json.loads(await shop.mesh("events", "dead", "list", "shipping", "--json"))
        return bool(found)

    await comes_true(ask)
    assert [(each["publisher"], each["reason"]) for each in found] == [("notifications", "unauthorized")]
    assert "1 event deleted" in await shop.mesh("events", "dead", "purge", "shipping", found[0]["id"])
    queues = json.loads(await shop.mesh("events", "status", "shipping", "--json"))["queues"]
    depths = {each["queue"]: (each["events"], each["consumers"]) for each in queues}
    assert (depths[SHIPPING.queue], depths[SHIPPING.dead]) == ((0, 1), (0, 0))


async def strangers_are_refused(doors: Doors) -> None:
    orders = doors.credentials("orders")
    assert await doors.let_in(orders)
    assert not await doors.let_in(orders, tls=ssl.TLSVersion.TLSv1_2)
    assert not await doors.let_in(orders, tls=None)
    assert not await doors.let_in(orders, "/")
    assert not await doors.let_in(Credentials("shipping", orders.password))
    for vhost in (VIRTUAL_HOST, "/"):
        assert not await doors.let_in(Credentials("guest", "guest"), vhost)


async def services_have_their_own_names_alone(doors: Doors) -> None:
    async def publish_as_another(channel: AbstractChannel) -> None:
        exchange = await channel.get_exchange(EXCHANGE, ensure=False)
        await exchange.publish(aio_pika.Message(b""), "payments.shop.v1.OrderPlaced")

    async def bear_another_name(channel: AbstractChannel) -> None:
        exchange = await channel.get_exchange(EXCHANGE, ensure=False)
        await exchange.publish(aio_pika.Message(b"", user_id="payments"), "orders.shop.v1.OrderPlaced")

    async def read_of_another(channel: AbstractChannel) -> None:
        await (await channel.get_queue(SHIPPING.queue, ensure=False)).get()

    async def write_to_another(channel: AbstractChannel) -> None:
        exchange = await channel.get_exchange(SHIPPING.exchange, ensure=False)
        await exchange.publish(aio_pika.Message(b""), SHIPPING.queue)

    async def declare_for_another(channel: AbstractChannel) -> None:
        await channel.declare_queue("shipping.other")

    refused = {
        publish_as_another: "ACCESS_REFUSED",
        bear_another_name: "PRECONDITION_FAILED",
        read_of_another: "ACCESS_REFUSED",
        write_to_another: "ACCESS_REFUSED",
        declare_for_another: "ACCESS_REFUSED",
    }
    async with await doors.connect(doors.credentials("orders")) as connection:
        for attempt, why in refused.items():
            with pytest.raises(aio_pika.exceptions.AMQPError, match=why):
                await attempt(await connection.channel(on_return_raises=True))


@pytest.mark.timeout(180)
async def test_a_broker_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    """With prepare.py and a restart, as deploy/README.md says; a new password is the same."""
    box = Box(tmp_path / "box")
    prepare(box)
    old = write_as_the_version_before(box.directory / "secrets")
    box.give()
    async with AsyncExitStack() as stack:
        ports = stack.enter_context(ExitStack())
        supervisor = await stack.enter_async_context(Supervisor(tmp_path))
        (port,) = hold_ports(ports, 1)
        broker, doors = DeployedBroker(box, supervisor, ports, port), Doors(box, port)
        await broker.start()
        assert await doors.let_in(Credentials("orders", old))
        await broker.stop()

        await asyncio.to_thread(prepare, box)
        await broker.start()
        assert not await doors.let_in(Credentials("orders", old))
        for part in BROKER_USERS:
            assert await doors.let_in(doors.credentials(part))
        rights = {
            line[0]: line[1:]
            for line in await broker.control("list_permissions", "--no-table-headers", "-p", VIRTUAL_HOST)
        }
        for user in BROKER_USERS.values():
            may = permissions(user)
            assert rights[user] == [may.configure, may.write, may.read]
        assert [EXCHANGE, "topic"] in await broker.control(
            "list_exchanges", "--no-table-headers", "-p", VIRTUAL_HOST, "name", "type"
        )
        for user in ("inventory", "payments"):  # who has no user any more
            await broker.control("delete_user", user)
        assert {line[0] for line in await broker.control("list_users", "--no-table-headers")} == set(
            BROKER_USERS.values()
        )

        before = doors.credentials("shipping")
        doors.file("shipping").unlink()
        await broker.stop()
        await asyncio.to_thread(prepare, box)
        await broker.start()
        assert not await doors.let_in(before)
        assert await doors.let_in(doors.credentials("shipping"))
        assert await doors.let_in(doors.credentials("orders"))
