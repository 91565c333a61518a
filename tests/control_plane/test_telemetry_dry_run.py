"""What a policy would have refused of what was recorded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.telemetry.dry_run import MAX_PLACES, blocked_share, try_policy
from control_plane.telemetry.timeline import BUSY, CODES, PEAK, STEP
from control_plane.telemetry.traffic import ReceivedStep
from mesh_client.core.policy import ServicePolicy

PLACE, GET = "/shop.v1.OrderService/PlaceOrder", "/shop.v1.OrderService/GetOrder"
OK = CODES["OK"]


def policy(**fields: Any) -> ServicePolicy:
    return ServicePolicy.parse({"service": "orders", **fields})


def step(
    number: int = 0, instance: str = "orders-1", peak: int = 0, seconds: float = 0.0, **calls: int
) -> ReceivedStep:
    """Calls by caller to one method, which took so many seconds each."""
    return ReceivedStep(
        instance,
        number,
        {(caller, PLACE): {OK: count, BUSY: round(count * seconds * 1e6)} for caller, count in calls.items()},
        {PEAK: peak},
    )


def test_without_rules_and_limits_nothing_is_refused() -> None:
    found = try_policy(policy(), [step(checkout=10, jobs=5)])
    assert (found.calls, found.refused, found.details) == (15, 0, [])


def test_calls_that_no_rule_allows_are_counted_exactly() -> None:
    rules = [{"callers": ["checkout"], "methods": ["shop.v1.OrderService/*"]}]
    found = try_policy(policy(authorization=rules), [step(checkout=10, jobs=5), step(1, jobs=2), step(1, "b", jobs=1)])
    assert (found.calls, found.unauthorized, found.refused) == (18, 8, 8)
    (row,) = found.details
    assert (row.caller, row.method, row.calls, row.unauthorized, row.refused) == ("jobs", PLACE, 8, 8, 8)


def test_calls_without_an_identity_are_refused_once_there_is_a_rule() -> None:
    nobody = ReceivedStep("orders-1", 0, {("", PLACE): {OK: 3}})
    assert try_policy(policy(authorization=[{"callers": ["*"], "methods": ["*"]}]), [nobody]).unauthorized == 3


def test_a_rate_limit_refuses_what_its_bucket_does_not_hold_for_each_caller_and_instance() -> None:
    limited = policy(rate_limits=[{"requests_per_second": 2, "burst": 5}])
    found = try_policy(limited, [step(checkout=30, jobs=25), step(0, "orders-2", checkout=26)])
    assert (found.rate_limited, found.refused) == (6, 6)
    assert [(row.caller, row.rate_limited) for row in found.details] == [("checkout", 6)]


def test_a_rate_limit_for_all_is_shared() -> None:
    limited = policy(rate_limits=[{"requests_per_second": 2, "burst": 10, "scope": "ALL"}])
    found = try_policy(limited, [step(checkout=30, jobs=20)])
    assert found.rate_limited == 20
    assert {row.caller: row.rate_limited for row in found.details} == {"checkout": 12, "jobs": 8}


def test_a_bucket_is_empty_after_a_busy_step_and_full_again_after_quiet_ones() -> None:
    limited = policy(rate_limits=[{"requests_per_second": 1, "burst": 20}])
    assert try_policy(limited, [step(0, web=30), step(1, web=30)]).rate_limited == 20
    assert try_policy(limited, [step(0, web=30), step(4, web=30)]).rate_limited == 0


def test_the_first_rule_that_matches_decides_and_by_default_a_burst_is_a_second() -> None:
    limited = policy(
        rate_limits=[
            {"method": "shop.v1.OrderService/GetOrder", "requests_per_second": 1000},
            {"method": "shop.v1.OrderService/*", "requests_per_second": 1.5},
        ]
    )
    both = ReceivedStep("orders-1", 0, {("web", GET): {OK: 500}, ("web", PLACE): {OK: 30}})
    assert try_policy(limited, [both]).rate_limited == 30 - 15 - 2
    others = ReceivedStep("orders-1", 0, {("web", "/other.v1.Service/Method"): {OK: 500}})
    assert try_policy(limited, [others]).rate_limited == 0


def test_calls_that_may_not_be_made_take_no_tokens() -> None:
    limited = policy(
        rate_limits=[{"requests_per_second": 1, "burst": 1, "scope": "ALL"}],
        authorization=[{"callers": ["checkout"], "methods": ["*"]}],
    )
    found = try_policy(limited, [step(checkout=11, jobs=100)])
    assert (found.unauthorized, found.rate_limited) == (100, 0)


def test_a_limit_on_calls_in_flight_refuses_about_as_many_as_erlang_says_and_none_below_the_peak() -> None:
    limited = policy(server_concurrency_limit={"max_in_flight": 10})
    assert try_policy(limited, [step(peak=10, seconds=1.0, web=100)]).shed == 0
    found = try_policy(limited, [step(peak=11, seconds=1.0, web=75, jobs=25)])
    assert found.shed == int(100 * blocked_share(10, 10.0)) == 21
    assert {row.caller: row.shed for row in found.details} == {"web": 15, "jobs": 6}
    (row, _) = found.details
    assert row.refused == 15


def test_erlangs_formula() -> None:
    # From published tables: A = 5 erlang on 10 circuits, 2 on 3, 10 on 10.
    assert blocked_share(10, 5.0) == pytest.approx(0.0184, abs=1e-4)
    assert blocked_share(3, 2.0) == pytest.approx(0.2105, abs=1e-4)
    assert blocked_share(10, 10.0) == pytest.approx(0.2146, abs=1e-4)
    assert blocked_share(10, 0.0) == 0.0
    assert blocked_share(MAX_PLACES + 1, 2.0 * (MAX_PLACES + 1)) == pytest.approx(0.5)
    assert blocked_share(MAX_PLACES + 1, 1.0) == 0.0
    assert blocked_share(MAX_PLACES + 1, 0.0) == 0.0


def test_details_are_bounded_and_the_most_refused_come_first() -> None:
    strict = policy(authorization=[{"callers": ["nobody-else"], "methods": ["*"]}])
    crowd = ReceivedStep("orders-1", 0, {(f"c{number}", PLACE): {OK: number + 1} for number in range(150)})
    found = try_policy(strict, [crowd])
    assert (len(found.details), found.details[0].caller) == (100, "c149")
    assert found.unauthorized == 150 * 151 // 2


_STEPS = st.lists(
    st.builds(
        lambda number, instance, peak, seconds, calls: step(number, instance, peak, seconds, **calls),
        st.integers(0, 5),
        st.sampled_from(["a", "b"]),
        st.integers(0, 30),
        st.floats(0.0, 2.0),
        st.dictionaries(st.sampled_from(["web", "jobs", "checkout"]), st.integers(0, 200)),
    ),
    max_size=8,
)
_POLICIES = st.sampled_from(
    [
        policy(rate_limits=[{"requests_per_second": 3}]),
        policy(server_concurrency_limit={"max_in_flight": 3}, rate_limits=[{"requests_per_second": 1, "scope": "ALL"}]),
        policy(
            authorization=[{"callers": ["web"], "methods": ["*"]}],
            rate_limits=[{"requests_per_second": 1}],
            server_concurrency_limit={"max_in_flight": 1},
        ),
    ]
)


@given(_STEPS, _POLICIES)
def test_no_call_is_refused_twice_and_the_sums_are_those_of_the_parts(
    steps: list[ReceivedStep], tried: ServicePolicy
) -> None:
    ordered = sorted(steps, key=lambda each: (each.instance_id, each.step))
    found = try_policy(tried, ordered)
    assert found.calls == sum(count for each in steps for calls in each.calls.values() for count in [calls[OK]])
    assert 0 <= found.refused <= found.calls
    assert sum(row.refused for row in found.details) == found.refused
    assert all(
        min(row.unauthorized, row.rate_limited, row.shed) >= 0 and row.refused <= row.calls for row in found.details
    )
    assert STEP == 10.0
