from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh_client.core.model import Outcome
from mesh_client.core.outlier import OutlierDetector
from mesh_client.core.policy import OutlierDetection

TEN = [f"orders-{number}" for number in range(10)]
SETTINGS = OutlierDetection(
    consecutive_failures=3, base_ejection=30.0, max_ejection=100.0, max_ejected_percent=20.0, interval=10.0
)


def detector(ids: list[str] = TEN, **changes: object) -> OutlierDetector:
    made = OutlierDetector(SETTINGS.model_copy(update=changes))
    assert not made.set_endpoints(ids, 0.0)
    return made


def record(tested: OutlierDetector, endpoint_id: str, outcome: Outcome, count: int = 1, now: float = 0.0) -> bool:
    """Whether any of the records changed the ejected set."""
    return sum(tested.record(endpoint_id, outcome, now) for _ in range(count)) > 0


def fail(tested: OutlierDetector, endpoint_id: str, now: float = 0.0) -> bool:
    return record(tested, endpoint_id, Outcome.FAILURE, 3, now)


def test_failures_in_a_row_eject_at_the_stated_number() -> None:
    tested = detector()
    assert not record(tested, "orders-0", Outcome.FAILURE, 2)
    assert tested.ejected == frozenset()
    assert record(tested, "orders-0", Outcome.FAILURE)
    assert tested.ejected == {"orders-0"}


def test_a_success_starts_the_count_again() -> None:
    tested = detector()
    for _ in range(5):
        record(tested, "orders-0", Outcome.FAILURE, 2)
        record(tested, "orders-0", Outcome.SUCCESS)
    assert tested.ejected == frozenset()


@pytest.mark.parametrize("outcome", [Outcome.OVERLOAD, Outcome.NEUTRAL, Outcome.SUCCESS])
def test_load_and_impatient_callers_never_eject(outcome: Outcome) -> None:
    tested = detector(success_rate_min_requests=1)
    for endpoint_id in TEN:
        record(tested, endpoint_id, Outcome.SUCCESS if endpoint_id != "orders-0" else outcome, 1000)
    assert not tested.tick(10.0)
    assert tested.ejected == frozenset()


def test_an_ejected_endpoint_returns_after_the_base_time() -> None:
    tested = detector()
    fail(tested, "orders-0")
    assert not tested.tick(29.9)
    assert tested.tick(30.0)
    assert tested.ejected == frozenset()
    assert not tested.tick(30.0)


def test_each_ejection_in_a_row_is_longer_up_to_the_longest() -> None:
    tested = detector()
    now = 0.0
    for length in (30.0, 60.0, 90.0, 100.0, 100.0):
        assert fail(tested, "orders-0", now)
        assert not tested.tick(now + length - 0.001)
        now += length
        assert tested.tick(now)


def test_the_length_falls_again_with_each_whole_healthy_interval() -> None:
    tested = detector(base_ejection=15.0)
    fail(tested, "orders-0", 0.0)
    tested.tick(15.0)
    fail(tested, "orders-0", 15.0)
    tested.tick(45.0)  # ejected twice; free from here on
    tested.tick(54.0)  # not yet a whole interval: two it stays
    tested.tick(64.0)  # one
    fail(tested, "orders-0", 64.0)
    assert not tested.tick(93.9)
    assert tested.tick(94.0)


def test_a_long_healthy_time_forgets_all_ejections() -> None:
    tested = detector()
    fail(tested, "orders-0")
    for now in range(30, 200, 10):
        tested.tick(float(now))
    fail(tested, "orders-0", 200.0)
    assert tested.tick(230.0)


def test_results_of_an_ejected_endpoint_are_ignored() -> None:
    tested = detector()
    fail(tested, "orders-0")
    assert not record(tested, "orders-0", Outcome.FAILURE, 100, 10.0)
    assert tested.tick(30.0)


def test_successes_of_an_ejected_endpoint_do_not_make_its_next_window_look_better() -> None:
    tested = detector(base_ejection=5.0)
    fail(tested, "orders-3")
    record(tested, "orders-3", Outcome.SUCCESS, 10_000, 1.0)
    tested.tick(5.0)
    window(tested, {"orders-3": 40})
    assert tested.tick(10.0)
    assert tested.ejected == {"orders-3"}


def test_only_the_stated_share_is_ejected_at_once() -> None:
    tested = detector()
    for endpoint_id in TEN:
        fail(tested, endpoint_id)
    assert tested.ejected == {"orders-0", "orders-1"}


