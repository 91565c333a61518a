"""What a policy would have kept from the handlers of events that were recorded."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from control_plane.telemetry.event_dry_run import MAX_DETAILS, EventImpact, try_events
from control_plane.telemetry.timeline import CODES, FIRST_BUCKET, Counters
from control_plane.telemetry.window import EventKey
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.tally import Tally

PLACED, SHIPPED = "shop.v1.OrderPlaced", "shop.v1.OrderShipped"


def tried(handled: list[tuple[EventKey, Counters]], *groups: dict[str, Any]) -> EventImpact:
    return try_events(ServicePolicy.parse({"service": "shipping", "events": groups}), handled)


def handled(
    publisher: str, *seconds: float, group: str = "shipping", type: str = PLACED, failed: int = 0
) -> tuple[EventKey, Counters]:
    """Handlers took so long, and of them so many failed."""
    tally = Tally()
    for each in seconds:
        tally.succeeded(each)
    buckets = {FIRST_BUCKET + bucket: count for bucket, count in enumerate(tally.buckets) if count}
    codes = {CODES["OK"]: len(seconds) - failed, CODES["UNKNOWN"]: failed}
    return EventKey("shipping", group, publisher, type), codes | buckets


def test_without_a_policy_everything_is_handled() -> None:
    found = tried([handled("orders", 0.1, 0.2, failed=1), handled("billing", 0.1)])
    assert found == EventImpact(3, 0, 0, 0, [])


def test_events_of_publishers_that_are_not_taken_are_counted_exactly() -> None:
    rule = {"handlers": [{"type": PLACED, "publishers": ["orders"]}]}
    record = [handled("orders", 0.1), handled("billing", 0.1, 0.1), handled("billing", 0.1, type=SHIPPED)]
    found = tried(record, rule)
    assert (found.handled, found.unauthorized, found.paused, found.timed_out) == (4, 2, 0, 0)
    [row] = found.details
    assert (row.group, row.publisher, row.type, row.handled, row.unauthorized) == (
        "shipping",
        "billing",
        PLACED,
        2,
        2,
    )


def test_a_paused_group_handles_nothing_and_another_goes_on() -> None:
    record = [handled("orders", 0.1, 9.0), handled("orders", 0.1, group="reports")]
    found = tried(record, {"group": "shipping", "paused": True, "handlers": [{"publishers": ["billing"]}]})
    assert (found.handled, found.paused, found.unauthorized) == (3, 2, 0)
    assert [(row.group, row.kept) for row in found.details] == [("shipping", 2)]


def test_the_first_group_and_the_first_handler_that_match_decide() -> None:
    record = [handled("orders", 0.1)]
    assert not tried(record, {"group": "*"}, {"group": "shipping", "paused": True}).details
    assert not tried(record, {"handlers": [{"type": "shop.v1.*"}, {"publishers": ["billing"]}]}).details


def test_a_timeout_ends_the_calls_that_certainly_took_longer() -> None:
    record = [handled("orders", 0.00001, 0.01, 0.99, 1.0, 1.01, 1.3, 400.0)]
    found = tried(record, {"handlers": [{"timeout": "1s"}]})
    assert 2 <= found.timed_out <= 3  # that 1.01 s is longer cannot be told from the record
    assert tried(record, {"handlers": [{"timeout": "110s"}]}).timed_out == 0


@given(st.lists(st.floats(1e-6, 300.0), max_size=50), st.integers(1, 200_000))
def test_never_more_calls_time_out_than_took_longer(seconds: list[float], timeout: int) -> None:
    found = tried([handled("orders", *seconds)], {"handlers": [{"timeout": f"{timeout}ms"}]})
    longer = [each for each in seconds if each > timeout / 1_000]
    assert found.timed_out <= len(longer)
    surely = [each for each in longer if each > timeout / 1_000 * 1.2 and each <= 100.0]
    assert found.timed_out >= len(surely) or timeout > 85_000  # beyond the last bucket nothing is told apart


def test_those_of_whom_most_is_kept_come_first_and_there_is_an_end_of_them() -> None:
    record = [handled(f"p{number}", *[0.1] * (number % 7 + 1)) for number in range(MAX_DETAILS + 20)]
    found = tried(record, {"paused": True})
    assert len(found.details) == MAX_DETAILS
    assert [row.kept for row in found.details] == sorted((row.kept for row in found.details), reverse=True)
    assert (
        found.paused
        == found.handled
        == sum(count for _, counters in record for code, count in counters.items() if code == 0)
    )
