"""Who may do what at the broker: TLS, credentials of each service, and rights to its own names alone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aio_pika
import pytest
from mesh.v1 import event_pb2
from shop.v1.events_pb2 import OrderPlaced, OrderShipped

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.events.topology import CONTROL_PLANE, EXCHANGE, OPERATOR, Group
from mesh_client.core.identity import Principal
from mesh_client.events.delivery import DETAIL
from mesh_client.events.settings import BrokerSettings, Credentials, broker_settings, read_credentials
from mesh_client.mesh import Mesh
from tests.certificates import TestAuthority
from tests.events.services import Seen, Services, started, until
from tests.integration.rabbitmq import RabbitMQ


async def test_wrong_credentials_are_said_and_mended_while_it_runs(services: Services, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    RabbitMQ.write_credentials(Credentials("orders", "wrong"), file)
    settings = services.settings("orders")
    orders = services.bus("orders", broker=BrokerSettings(settings.addresses, secure=False, credentials_file=file))
    await orders.publish(OrderPlaced(), mandatory=False)
    await until(lambda: "refuses the user" in orders.state().outbox.broker)  # type: ignore[union-attr]  # it is open
    RabbitMQ.write_credentials(Credentials("orders", services.broker.password("orders")), file)
    assert await orders.flush(20)


async def test_a_service_cannot_use_the_credentials_of_another(services: Services) -> None:
    bus = services.bus("orders", broker=services.settings("shipping"))
    bus.subscribe(OrderPlaced)(Seen())
    await bus.publish(OrderPlaced())
    await until(lambda: "'shipping''s, and this is 'orders'" in bus.state().outbox.broker)  # type: ignore[union-attr]  # it is open
    await bus.start()
    await until(lambda: "each service has a user" in bus.state().groups[0].broker)


async def test_a_missing_right_is_said_and_the_events_wait(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    """The user may do nothing in this virtual host any more."""
    rabbitmq, vhost = services.broker, services.vhost
    _, seen = await services.subscribed("shipping", OrderPlaced)
    rabbitmq.control("set_permissions", "-p", vhost, "orders", "^$", "^$", "^$")
    orders = services.bus("orders")
    with caplog.at_level(logging.WARNING, "mesh_client.events"):
        await orders.publish(OrderPlaced(order_id="1"))
        await until(lambda: "the broker refuses" in orders.state().outbox.broker)  # type: ignore[union-attr]  # it is open
    assert "mesh events credentials" in caplog.text
    rabbitmq.control("set_permissions", "-p", vhost, "orders", "^$", r"^mesh\.events$", r"^mesh\.events$")
    await seen.count(1)


@pytest.mark.parametrize("what", ["publish as another", "other's queue", "other's dead letters", "bind other's queue"])
async def test_a_service_has_rights_to_its_own_names_alone(services: Services, what: str) -> None:
    await services.subscribed("shipping", OrderPlaced)
    group = Group("shipping", "shipping")

    async def attempt(channel: aio_pika.abc.AbstractChannel) -> None:
        queue = await channel.get_queue(group.queue, ensure=False)
        if what == "publish as another":
            exchange = await channel.get_exchange(EXCHANGE, ensure=False)
            await exchange.publish(aio_pika.Message(b""), "payments.shop.v1.OrderPlaced")
        elif what == "other's queue":
            await queue.get()
        elif what == "other's dead letters":
            await (await channel.get_queue(group.dead, ensure=False)).get()
        else:
            await queue.bind(EXCHANGE, "#")

    async with await services.connect("orders") as connection:
        channel = await connection.channel(on_return_raises=True)
        with pytest.raises(aio_pika.exceptions.AMQPError, match="ACCESS_REFUSED"):
            await attempt(channel)


async def test_a_handler_takes_the_events_of_those_whom_it_names_alone(services: Services) -> None:
    bus, seen = services.bus("shipping"), Seen()
    bus.subscribe(OrderPlaced, publishers=["orders"])(seen)
    await started(bus)
    await services.bus("notifications").publish(OrderPlaced(order_id="free of charge"))
    await services.bus("orders").publish(OrderPlaced(order_id="paid"))
    await seen.count(1)
    counters = bus.state().groups[0].counters
    await until(lambda: counters.dead == {"unauthorized": 1})
    assert [event.message.order_id for event in seen.events] == ["paid"]
    [letter] = await services.dead("shipping")
    assert letter.headers[DETAIL] == "it is of 'notifications'; the group takes it of orders alone"
    with pytest.raises(InvalidValueError):
        services.bus("shipping", outbox="other").subscribe(OrderPlaced, publishers=["Orders"])


async def test_the_broker_can_keep_types_from_a_service(services: Services) -> None:
    """By the topic permission to read, which counts when a queue is bound."""
    rabbitmq, vhost = services.broker, services.vhost
    topic = (EXCHANGE, r"^shipping\..+$")
    await asyncio.to_thread(
        rabbitmq.control, "set_topic_permissions", "-p", vhost, "shipping", *topic, r"^[^.]+\.shop\.v1\.OrderPlaced$"
    )
    try:
        bus = services.bus("shipping")
        bus.subscribe(OrderShipped)(Seen())
        await bus.start()
        await until(lambda: "the broker refuses" in bus.state().groups[0].broker)
        await bus.close()
        await services.subscribed("shipping", OrderPlaced)
    finally:
        await asyncio.to_thread(rabbitmq.control, "set_topic_permissions", "-p", vhost, "shipping", *topic, ".*")


async def test_there_is_no_guest(services: Services) -> None:
    with pytest.raises(aio_pika.exceptions.AMQPConnectionError):
        await aio_pika.connect(
            host="127.0.0.1", port=services.broker.ports.amqp, login="guest", password="guest", virtualhost="/"
        )


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A broker that speaks TLS alone."""
    directory = tmp_path_factory.mktemp("secure")
    authority = TestAuthority()
    issued = authority.issue(Principal.service("mesh.internal", "rabbitmq"), dns_names=["localhost"])
    files = [directory / name for name in ("certificate.pem", "key.pem", "roots.pem")]
    for file, content in zip(files, (issued.chain, issued.key, authority.roots), strict=True):
        file.write_bytes(content)
    users = ["orders", "shipping", "notifications", CONTROL_PLANE]
    with RabbitMQ(directory / "broker", users, tls=(files[0], files[1], files[2])) as broker:
        yield broker