def test_who_still_fails_is_ejected_when_there_is_room_again() -> None:
    tested = detector()
    for endpoint_id in TEN:
        fail(tested, endpoint_id)
    tested.tick(30.0)
    assert tested.record("orders-7", Outcome.FAILURE, 31.0)
    assert tested.ejected == {"orders-7"}


@pytest.mark.parametrize(
    ("count", "percent", "limit"),
    [(2, 0.0, 1), (2, 10.0, 1), (9, 10.0, 1), (20, 10.0, 2), (30, 10.0, 3), (3, 100.0, 3), (10, 29.0, 2)],
)
def test_the_share_is_rounded_down_but_one_at_least(count: int, percent: float, limit: int) -> None:
    ids = [f"e{number}" for number in range(count)]
    tested = detector(ids, max_ejected_percent=percent)
    for endpoint_id in ids:
        fail(tested, endpoint_id)
    assert len(tested.ejected) == limit


def test_the_only_endpoint_is_never_ejected() -> None:
    tested = detector(["orders-0"])
    assert not record(tested, "orders-0", Outcome.FAILURE, 100)
    assert tested.next_tick(0.0) is None


def test_an_endpoint_that_becomes_the_only_one_returns() -> None:
    tested = detector(["a", "b"])
    fail(tested, "a")
    assert tested.set_endpoints(["a"], 1.0)
    assert tested.ejected == frozenset()


def test_when_endpoints_leave_the_ejections_that_end_first_end_at_once() -> None:
    tested = detector()
    fail(tested, "orders-1", 0.0)
    fail(tested, "orders-0", 5.0)
    assert tested.set_endpoints(TEN[:9], 6.0)
    assert tested.ejected == {"orders-0"}


def test_a_gone_endpoint_is_forgotten_with_all_its_failures() -> None:
    tested = detector()
    fail(tested, "orders-0")
    record(tested, "orders-1", Outcome.FAILURE, 2)
    assert tested.set_endpoints(TEN[2:], 1.0)
    assert not tested.set_endpoints(TEN, 2.0)
    assert not record(tested, "orders-1", Outcome.FAILURE, 2)
    assert tested.ejected == frozenset()


def test_remaining_endpoints_keep_their_failures() -> None:
    tested = detector()
    record(tested, "orders-0", Outcome.FAILURE, 2)
    assert not tested.set_endpoints([*TEN, "orders-10"], 1.0)
    assert tested.record("orders-0", Outcome.FAILURE, 1.0)


def test_results_of_unknown_endpoints_are_ignored() -> None:
    assert not record(detector(), "gone", Outcome.FAILURE, 100)


def test_disabled_it_ejects_nobody() -> None:
    tested = detector(enabled=False)
    assert not fail(tested, "orders-0")
    assert not tested.tick(1000.0)
    assert tested.next_tick(0.0) is None


def test_the_next_tick_is_the_end_of_an_ejection_or_of_the_interval() -> None:
    tested = detector(base_ejection=4.0)
    assert tested.next_tick(0.0) == 10.0
    fail(tested, "orders-0", 1.0)
    assert tested.next_tick(1.0) == 5.0
    tested.tick(5.0)
    assert tested.next_tick(5.0) == 10.0
    tested.tick(10.0)
    assert tested.next_tick(10.0) == 20.0


def test_without_endpoints_there_is_nothing_to_wait_for() -> None:
    tested = detector()
    assert not tested.set_endpoints([], 1.0)
    assert tested.next_tick(1.0) is None
    assert not tested.tick(100.0)
    tested.set_endpoints(TEN, 200.0)
    assert tested.next_tick(200.0) == 210.0


def window(tested: OutlierDetector, failures: dict[str, int], calls: int = 100) -> None:
    """Calls to every endpoint with so many failures each, never more than one in a row."""
    for endpoint_id in TEN:
        bad = failures.get(endpoint_id, 0)
        for _ in range(bad):
            record(tested, endpoint_id, Outcome.FAILURE)
            record(tested, endpoint_id, Outcome.SUCCESS)
        record(tested, endpoint_id, Outcome.SUCCESS, calls - 2 * bad)


def test_a_low_success_rate_ejects_at_the_end_of_the_interval() -> None:
    tested = detector()
    window(tested, {"orders-3": 40})
    assert not tested.tick(9.9)
    assert tested.tick(10.0)
    assert tested.ejected == {"orders-3"}


def test_the_worst_go_first_when_not_all_may() -> None:
    tested = detector(max_ejected_percent=10.0, success_rate_stdev_factor=0.5)
    window(tested, {"orders-3": 30, "orders-6": 45})
    tested.tick(10.0)
    assert tested.ejected == {"orders-6"}


