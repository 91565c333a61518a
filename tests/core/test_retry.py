from __future__ import annotations

from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh_client.core import policy
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.retry import (
    DO_NOT_RETRY,
    NO_PUSHBACK,
    WINDOW,
    Pushback,
    RetryBudget,
    backoff_delay,
    parse_pushback,
)


def budget(ratio: float = 0.2, min_per_second: float = 0.0) -> RetryBudget:
    return RetryBudget(policy.RetryBudget(ratio=ratio, min_per_second=min_per_second), 0.0)


def withdraw_all(tested: RetryBudget, now: float) -> int:
    count = 0
    while tested.withdraw(now):
        count += 1
    return count


def deposit(tested: RetryBudget, count: int, now: float) -> None:
    for _ in range(count):
        tested.deposit(now)


@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.1, 0.2, 0.29, 0.5, 1.0])
def test_retries_are_the_stated_share_of_calls(ratio: float) -> None:
    tested = budget(ratio)
    deposit(tested, 100, 0.0)
    assert withdraw_all(tested, 0.5) == round(100 * ratio)


def test_a_client_with_few_calls_may_retry_from_the_reserve() -> None:
    tested = budget(0.0, 2.0)
    assert withdraw_all(tested, 0.0) == 2 * WINDOW
    assert withdraw_all(tested, WINDOW - 0.01) == 0
    assert withdraw_all(tested, WINDOW) == 2 * WINDOW


def test_without_ratio_and_reserve_there_are_no_retries() -> None:
    tested = budget(0.0, 0.0)
    deposit(tested, 1000, 0.0)
    assert not tested.withdraw(0.0)


def test_calls_count_for_ten_buckets_of_a_second() -> None:
    tested = budget(1.0)
    deposit(tested, 3, 0.5)
    assert tested.balance(WINDOW - 0.01) == 3
    assert tested.balance(WINDOW) == 0
    deposit(tested, 1, WINDOW)
    assert withdraw_all(tested, WINDOW) == 1


def test_calls_of_different_seconds_expire_one_after_the_other() -> None:
    tested = budget(1.0)
    for second in range(WINDOW):
        deposit(tested, 1, second + 0.5)
    assert [tested.balance(WINDOW + second) for second in range(WINDOW)] == [*range(WINDOW - 1, 0, -1), 0]


def test_reading_the_balance_changes_nothing() -> None:
    tested = budget(1.0)
    deposit(tested, 5, 0.0)
    assert tested.balance(1000.0) == 0
    assert tested.balance(0.0) == 5
    assert withdraw_all(tested, 0.0) == 5


def test_a_long_silence_forgets_everything() -> None:
    tested = budget(1.0)
    deposit(tested, 5, 0.0)
    deposit(tested, 1, 1e6)
    assert tested.balance(1e6) == 1


class BudgetMachine(RuleBasedStateMachine):
    """Against a plain list of what happened when; a bucket is a whole second since the start."""

    @initialize(ratio=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), reserve=st.sampled_from([0.0, 0.1, 1.0]))
    def start(self, ratio: float, reserve: float) -> None:
        self.ratio = ratio
        self.reserve = reserve
        self.now = 0.0
        self.tested = budget(ratio, reserve)
        self.calls: list[float] = []
        self.retries: list[float] = []

    def recent(self, times: list[float]) -> int:
        return sum(int(time) > int(self.now) - WINDOW for time in times)

    def expected(self) -> float:
        return self.reserve * WINDOW + self.ratio * self.recent(self.calls) - self.recent(self.retries)

    @rule(count=st.integers(1, 20))
    def deposit(self, count: int) -> None:
        deposit(self.tested, count, self.now)
        self.calls += [self.now] * count

    @rule()
    def withdraw(self) -> None:
        granted = self.tested.withdraw(self.now)
        assert granted == (self.expected() >= 1.0 - 1e-6)
        if granted:
            self.retries.append(self.now)

    @rule(seconds=st.one_of(st.sampled_from([0.25, 0.5, 1.0, 3.0, 9.75, 10.0, 50.0]), st.integers(0, 12).map(float)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: hasattr(self, "tested"))
    @invariant()
    def never_negative_and_as_modelled(self) -> None:
        balance = self.tested.balance(self.now)
        assert balance >= 0.0
        assert balance == pytest.approx(max(0.0, self.expected()), abs=1e-6)

    @precondition(lambda self: hasattr(self, "tested"))
    @invariant()
    def retries_stay_within_the_share_of_all_calls_and_the_reserve(self) -> None:
        windows = int(self.now) // WINDOW + 1
        assert len(self.retries) <= self.ratio * len(self.calls) + self.reserve * WINDOW * windows + 1e-6


TestBudgetMachine = BudgetMachine.TestCase


class Fraction(Random):
    """A generator that always draws the same fraction."""

    def __init__(self, fraction: float) -> None:
        super().__init__(0)
        self.fraction = fraction

    def random(self) -> float:
        return self.fraction


@pytest.mark.parametrize(
    ("number", "bound"), [(1, 0.025), (2, 0.05), (3, 0.1), (6, 0.8), (7, 1.0), (9, 1.0), (5000, 1.0)]
)
def test_the_bound_of_the_wait_doubles_up_to_the_largest(number: int, bound: float) -> None:
    assert backoff_delay(policy.Backoff(), number, Fraction(1.0)) == pytest.approx(bound)
    assert backoff_delay(policy.Backoff(), number, Fraction(0.5)) == pytest.approx(bound / 2)
    assert backoff_delay(policy.Backoff(), number, Fraction(0.0)) == 0.0


def test_retries_are_numbered_from_one() -> None:
    with pytest.raises(InvalidValueError, match="retry_number"):
        backoff_delay(policy.Backoff(), 0, Random(0))


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (None, NO_PUSHBACK),
        ("0", Pushback(allowed=True, delay=0.0)),
        ("1500", Pushback(allowed=True, delay=1.5)),
        ("2147483647", Pushback(allowed=True, delay=2147483.647)),
        ("2147483648", DO_NOT_RETRY),
        ("-1", DO_NOT_RETRY),
        ("", DO_NOT_RETRY),
        ("soon", DO_NOT_RETRY),
        ("1.5", DO_NOT_RETRY),
        (" 5", DO_NOT_RETRY),
        ("5\n", DO_NOT_RETRY),
        ("٣", DO_NOT_RETRY),
        ("9" * 5000, DO_NOT_RETRY),
    ],
)
def test_pushback_means_what_grfc_a6_says(value: str | None, meaning: Pushback) -> None:
    assert parse_pushback(value) == meaning


def test_no_pushback_leaves_the_retry_to_the_client() -> None:
    assert NO_PUSHBACK.allowed
    assert NO_PUSHBACK.delay is None
    assert not DO_NOT_RETRY.allowed


def test_calls_and_retries_are_counted_beyond_the_window() -> None:
    tested = budget(1.0)
    deposit(tested, 3, 0.5)
    assert tested.withdraw(0.5)
    deposit(tested, 4, 100.0)
    assert (tested.calls, tested.retries) == (7, 1)
