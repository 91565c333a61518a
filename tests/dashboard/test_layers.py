"""The picture of who calls whom: deterministic, everybody once, callers before those whom they call."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control_plane.dashboard.layers import layers

NAMES = st.sampled_from("abcdefgh")
CALLS = st.lists(st.tuples(NAMES, NAMES), max_size=20)


def test_callers_stand_before_those_whom_they_call() -> None:
    shop = [("web", "orders"), ("orders", "payments"), ("orders", "inventory"), ("stock", "inventory")]
    assert layers(["alone"], shop) == [["alone", "stock", "web"], ["orders"], ["inventory", "payments"]]


def test_nothing_is_an_empty_picture() -> None:
    assert layers([], []) == []


def test_a_ring_is_cut_where_it_comes_back_to_its_entry() -> None:
    assert layers([], [("a", "b"), ("b", "c"), ("c", "a")]) == [["a"], ["b"], ["c"]]
    assert layers([], [("web", "c"), ("c", "a"), ("a", "c")]) == [["web"], ["c"], ["a"]]


def test_who_calls_itself_stands_where_it_would_anyway() -> None:
    assert layers([], [("a", "a"), ("a", "b")]) == [["a"], ["b"]]


def test_lines_do_not_cross_where_they_need_not() -> None:
    assert layers([], [("a", "z"), ("b", "y")]) == [["a", "b"], ["z", "y"]]


@given(st.lists(NAMES), CALLS)
def test_everybody_stands_once_whatever_the_order(services: list[str], calls: list[tuple[str, str]]) -> None:
    made = layers(services, calls)
    assert sorted(name for layer in made for name in layer) == sorted(
        {*services, *(name for call in calls for name in call)}
    )
    assert all(made), "no layer is empty"
    assert layers(reversed(services), reversed(calls)) == made


@given(CALLS)
def test_without_rings_every_caller_stands_before_those_whom_it_calls(calls: list[tuple[str, str]]) -> None:
    downwards = [(min(call), max(call)) for call in calls if call[0] != call[1]]
    depth = {name: number for number, layer in enumerate(layers([], downwards)) for name in layer}
    assert all(depth[caller] < depth[called] for caller, called in downwards)
