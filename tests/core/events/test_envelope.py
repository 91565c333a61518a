"""CloudEvents in AMQP headers, names at the broker, and delays."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.events.envelope import CONTENT_TYPE, Envelope, check_key, check_type
from mesh_client.core.events.errors import DeadReason, Reject, UnusableEventError
from mesh_client.core.events.retry import RetrySchedule
from mesh_client.core.events.topology import (
    CONTROL_PLANE,
    EXCHANGE,
    OPERATOR,
    Group,
    binding_key,
    check_member,
    permissions,
    routing_key,
)

EVENT = Envelope("1", "spiffe://mesh.internal/service/orders", "shop.v1.OrderPlaced", 1.5, "0123456789ab", "k")


def test_attributes_are_as_the_binding_for_amqp_has_them() -> None:
    assert EVENT.headers() == {
        "cloudEvents:specversion": "1.0",
        "cloudEvents:id": "1",
        "cloudEvents:source": "spiffe://mesh.internal/service/orders",
        "cloudEvents:type": "shop.v1.OrderPlaced",
        "cloudEvents:time": "1970-01-01T00:00:01.500000Z",
        "cloudEvents:dataschema": "protobuf:shop.v1.OrderPlaced#0123456789ab",
        "cloudEvents:partitionkey": "k",
    }


@given(st.floats(0, 4e9), st.text(min_size=1, max_size=40), st.sampled_from(["", "0123456789ab"]))
def test_what_is_written_is_read(time: float, id: str, schema: str) -> None:
    event = Envelope(id, "mesh:orders", "shop.v1.OrderPlaced", time, schema, "")
    read = Envelope.parse({**event.headers(), "other": 5}, CONTENT_TYPE)
    assert read.time == pytest.approx(time, abs=1e-5)
    assert (read.id, read.source, read.type, read.schema, read.key) == (id, "mesh:orders", event.type, schema, "")


def test_both_prefixes_are_read_and_what_is_missing_or_odd_is_not_believed() -> None:
    underscored = {name.replace(":", "_", 1): value for name, value in EVENT.headers().items()}
    assert Envelope.parse(underscored, CONTENT_TYPE) == EVENT
    for time in ("yesterday", "2026-01-01T00:00:00"):
        assert Envelope.parse({**EVENT.headers(), "cloudEvents:time": time}, CONTENT_TYPE).time == 0.0
    for schema in ("http://elsewhere", "protobuf:shop.v1.Other#0123456789ab"):
        assert Envelope.parse({**EVENT.headers(), "cloudEvents:dataschema": schema}, CONTENT_TYPE).schema == ""


@pytest.mark.parametrize(
    ("headers", "content_type", "detail"),
    [
        ({"cloudEvents:type": 5}, CONTENT_TYPE, "cloudEvents:type is missing or no text"),
        ({"cloudEvents:specversion": "0.3"}, CONTENT_TYPE, "CloudEvents '0.3', not 1.x"),
        ({}, None, "content type 'None'"),
        ({"cloudEvents:id": "i" * 200}, CONTENT_TYPE, "too long"),
    ],
)
def test_what_is_no_event_of_ours_is_refused(headers: dict[str, object], content_type: str, detail: str) -> None:
    with pytest.raises(UnusableEventError, match=detail) as caught:
        Envelope.parse({**EVENT.headers(), **headers}, content_type)
    assert caught.value.reason is DeadReason.NOT_AN_EVENT


def test_keys_and_types_are_bounded() -> None:
    assert (check_key(""), check_key("order 1"), check_type("shop.v1.Order")) == ("", "order 1", "shop.v1.Order")
    for key in ("k" * 256, "a\nb"):
        with pytest.raises(InvalidValueError, match="key"):
            check_key(key)
    for name in ("Order", "shop..Order", "shop.v1." + "O" * 200):
        with pytest.raises(InvalidValueError, match="message type"):
            check_type(name)


def test_rejections_say_why() -> None:
    assert Reject("no such order").reason is DeadReason.REJECTED
    assert str(Reject("no such order")) == "rejected: no such order"


def test_delays_grow_and_end() -> None:
    schedule = RetrySchedule((0.5, 2.0))
    assert (schedule.attempts, schedule.milliseconds) == (3, (500, 2000))
    assert [schedule.level(attempt) for attempt in (1, 2, 3, 4)] == [0, 1, None, None]
    assert RetrySchedule(()).level(1) is None
    for delays in ((2.0, 1.0), (0.0,), (1e6,), (1.0,) * 13):
        with pytest.raises(ConfigError, match="retry delays"):
            RetrySchedule(delays)


def test_a_groups_names_and_queues() -> None:
    group = Group("shipping", "labels")
    assert (group.exchange, group.queue, group.dead) == ("shipping.labels", "shipping.labels", "shipping.labels.dead")
    assert (routing_key("orders", "shop.v1.A"), binding_key("shop.v1.A")) == ("orders.shop.v1.A", "*.shop.v1.A")
    dead, *retries, own = group.queues([500, 500, 2000], 7, ordered=True)
    assert [each.name for each in retries] == ["shipping.labels.retry.500ms", "shipping.labels.retry.2000ms"]
    assert retries[0].arguments["x-message-ttl"] == 500
    assert retries[0].arguments["x-dead-letter-routing-key"] == own.name == group.queue
    assert own.arguments["x-dead-letter-routing-key"] == dead.name == group.dead
    assert (own.arguments["x-delivery-limit"], own.arguments["x-single-active-consumer"]) == (7, True)
    assert {each.arguments["x-queue-type"] for each in (dead, *retries, own)} == {"quorum"}


@pytest.mark.parametrize(
    ("service", "group"), [("Shipping", "a"), ("a.b", "a"), ("shipping", "a.b"), ("mesh", "events")]
)
def test_names_that_could_be_anothers_are_refused(service: str, group: str) -> None:
    with pytest.raises(InvalidValueError):
        Group(service, group)


def test_who_may_what() -> None:
    def may(pattern: str, name: str) -> bool:
        return re.search(pattern, name) is not None

    orders = permissions("orders")
    assert may(orders.configure, "orders.orders")
    assert not any(
        may(orders.configure, name) for name in (EXCHANGE, "shipping.shipping", "orders2.x", "orders", "x.orders.y")
    )
    assert may(orders.write, EXCHANGE)
    assert may(orders.read, EXCHANGE)
    assert not may(orders.read, "shipping.shipping.dead")
    assert may(orders.topic, "orders.shop.v1.OrderPlaced")
    assert not may(orders.topic, "payments.shop.v1.OrderPlaced")
    plane = permissions(CONTROL_PLANE)
    assert (may(plane.write, EXCHANGE), may(plane.write, "orders.orders"), may(plane.read, EXCHANGE)) == (
        True,
        False,
        False,
    )
    assert may(plane.topic, f"{CONTROL_PLANE}.mesh.v1.EndpointUp")
    operator = permissions(OPERATOR)
    assert may(operator.read, "orders.orders.dead")
    assert may(operator.write, "orders.orders")
    assert not may(operator.configure, "orders.orders")
    for name in ("mesh", "Orders", "mesh:other"):
        with pytest.raises(InvalidValueError):
            permissions(name)
    assert check_member("orders") == "orders"
