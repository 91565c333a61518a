"""Counters by step: sums are exact, whatever comes late, and nothing is kept for longer than the window."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.telemetry.stats import Stats
from control_plane.telemetry.timeline import (
    ATTEMPTS,
    CODES,
    FIRST_BUCKET,
    PEAK,
    STEP,
    STEPS,
    WINDOW,
    Counters,
    Timeline,
    add_up,
    spread,
    step_of,
)
from mesh_client.core.tally import Tally

OK, UNAVAILABLE, CANCELLED, NOT_FOUND = (CODES[name] for name in ("OK", "UNAVAILABLE", "CANCELLED", "NOT_FOUND"))


def total(line: Timeline, first: int = 0) -> Counters:
    counters: Counters = {}
    add_up(counters, (each for _, each in line.steps(first)))
    return counters


_ADDS = st.lists(st.tuples(st.integers(0, 20), st.dictionaries(st.integers(0, 5), st.integers(1, 1000), max_size=4)))


@given(_ADDS, st.integers(0, 21))
def test_steps_hold_what_was_added_to_them_in_whatever_order(
    adds: list[tuple[int, dict[int, int]]], first: int
) -> None:
    line, expected = Timeline(), dict[int, Counters]()
    for step, counters in adds:
        line.add(step, counters)
        add_up(expected.setdefault(step, {}), [counters])
    held = {step: dict(counters) for step, counters in line.steps(first)}
    assert held == {step: counters for step, counters in expected.items() if counters and step >= first}
    assert line.expire(first) == (not held)
    assert {step: dict(counters) for step, counters in line.steps(0)} == held
    assert line.expire(100)


def test_the_largest_value_of_a_peak_counts_and_absurd_counts_are_capped() -> None:
    line = Timeline()
    line.add(1, {PEAK: 3})
    line.add(1, {PEAK: 2})
    line.add(2, {PEAK: 7, OK: 10**30})
    line.add(3, {PEAK: 1})
    line.add(1, {PEAK: 5})
    assert total(line, 1)[PEAK] == 7
    assert {step: counters[PEAK] for step, counters in line.steps(0)} == {1: 5, 2: 7, 3: 1}
    assert total(line)[OK] == 2**63


@given(
    st.dictionaries(st.integers(0, 5), st.integers(1, 10**6), min_size=1),
    st.floats(WINDOW, 1e7),
    st.floats(0.0, WINDOW - STEP),
)
def test_what_grew_within_the_window_is_shared_out_without_a_rest(
    counters: dict[int, int], now: float, interval: float
) -> None:
    parts = list(spread(counters, now, interval))
    shared: Counters = {}
    add_up(shared, (part for _, part in parts))
    assert shared == counters
    assert all(step_of(now - interval) <= step <= step_of(now) for step, _ in parts)


def test_each_step_gets_its_part_by_time_and_what_is_too_old_is_left_out() -> None:
    assert list(spread({OK: 10}, 107.0, 5.0)) == [(10, {OK: 10})]
    assert list(spread({OK: 10}, 102.0, 5.0)) == [(9, {OK: 6}), (10, {OK: 4})]
    assert list(spread({OK: 10, PEAK: 3}, 102.0, 5.0)) == [(9, {OK: 6, PEAK: 3}), (10, {OK: 4, PEAK: 3})]
    assert list(spread({OK: 1}, 100.0, 0.0)) == [(10, {OK: 1})]
    day = list(spread({OK: 86_400_000}, 1e6 + 9.0, 86_400.0))
    assert len(day) == STEPS
    assert sum(part[OK] for _, part in day) == pytest.approx(1000 * WINDOW, rel=0.02)


def test_stats_say_how_calls_went() -> None:
    counters = {OK: 90, NOT_FOUND: 5, UNAVAILABLE: 5, CANCELLED: 50, ATTEMPTS: 170}
    tally = Tally()
    for milliseconds in range(1, 151):
        tally.succeeded(milliseconds / 1000)
    counters |= {FIRST_BUCKET + bucket: count for bucket, count in enumerate(tally.buckets)}
    stats = Stats.of(counters, 10.0)
    assert (stats.count, stats.rate, stats.success_rate) == (150, 15.0, 0.95)
    assert (stats.failed, stats.retries) == (5, 20)
    assert stats.codes == {"OK": 90, "NOT_FOUND": 5, "UNAVAILABLE": 5, "CANCELLED": 50}
    assert stats.p50 == pytest.approx(0.075, rel=0.2)
    assert stats.p99 == pytest.approx(0.149, rel=0.2)


def test_stats_of_nothing_say_nothing() -> None:
    assert Stats.of({}, 0.0) == Stats()
    given_up = Stats.of({CANCELLED: 3}, 1.0)
    assert (given_up.count, given_up.success_rate) == (3, None)
