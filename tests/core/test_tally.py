"""What is counted of calls: nothing lost, nothing twice, and bounded whatever the application calls."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.call import Action, Attempt, AttemptFailure, Call, Pause
from mesh_client.core.errors import Reason
from mesh_client.core.model import StatusCode
from mesh_client.core.tally import BOUNDS, GONE, MAX_GONE, MAX_METHODS, OTHER, Tally, TallyBook, percentile
from tests.core.worlds import activate, endpoint, service

METHOD = "/shop.v1.OrderService/PlaceOrder"
DOWN = AttemptFailure(StatusCode.UNAVAILABLE, "connection refused")


def test_bounds_grow_from_fifty_microseconds_to_more_than_a_minute() -> None:
    assert BOUNDS[0] == 50e-6
    assert BOUNDS[-1] == pytest.approx(104.8576)
    assert all(later / earlier == pytest.approx(2**0.25) for earlier, later in itertools.pairwise(BOUNDS))


@given(st.lists(st.tuples(st.sampled_from(["", "UNAVAILABLE", "NOT_FOUND"]), st.floats(0.0, 200.0)), max_size=50))
def test_a_tally_counts_each_end_once(ends: list[tuple[str, float]]) -> None:
    tally = Tally()
    for code, seconds in ends:
        if code:
            tally.failed(code, seconds)
        else:
            tally.succeeded(seconds)
    assert tally.count == sum(tally.buckets) == len(ends)
    assert Counter(tally.failures) == Counter(code for code, _ in ends if code)
    assert tally.seconds == pytest.approx(sum(seconds for _, seconds in ends))


@given(st.lists(st.floats(50e-6, 100.0), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_percentiles_are_at_most_a_bucket_above_the_true_ones(durations: list[float], share: float) -> None:
    tally = Tally()
    for seconds in durations:
        tally.succeeded(seconds)
    found = percentile(tally.buckets, share)
    ordered = sorted(durations)
    true = next(seconds for number, seconds in enumerate(ordered, 1) if number >= share * len(ordered))
    assert found is not None
    assert true <= found <= true * 2**0.25 * (1 + 1e-9)


def test_percentiles_of_nothing_and_of_what_is_beyond_the_bounds() -> None:
    tally = Tally()
    assert percentile(tally.buckets, 0.5) is None
    tally.succeeded(1e6)
    assert percentile(tally.buckets, 0.5) == float("inf")


def test_a_tally_takes_another_in() -> None:
    one, other = Tally(), Tally()
    one.failed("UNAVAILABLE", 0.1)
    other.failed("UNAVAILABLE", 0.2)
    other.succeeded(0.3)
    one.add(other)
    assert (one.ok, one.failures, one.count, sum(one.buckets)) == (1, {"UNAVAILABLE": 2}, 3, 3)
    assert one.seconds == pytest.approx(0.6)
    one.add(other, -1)
    assert (one.ok, one.failures, one.count, sum(one.buckets)) == (0, {"UNAVAILABLE": 1}, 1, 1)


def test_methods_beyond_the_bound_share_one_tally() -> None:
    book = TallyBook()
    for number in range(MAX_METHODS):
        assert book.known(f"/s/M{number}") == f"/s/M{number}"
    assert book.known("/s/OneTooMany") == OTHER
    assert book.known("/s/M3") == "/s/M3"
    assert [TallyBook().known(name) for name in ("no slash", "/with space", "/" + "x" * 256)] == [OTHER] * 3
    assert book.tally("a", "/s/Another") is book.tally("a", "/s/YetAnother") is book.of("a")[OTHER]


def test_endpoints_that_left_long_ago_are_counted_together() -> None:
    book = TallyBook()
    for number in range(MAX_GONE + 10):
        book.tally(f"e{number}", METHOD).succeeded(0.1)
    book.keep(["e3"])
    held = dict(book)
    assert len(held) == MAX_GONE + 2
    assert {"e3", GONE, "e10", f"e{MAX_GONE + 9}"} <= held.keys()
    assert "e4" not in held
    assert held[GONE][METHOD].ok == 9
    book.keep(["e3"])
    assert sum(tally.ok for _, methods in book for tally in methods.values()) == MAX_GONE + 10


def test_an_endpoint_that_comes_back_goes_on_where_it_was() -> None:
    world = service("a")
    call = Call(world, METHOD)
    call.begin(0.0)
    call.succeeded(0.1)
    activate(world, endpoint("b"))
    activate(world, endpoint("a"))
    (node,) = world.nodes
    assert world.tally(node, METHOD).ok == 1


def test_a_call_that_is_repeated_counts_its_attempts_and_once_as_a_whole() -> None:
    world = service("a", "b")
    call = Call(world, METHOD)
    call.begin(1.0)
    paused = call.failed(DOWN, 1.1)
    assert isinstance(paused, Pause)
    assert isinstance(call.resumed(1.2), Attempt)
    call.succeeded(1.5)
    attempts = [tally for _, methods in world.tallies for tally in methods.values()]
    assert sorted((tally.ok, tuple(tally.failures.items())) for tally in attempts) == [
        (0, (("UNAVAILABLE", 1),)),
        (1, ()),
    ]
    assert (world.repeated[METHOD].ok, world.repeated[METHOD].seconds) == (1, pytest.approx(0.5))
    assert not world.failed_calls


def test_a_call_that_fails_for_good_is_counted_by_status_and_reason() -> None:
    world = service("a", "b", retry={"max_attempts": 2})
    call = Call(world, METHOD)
    call.begin(0.0)
    call.failed(DOWN, 0.1)
    call.resumed(0.2)
    call.failed(DOWN, 0.3)
    assert world.failed_calls == {(METHOD, "UNAVAILABLE", Reason.ATTEMPTS_FAILED): 1}
    assert world.repeated[METHOD].failures == {"UNAVAILABLE": 1}
    Call(service_without_endpoints := service(), METHOD).begin(0.0)
    assert service_without_endpoints.failed_calls == {(METHOD, "UNAVAILABLE", Reason.NO_ENDPOINTS): 1}


def test_a_call_that_is_given_up_counts_as_cancelled() -> None:
    world = service("a")
    call = Call(world, METHOD)
    call.begin(0.0)
    call.cancelled(0.4)
    (node,) = world.nodes
    assert world.tally(node, METHOD).failures == {"CANCELLED": 1}
    assert world.tally(node, METHOD).seconds == pytest.approx(0.4)


_END = st.sampled_from(["ok", "down", "lost", "cancel"])


@given(st.lists(st.lists(_END, min_size=1, max_size=3), max_size=12), st.lists(st.booleans(), max_size=5))
def test_whole_calls_are_counted_exactly_whatever_their_attempts_came_to(
    scripts: list[list[str]], refused: list[bool]
) -> None:
    world = service("a", "b", "c", outlier_detection={"enabled": False}, circuit_breaker={"enabled": False})
    ends: Counter[str] = Counter()
    took = now = 0.0
    seen = [Tally()]

    def look() -> None:
        """Whoever looks at any moment sees counters that have grown, and nothing of calls that are not over."""
        calls = world.calls_by_method().get(METHOD, Tally())
        assert all(later >= earlier for earlier, later in zip(seen[-1].buckets, calls.buckets, strict=True))
        assert all(calls.failures.get(code, 0) >= count for code, count in seen[-1].failures.items())
        assert calls.count == sum(calls.buckets)
        seen.append(calls)

    for script in scripts:
        call, begun, end = Call(world, METHOD), now, ""
        action: Action = call.begin(now)
        while isinstance(action, Attempt):
            look()
            assert seen[-1].count == ends.total()
            now += 0.5
            end = script.pop(0) if script else "ok"
            if end == "ok":
                call.succeeded(now)
                break
            if end == "cancel":
                call.cancelled(now)
                break
            action = call.failed(DOWN if end == "down" else AttemptFailure(StatusCode.DATA_LOSS, received=True), now)
            if isinstance(action, Pause):
                now += 0.25
                if script and script[0] == "cancel" and script.pop(0):
                    end = "cancel"
                    call.cancelled(now)
                    break
                action = call.resumed(now)
        ends[{"ok": "OK", "down": "UNAVAILABLE", "lost": "DATA_LOSS"}.get(end, "CANCELLED")] += 1
        took += now - begun
    activate(world)
    for _ in refused:
        Call(world, METHOD).begin(now)
        ends["UNAVAILABLE"] += 1
    look()
    calls = seen[-1]
    assert +Counter({"OK": calls.ok, **calls.failures}) == +ends
    assert calls.seconds == pytest.approx(took)
