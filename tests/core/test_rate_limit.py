from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.policy import RateLimit, RateLimitScope
from mesh_client.core.rate_limit import ADMITTED, MAX_METHODS, ConcurrencyGate, RateLimiter, TokenBucket


def test_a_full_bucket_admits_its_burst_then_says_when_to_come_back() -> None:
    bucket = TokenBucket(2.0, 3, 10.0)
    assert [bucket.take(10.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.take(10.0) == pytest.approx(0.5)
    assert bucket.take(10.25) == pytest.approx(0.25)
    assert bucket.take(10.5) == 0.0


def test_a_refusal_costs_no_token() -> None:
    bucket = TokenBucket(1.0, 1, 0.0)
    bucket.take(0.0)
    for _ in range(100):
        assert bucket.take(0.5) == pytest.approx(0.5)
    assert bucket.take(1.0) == 0.0


def test_idle_time_fills_the_bucket_no_further_than_its_burst() -> None:
    bucket = TokenBucket(10.0, 2, 0.0)
    assert [bucket.take(1000.0) == 0.0 for _ in range(3)] == [True, True, False]


@given(
    rate=st.floats(0.1, 1e5),
    burst=st.integers(1, 50),
    start=st.floats(0.0, 1e6),
    waits=st.lists(st.floats(0.0, 1.0), max_size=100),
)
def test_no_interval_admits_more_than_burst_and_rate_allow(
    rate: float, burst: int, start: float, waits: list[float]
) -> None:
    bucket = TokenBucket(rate, burst, start)
    now = start
    admitted = 0
    for wait in waits:
        now += wait / rate
        admitted += bucket.take(now) == 0.0
        assert admitted <= burst + (now - start) * rate + 1e-3


@given(rate=st.floats(0.001, 1e4), burst=st.integers(1, 5), start=st.floats(0.0, 1e5))
def test_whoever_waits_as_told_is_admitted(rate: float, burst: int, start: float) -> None:
    bucket = TokenBucket(rate, burst, start)
    now = start
    for _ in range(20):
        wait = bucket.take(now)
        if wait:
            now += wait
            assert bucket.take(now) == 0.0


def test_without_rules_everything_is_admitted() -> None:
    assert RateLimiter([], 0.0).take("web", "/a.B/C", 0.0) is ADMITTED


def test_each_caller_has_its_own_bucket() -> None:
    limiter = RateLimiter([RateLimit(requests_per_second=1.0)], 0.0)
    assert limiter.take("web", "/a.B/C", 0.0) is ADMITTED
    assert limiter.take("jobs", "/a.B/C", 0.0) is ADMITTED
    refused = limiter.take("web", "/a.B/D", 0.0)
    assert refused.limit == RateLimit(requests_per_second=1.0)
    assert refused.retry_after == pytest.approx(1.0)


def test_callers_share_the_bucket_of_a_rule_for_all() -> None:
    limiter = RateLimiter([RateLimit(requests_per_second=1.0, scope=RateLimitScope.ALL)], 0.0)
    assert limiter.take("web", "/a.B/C", 0.0).limit is None
    assert limiter.take("jobs", "/a.B/C", 0.0).limit is not None


def test_the_first_rule_that_matches_decides() -> None:
    special = RateLimit(method="a.B/C", requests_per_second=100.0)
    general = RateLimit(method="a.B/*", requests_per_second=1.0)
    limiter = RateLimiter([special, general], 0.0)
    assert all(limiter.take("web", "/a.B/C", 0.0) is ADMITTED for _ in range(100))
    assert limiter.take("web", "/a.B/C", 0.0).limit is special
    assert limiter.take("web", "/a.B/D", 0.0) is ADMITTED
    assert limiter.take("web", "/a.B/E", 0.0).limit is general
    assert all(limiter.take("web", "/other.S/M", 0.0) is ADMITTED for _ in range(10))


@pytest.mark.parametrize(("rate", "burst", "admitted"), [(2.5, None, 3), (0.1, None, 1), (2.0, 7, 7)])
def test_the_burst_is_the_rate_rounded_up_unless_given(rate: float, burst: int | None, admitted: int) -> None:
    limiter = RateLimiter([RateLimit(requests_per_second=rate, burst=burst)], 0.0)
    assert sum(limiter.take("web", "/a.B/C", 0.0) is ADMITTED for _ in range(20)) == admitted


def test_past_the_bound_the_caller_not_seen_for_longest_is_forgotten() -> None:
    limiter = RateLimiter([RateLimit(requests_per_second=1.0)], 0.0, max_buckets=2)
    for caller in ("a", "b", "a", "c"):
        limiter.take(caller, "/a.B/C", 0.0)
    assert limiter.take("a", "/a.B/C", 0.0).limit is not None
    assert limiter.take("b", "/a.B/C", 0.0).limit is None


def test_made_up_methods_cost_no_memory_past_a_bound_and_are_limited_all_the_same() -> None:
    limiter = RateLimiter([RateLimit(method="a.B/*", requests_per_second=1.0, scope=RateLimitScope.ALL)], 0.0)
    limiter.take("web", "/a.B/first", 0.0)
    verdicts = [limiter.take("web", f"/a.B/{number}", 0.0) for number in range(MAX_METHODS + 10)]
    assert all(verdict.limit is not None for verdict in verdicts)


def test_a_gate_admits_up_to_its_limit() -> None:
    gate = ConcurrencyGate(2)
    assert [gate.enter(), gate.enter(), gate.enter()] == [True, True, False]
    assert gate.in_flight == 2
    gate.leave()
    assert gate.enter()


def test_a_gate_without_limit_counts_only() -> None:
    gate = ConcurrencyGate(None)
    assert all(gate.enter() for _ in range(1000))
    assert gate.in_flight == 1000


def test_leaving_an_empty_gate_is_refused_and_changes_nothing() -> None:
    gate = ConcurrencyGate(1)
    with pytest.raises(InvalidTransitionError):
        gate.leave()
    assert gate.in_flight == 0
