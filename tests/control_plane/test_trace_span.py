from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from control_plane.traces.span import Process, SpanEvent, SpanLink, pack, unpack
from tests.control_plane.spans import process, span

TEXT = st.text(st.characters(exclude_characters="\x1e\x1f"))


@given(st.dictionaries(TEXT, TEXT))
def test_attributes_are_unpacked_as_they_were_packed(attributes: dict[str, str]) -> None:
    # Nothing is told from one attribute without key and value.
    if attributes != {"": ""}:
        assert list(unpack(pack(attributes.items())).items()) == list(attributes.items())


@given(st.lists(st.tuples(st.text(), st.text())))
def test_what_separates_attributes_is_replaced_within_them(attributes: list[tuple[str, str]]) -> None:
    assert len(unpack(pack(attributes))) <= max(len(attributes), 0)


def test_everything_that_can_be_large_costs() -> None:
    bare = span(1)
    large = "x" * 1_000
    for rich in (
        span(1, name=large),
        span(1, method=large),
        span(1, error=large),
        span(1, attributes={"key": large}),
        span(1, attributes={large: ""}),
        span(1, events=(SpanEvent(1, large),)),
        span(1, events=(SpanEvent(1, "event", large),)),
    ):
        assert 990 <= rich.cost - bare.cost < 1_300
    assert span(1, links=(SpanLink("1" * 32, "2" * 16),)).cost - bare.cost > 200
    assert Process("orders", packed=large).cost - Process("orders").cost == 1_000


def test_a_name_that_is_the_method_s_too_costs_once() -> None:
    name = "shop.v1.OrderService/PlaceOrder"
    assert span(1, name=name, method=name).cost < span(1, name=name, method=name[:-1] + "s").cost


def test_a_process_is_verified_by_its_identity() -> None:
    assert process().verified
    assert not Process("orders", instance="orders-1").verified
    assert Process("orders", packed=pack({"host.name": "a"}.items())).attributes == {"host.name": "a"}
    assert SpanEvent(1, "retry", pack({"attempt": "2"}.items())).attributes == {"attempt": "2"}