def test_a_rate_within_the_deviation_is_no_outlier() -> None:
    tested = detector(success_rate_stdev_factor=3.1)
    window(tested, {"orders-3": 40})
    assert not tested.tick(10.0)


def test_equally_bad_endpoints_are_no_outliers() -> None:
    tested = detector(success_rate_stdev_factor=0.0)
    window(tested, dict.fromkeys(TEN, 30))
    assert not tested.tick(10.0)


def test_each_window_counts_on_its_own() -> None:
    tested = detector()
    window(tested, {"orders-3": 40}, calls=90)
    assert not tested.tick(10.0), "too few calls"
    window(tested, {}, calls=50)
    assert not tested.tick(20.0)


def test_too_few_endpoints_with_enough_calls_are_not_compared() -> None:
    tested = detector(success_rate_min_endpoints=11)
    window(tested, {"orders-3": 40})
    assert not tested.tick(10.0)


def test_success_rates_and_failures_in_a_row_share_the_limit() -> None:
    tested = detector()
    fail(tested, "orders-0", 0.0)
    fail(tested, "orders-1", 0.0)
    window(tested, {"orders-3": 40})
    assert not tested.tick(10.0)
    assert tested.ejected == {"orders-0", "orders-1"}


class OutlierMachine(RuleBasedStateMachine):
    """Whatever happens: never too many, never the only one, never longer than the longest, never for success."""

    @initialize(count=st.integers(0, 12), percent=st.sampled_from([0.0, 10.0, 25.0, 50.0, 100.0]))
    def start(self, count: int, percent: float) -> None:
        self.settings = OutlierDetection(
            consecutive_failures=2,
            base_ejection=5.0,
            max_ejection=12.0,
            max_ejected_percent=percent,
            interval=10.0,
            success_rate_min_requests=5,
            success_rate_min_endpoints=3,
        )
        self.tested = OutlierDetector(self.settings)
        self.now = 0.0
        self.ids = [f"e{number}" for number in range(count)]
        self.ejected_at: dict[str, float] = {}
        self.failed: set[str] = set()
        self.seen = self.tested.ejected
        self.follow(self.tested.set_endpoints(self.ids, 0.0))

    def follow(self, changed: bool) -> None:
        ejected = self.tested.ejected
        assert changed == (ejected != self.seen)
        assert ejected - self.seen <= self.failed, "only what failed is ejected"
        for endpoint_id in ejected - self.seen:
            self.ejected_at[endpoint_id] = self.now
        self.seen = ejected

    @precondition(lambda self: self.ids)
    @rule(number=st.integers(0, 11), outcomes=st.lists(st.sampled_from(Outcome), min_size=1, max_size=8))
    def record(self, number: int, outcomes: list[Outcome]) -> None:
        endpoint_id = self.ids[number % len(self.ids)]
        for outcome in outcomes:
            if outcome is Outcome.FAILURE:
                self.failed.add(endpoint_id)
            changed = self.tested.record(endpoint_id, outcome, self.now)
            assert outcome is Outcome.FAILURE or not changed
            self.follow(changed)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 7.5, 40.0]))
    def wait_and_tick(self, seconds: float) -> None:
        self.now += seconds
        before = self.seen
        self.follow(self.tested.tick(self.now))
        for endpoint_id in before & self.seen:
            assert self.now < self.ejected_at[endpoint_id] + self.settings.max_ejection
        for endpoint_id in before - self.seen:
            assert self.now >= self.ejected_at[endpoint_id] + self.settings.base_ejection

    @rule(count=st.integers(0, 12), offset=st.integers(0, 3))
    def replace_endpoints(self, count: int, offset: int) -> None:
        self.ids = [f"e{number}" for number in range(offset, offset + count)]
        self.failed &= set(self.ids)
        self.follow(self.tested.set_endpoints(self.ids, self.now))

    @precondition(lambda self: hasattr(self, "tested"))
    @invariant()
    def never_too_many(self) -> None:
        count = len(self.ids)
        assert self.tested.ejected <= set(self.ids)
        limit = 0 if count < 2 else max(1, int(count * self.settings.max_ejected_percent / 100.0))
        assert len(self.tested.ejected) <= limit

    @precondition(lambda self: hasattr(self, "tested"))
    @invariant()
    def whoever_is_ejected_is_waited_for(self) -> None:
        when = self.tested.next_tick(self.now)
        if self.tested.ejected:
            assert when is not None
            assert when <= self.now + self.settings.max_ejection


TestOutlierMachine = OutlierMachine.TestCase
