"""Calls that an operator looks at: those that were asked for, no more than was asked, and only while it was."""

from __future__ import annotations

from typing import Any

import pytest

from mesh_client.core import shortcut
from mesh_client.core.call import Attempt, AttemptFailure, Call, Pause
from mesh_client.core.model import StatusCode
from mesh_client.core.service import Service
from mesh_client.core.tap import MAX_HELD, ServiceTap, TapOrder, TappedCall
from tests.core.worlds import service

METHOD = "/shop.v1.OrderService/PlaceOrder"
DOWN = AttemptFailure(StatusCode.UNAVAILABLE, "connection refused")


def order(number: int = 1, **fields: Any) -> TapOrder:
    given = {"method": "*", "codes": frozenset(), "slower_than": 0.0, "rate": 1000.0, "until": 60.0, **fields}
    return TapOrder(number, **given)


def tapped(world: Service, *orders: TapOrder) -> ServiceTap:
    tap = ServiceTap()
    tap.order(orders, 0.0)
    world.tapped(tap)
    return tap


def call(code: str = "OK", took: float = 0.1, method: str = METHOD, at: float = 1.0) -> TappedCall:
    return TappedCall(method, code, took, 1, "a", "", "", at)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, True),
        ({"method": "shop.v1.OrderService/*"}, True),
        ({"method": "shop.v1.OrderService/GetOrder"}, False),
        ({"codes": frozenset({"OK"})}, True),
        ({"codes": frozenset({"UNAVAILABLE", "INTERNAL"})}, False),
        ({"slower_than": 0.1}, True),
        ({"slower_than": 0.2}, False),
    ],
)
def test_an_order_says_which_calls_it_is_for(fields: dict[str, Any], wanted: bool) -> None:
    assert order(**fields).wants(call()) is wanted


def test_a_tapped_service_shows_calls_however_they_end() -> None:
    world = service("a", "b", retry={"max_attempts": 2})
    tap = tapped(world, order())
    good = Call(world, METHOD)
    good.begin(1.0)
    good.succeeded(1.5)
    bad = Call(world, METHOD)
    bad.trace_id = "c" * 32
    bad.begin(2.0)
    assert isinstance(bad.failed(DOWN, 2.5), Pause)
    assert isinstance(bad.resumed(2.75), Attempt)
    bad.failed(DOWN, 3.0)
    given_up = Call(world, METHOD)
    given_up.begin(4.0)
    given_up.cancelled(5.0)
    between = Call(world, METHOD)
    between.begin(6.0)
    between.failed(DOWN, 6.5)
    between.cancelled(6.6)
    Call(world, METHOD, deadline=1.0).begin(7.0)
    shown = [each for _, each in tap.take()]
    assert [(each.code, each.attempts, round(each.took, 3), each.details, each.trace_id) for each in shown] == [
        ("OK", 1, 0.5, "", ""),
        ("UNAVAILABLE", 2, 1.0, "connection refused", "c" * 32),
        ("CANCELLED", 1, 1.0, "", ""),
        ("CANCELLED", 1, 0.6, "connection refused", ""),
        ("DEADLINE_EXCEEDED", 0, 0.0, "", ""),
    ]
    assert all(each.endpoint_id in {"a", "b"} for each in shown[:4])
    assert shown[4].endpoint_id == ""
    assert tap.take() == []


def test_while_a_service_is_tapped_calls_take_the_long_way_and_after_it_the_short_one() -> None:
    world = service("a")
    Call(world, METHOD).begin(0.0)
    assert shortcut.begin(world, METHOD, None, 0.0) is not None
    tapped(world, order())
    assert shortcut.begin(world, METHOD, None, 0.0) is None
    Call(world, METHOD).begin(0.0)
    assert shortcut.begin(world, METHOD, None, 0.0) is None
    world.tapped(None)
    Call(world, METHOD).begin(0.0)
    assert shortcut.begin(world, METHOD, None, 0.0) is not None


def test_an_order_ends_by_itself() -> None:
    tap = ServiceTap()
    tap.order([order(until=10.0), order(2, until=0.0)], 0.0)
    tap.ended(call(at=9.9))
    tap.ended(call(at=10.0))
    assert len(tap.take()) == 1
    assert tap
    tap.order([order(until=10.0)], 9.9)
    assert tap
    tap.order([order(until=10.0)], 10.0)
    assert not tap


def test_each_order_has_a_rate_which_a_renewal_does_not_fill_again() -> None:
    tap = ServiceTap()
    tap.order([order(rate=2.0), order(2)], 0.0)
    for _ in range(5):
        tap.ended(call(at=0.0))
    assert [number for number, _ in tap.take()].count(1) == 2
    tap.order([order(rate=2.0, until=120.0)], 0.0)
    tap.ended(call(at=0.0))
    assert tap.take() == []
    tap.ended(call(at=0.5))
    assert len(tap.take()) == 1
    assert tap.dropped == 4


def test_calls_that_are_not_taken_are_bounded() -> None:
    tap = ServiceTap()
    tap.order([order(rate=1e6)], 0.0)
    for _ in range(MAX_HELD + 3):
        tap.ended(call())
    assert len(tap.take()) == MAX_HELD
    assert tap.dropped == 3
