"""Who looks at which calls."""

from __future__ import annotations

from typing import Any

import pytest

from control_plane.telemetry.taps import MAX_HELD, MAX_TAPS, RENEWAL, Taps, TooManyTapsError
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.tap import TappedCall

PLACE = "/shop.v1.OrderService/PlaceOrder"


def call(code: str = "OK", took: float = 0.1, at: float = 1.0) -> TappedCall:
    return TappedCall(PLACE, code, took, 1, "a", "", "", at)


def test_processes_are_asked_for_the_calls_of_the_callers_that_somebody_looks_at() -> None:
    taps = Taps()
    all_calls = taps.open("orders", 0.0, duration=100.0)
    those_of_web = taps.open("stock", 0.0, caller="web", duration=10.0, codes=["INTERNAL"], slower_than=0.5, rate=3.0)
    assert [(service, order.id, left) for service, order, left in taps.orders("web", 5.0)] == [
        ("orders", all_calls.order.id, RENEWAL),
        ("stock", those_of_web.order.id, 5.0),
    ]
    assert [service for service, _, _ in taps.orders("jobs", 5.0)] == ["orders"]
    assert [service for service, _, _ in taps.orders("web", 10.0)] == ["orders"]
    assert len(taps) == 2
    assert taps.expire(10.0)
    assert not taps.expire(10.0)
    taps.close(all_calls)
    taps.close(all_calls)
    assert taps.orders("web", 11.0) == []


def test_what_was_asked_for_is_shown_to_who_asked_and_nothing_else() -> None:
    taps = Taps()
    tap = taps.open("orders", 0.0, codes=["OK"], caller="web")
    number = tap.order.id
    taps.shown("web", "web-1", [(number, "orders", call()), (number, "orders", call("INTERNAL"))])
    taps.shown("web", "web-1", [(number + 1, "orders", call()), (number, "stock", call())])
    taps.shown("jobs", "jobs-1", [(number, "orders", call())])
    shown, dropped = tap.take()
    assert [(each.caller, each.node_id, each.service, each.at) for each in shown] == [("web", "web-1", "orders", 1.0)]
    assert dropped == 0
    assert tap.take() == ([], 0)


def test_of_calls_that_wait_for_a_slow_operator_the_oldest_go() -> None:
    taps = Taps()
    tap = taps.open("orders", 0.0)
    taps.shown("web", "web-1", [(tap.order.id, "orders", call(at=float(at))) for at in range(MAX_HELD + 2)])
    shown, dropped = tap.take()
    assert (len(shown), shown[0].at, dropped) == (MAX_HELD, 2.0, 2)


def test_what_a_process_left_out_is_counted_for_who_looks_at_its_calls() -> None:
    taps = Taps()
    everybody, web, jobs = (taps.open("orders", 0.0, caller=caller) for caller in (None, "web", "jobs"))
    taps.shown("web", "web-1", [], dropped=3)
    assert [each.take() for each in (everybody, web, jobs)] == [([], 3), ([], 3), ([], 0)]


def test_taps_are_bounded() -> None:
    taps = Taps()
    last, *_ = [taps.open("orders", 0.0) for _ in range(MAX_TAPS)]
    with pytest.raises(TooManyTapsError, match="20 taps"):
        taps.open("orders", 0.0)
    taps.close(last)
    taps.open("orders", 0.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rate": 0.0},
        {"rate": float("nan")},
        {"rate": 1e9},
        {"duration": 0.0},
        {"duration": 1e9},
        {"slower_than": -1.0},
        {"slower_than": float("nan")},
        {"codes": ["NO_CODE"]},
    ],
)
def test_what_cannot_be_asked_for_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(arguments))):
        Taps().open("orders", 0.0, **arguments)