async def test_events_travel_by_tls_and_the_brokers_certificate_is_verified(
    secure: RabbitMQ, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(user: str, roots: Path | None, url: str = secure.url) -> BrokerSettings:
        found = broker_settings(url, secure.credentials(user), roots, insecure=False)
        assert found is not None
        return found

    assert secure.tls is not None
    _, _, roots = secure.tls
    shipping, seen = services.bus("shipping", broker=settings("shipping", roots)), Seen()
    shipping.subscribe(OrderPlaced)(seen)
    await started(shipping)
    distrustful = services.bus("orders", broker=settings("orders", None))
    await distrustful.publish(OrderPlaced())
    await until(lambda: "no certificate that is trusted" in distrustful.state().outbox.broker)  # type: ignore[union-attr]  # it is open
    await distrustful.close()
    elsewhere = secure.url.replace("localhost", "127.0.0.1")
    misled = services.bus("orders", broker=settings("orders", roots, elsewhere))
    await misled.start()
    await until(lambda: "no certificate that is trusted" in misled.state().outbox.broker)  # type: ignore[union-attr]  # it is open
    await misled.close()
    orders = services.bus("orders", broker=settings("orders", roots))
    await orders.start()
    await seen.count(1)


async def test_a_control_plane_tells_of_certificates_and_rotations_as_itself(secure: RabbitMQ, tmp_path: Path) -> None:
    assert secure.tls is not None
    options = ControlPlaneOptions(
        data_dir=tmp_path / "plane",
        broker=secure.url,
        broker_credentials=secure.credentials(CONTROL_PLANE),
        broker_roots=secure.tls[2],
    )
    plane = ControlPlane(options)
    await plane.start()
    authority, seen = plane.authority, Seen()
    assert authority is not None

    async def client(service: str) -> Mesh:
        token = await authority.create_token(service, 600.0, 1, "spiffe://mesh.internal/operator/test")
        mesh = mesh_client.connect(
            plane.address,
            service=service,
            enrolment=plane.enrolment_address,
            token=token.text,
            cache_dir="",
            insecure=False,
        )
        return await stack.enter_async_context(mesh)

    try:
        async with AsyncExitStack() as stack:
            bus = (await client("notifications")).events(
                broker=secure.url,
                credentials=secure.credentials("notifications"),
                roots=secure.tls[2],
                outbox=tmp_path / "outbox.sqlite",
            )
            bus.subscribe(event_pb2.CertificateIssued)(seen)
            bus.subscribe(event_pb2.RootRotated)(seen)
            await started(bus)
            await client("web")
            await authority.add_root()
            await until(lambda: any(isinstance(event.message, event_pb2.RootRotated) for event in seen.events))
            await until(lambda: any(event.key == "web" for event in seen.events))
        rotated = next(each for each in seen.events if isinstance(each.message, event_pb2.RootRotated))
        assert (rotated.message.step, len(rotated.message.roots)) == ("add", 2)
        issued = {event.message.spiffe_id: event for event in seen.events if event.key == "web"}
        event = issued["spiffe://mesh.internal/service/web"]
        assert not event.message.renewal
        assert event.message.expires.seconds > 0
        assert event.source == "spiffe://mesh.internal/mesh/control-plane"
        assert event.caller is not None
        assert event.caller.is_control_plane
    finally:
        await plane.stop()


@pytest.mark.parametrize(
    ("broker", "insecure", "message"),
    [
        ("amqp://localhost", False, "is plaintext"),
        ("http://localhost", True, "expected amqps://host:port/vhost"),
        ("amqps://user:secret@localhost", True, "it holds a user or password"),
        ("amqps://one,amqp://two", True, "TLS to all nodes or to none"),
        ("amqps://one:port", True, "expected amqps://host:port/vhost"),
        ("amqps://one", True, "MESH_BROKER_CREDENTIALS: expected the file"),
    ],
)
def test_wrong_settings_are_refused(broker: str, insecure: bool, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_BROKER_CREDENTIALS", raising=False)
    with pytest.raises(ConfigError, match=message) as caught:
        broker_settings(broker, None, None, insecure=insecure)
    assert "secret" not in str(caught.value)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert broker_settings(None, None, None, insecure=False) is None
    monkeypatch.setenv("MESH_BROKER", "amqps://one:1/shop, amqps://[::1]")
    monkeypatch.setenv("MESH_BROKER_CREDENTIALS", str(tmp_path / "credentials"))
    monkeypatch.setenv("MESH_BROKER_ROOTS", str(tmp_path / "roots"))
    settings = broker_settings(None, None, None, insecure=False)
    assert settings is not None
    assert settings.addresses == (("one", 1, "shop"), ("::1", 5671, "/"))
    assert settings.url(1, Credentials("orders", "a/b")) == "amqps://orders:a%2Fb@[::1]:5671/%2F"
    with pytest.raises(ConfigError, match="holds no certificates"):
        settings.context()


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (None, 0o600, "cannot be read"),
        ("orders\nsecret\n", 0o644, "chmod 600"),
        ("orders", 0o600, "two lines"),
        ("orders\nsecret\nmore\n", 0o600, "two lines"),
        ("guest\nguest\n", 0o600, "names guest"),
    ],
)
def test_credentials_are_refused_when_they_are_unsafe_or_none(
    tmp_path: Path, text: str | None, mode: int, message: str
) -> None:
    file = tmp_path / "credentials"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(ConfigError, match=message) as caught:
        read_credentials(file)
    assert "secret" not in str(caught.value)


def test_credentials_do_not_show_their_password() -> None:
    assert "secret" not in repr(Credentials("orders", "secret"))


def test_users_of_the_mesh_itself() -> None:
    assert {CONTROL_PLANE, OPERATOR} == {"mesh:control-plane", "mesh:operator"}
