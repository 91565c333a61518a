from __future__ import annotations

from datetime import UTC, datetime

import pybreaker
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh_client.core.breaker import BreakerState, MonotonicStorage, ServiceBreaker
from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.model import Outcome
from mesh_client.core.policy import CircuitBreaker

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
SETTINGS = CircuitBreaker(consecutive_failures=3, open_duration=60.0, half_open_probes=2)


def call(breaker: ServiceBreaker, outcome: Outcome, now: float = 0.0) -> None:
    token = breaker.admit(now)
    assert token >= 0
    breaker.settle(token, outcome, now)


def opened(now: float = 0.0) -> ServiceBreaker:
    breaker = ServiceBreaker(SETTINGS, now)
    for _ in range(3):
        call(breaker, Outcome.FAILURE, now)
    assert breaker.state(now) is OPEN
    return breaker


def test_it_opens_at_the_stated_number_of_failures_in_a_row() -> None:
    breaker = ServiceBreaker(SETTINGS, 0.0)
    call(breaker, Outcome.FAILURE)
    call(breaker, Outcome.FAILURE)
    assert breaker.state(0.0) is CLOSED
    call(breaker, Outcome.FAILURE)
    assert breaker.state(0.0) is OPEN
    assert breaker.admit(0.0) == -1


def test_a_single_failure_opens_it_when_one_is_enough() -> None:
    breaker = ServiceBreaker(CircuitBreaker(consecutive_failures=1), 0.0)
    call(breaker, Outcome.FAILURE)
    assert breaker.admit(0.0) == -1


def test_a_success_between_failures_starts_the_count_again() -> None:
    breaker = ServiceBreaker(SETTINGS, 0.0)
    for outcome in (Outcome.FAILURE, Outcome.FAILURE, Outcome.SUCCESS, Outcome.FAILURE, Outcome.FAILURE):
        call(breaker, outcome)
    assert breaker.state(0.0) is CLOSED


def test_a_call_that_its_caller_gave_up_neither_counts_nor_clears() -> None:
    breaker = ServiceBreaker(SETTINGS, 0.0)
    for outcome in (Outcome.FAILURE, Outcome.NEUTRAL, Outcome.FAILURE, Outcome.NEUTRAL, Outcome.FAILURE):
        call(breaker, outcome)
    assert breaker.state(0.0) is OPEN


def test_overload_counts_as_failure() -> None:
    breaker = ServiceBreaker(SETTINGS, 0.0)
    for _ in range(3):
        call(breaker, Outcome.OVERLOAD)
    assert breaker.state(0.0) is OPEN


def test_it_refuses_until_the_open_duration_has_passed() -> None:
    breaker = opened(100.0)
    assert breaker.retry_after(100.0) == 60.0
    assert breaker.retry_after(130.0) == 30.0
    assert breaker.admit(159.999) == -1
    assert breaker.state(159.999) is OPEN
    assert breaker.state(160.0) is HALF_OPEN
    assert breaker.retry_after(160.0) == 0.0
    assert breaker.admit(160.0) >= 0


def test_the_wall_clock_does_not_matter() -> None:
    breaker = opened(1e9)
    assert breaker.admit(1e9 + 59.0) == -1
    assert breaker.admit(1e9 + 60.0) >= 0


def test_half_open_lets_only_so_many_probes_through_at_once() -> None:
    breaker = opened()
    assert breaker.admit(60.0) >= 0
    assert breaker.admit(60.0) >= 0
    assert breaker.admit(60.0) == -1


def test_the_first_probe_that_succeeds_closes_it() -> None:
    breaker = opened()
    first, second = breaker.admit(60.0), breaker.admit(60.0)
    breaker.settle(first, Outcome.SUCCESS, 61.0)
    assert breaker.state(61.0) is CLOSED
    breaker.settle(second, Outcome.FAILURE, 62.0)
    for _ in range(2):
        call(breaker, Outcome.FAILURE, 62.0)
    assert breaker.state(62.0) is CLOSED, "the other probe's failure belongs to the past"


def test_the_first_probe_that_fails_opens_it_for_the_whole_duration_again() -> None:
    breaker = opened()
    first, second = breaker.admit(60.0), breaker.admit(60.0)
    breaker.settle(first, Outcome.FAILURE, 65.0)
    assert breaker.retry_after(65.0) == 60.0
    breaker.settle(second, Outcome.SUCCESS, 66.0)
    assert breaker.state(66.0) is OPEN


def test_probes_that_decide_nothing_give_their_place_to_the_next() -> None:
    breaker = opened()
    for _ in range(50):
        tokens = [breaker.admit(60.0), breaker.admit(60.0)]
        assert breaker.admit(60.0) == -1
        for token in tokens:
            breaker.settle(token, Outcome.NEUTRAL, 60.0)
    assert breaker.state(60.0) is HALF_OPEN
    call(breaker, Outcome.SUCCESS, 60.0)
    assert breaker.state(60.0) is CLOSED


def test_late_results_of_calls_admitted_before_it_opened_are_ignored() -> None:
    breaker = ServiceBreaker(SETTINGS, 0.0)
    late = [breaker.admit(0.0) for _ in range(6)]
    for token in late[:3]:
        breaker.settle(token, Outcome.FAILURE, 1.0)
    breaker.settle(late[3], Outcome.SUCCESS, 2.0)
    assert breaker.state(2.0) is OPEN
    probe = breaker.admit(61.0)
    breaker.settle(late[4], Outcome.SUCCESS, 62.0)
    breaker.settle(late[5], Outcome.FAILURE, 62.0)
    assert breaker.state(62.0) is HALF_OPEN
    breaker.settle(probe, Outcome.SUCCESS, 63.0)
    assert breaker.state(63.0) is CLOSED


def test_transitions_are_told_once_each_and_in_order() -> None:
    told: list[tuple[BreakerState, BreakerState]] = []
    breaker = ServiceBreaker(SETTINGS, 0.0, lambda old, new: told.append((old, new)))
    for _ in range(3):
        call(breaker, Outcome.FAILURE)
    call(breaker, Outcome.FAILURE, 60.0)
    call(breaker, Outcome.SUCCESS, 120.0)
    assert told == [(CLOSED, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, OPEN), (OPEN, HALF_OPEN), (HALF_OPEN, CLOSED)]


def test_a_listener_may_use_the_breaker_and_sees_its_new_state() -> None:
    seen: list[tuple[BreakerState, int]] = []

    def listen(_old: BreakerState, _new: BreakerState) -> None:
        seen.append((breaker.state(0.0), breaker.admit(0.0)))

    breaker = ServiceBreaker(SETTINGS, 0.0, listen)
    for _ in range(3):
        call(breaker, Outcome.FAILURE)
    assert seen == [(OPEN, -1)]


def test_a_listener_that_raises_leaves_the_breaker_in_its_new_state() -> None:
    def listen(_old: BreakerState, new: BreakerState) -> None:
        raise LookupError(new.value)

    breaker = ServiceBreaker(CircuitBreaker(consecutive_failures=1, half_open_probes=1), 0.0, listen)
    token = breaker.admit(0.0)
    with pytest.raises(LookupError, match="open"):
        breaker.settle(token, Outcome.FAILURE, 0.0)
    assert breaker.state(0.0) is OPEN
    with pytest.raises(LookupError, match="half-open"):
        breaker.admit(60.0)
    assert breaker.admit(60.0) >= 0, "the admission that raised took no probe's place"


def test_a_disabled_breaker_admits_everything() -> None:
    breaker = ServiceBreaker(CircuitBreaker(enabled=False, consecutive_failures=1), 0.0)
    for outcome in Outcome:
        for _ in range(100):
            call(breaker, outcome)
    assert breaker.state(0.0) is CLOSED
    assert breaker.retry_after(0.0) == 0.0


@pytest.mark.parametrize("token", [-1, 1, 99])
@pytest.mark.parametrize("outcome", Outcome)
def test_a_token_that_was_never_given_is_refused(token: int, outcome: Outcome) -> None:
    breaker = ServiceBreaker(SETTINGS, 0.0)
    with pytest.raises(InvalidTransitionError, match="never given"):
        breaker.settle(token, outcome, 0.0)
    assert breaker.state(0.0) is CLOSED


def test_more_probes_than_were_admitted_are_refused_and_change_nothing() -> None:
    breaker = opened()
    token = breaker.admit(60.0)
    breaker.settle(token, Outcome.NEUTRAL, 60.0)
    with pytest.raises(InvalidTransitionError, match="not under way"):
        breaker.settle(token, Outcome.SUCCESS, 60.0)
    assert breaker.state(60.0) is HALF_OPEN


def test_pybreaker_is_told_the_moment_of_opening_by_the_injected_clock() -> None:
    storage = MonotonicStorage(5.0)
    storage.now = 86_400.0
    pybreaker.CircuitBreaker(state_storage=storage).open()
    assert storage.opened_at == datetime(1970, 1, 2, tzinfo=UTC)


class BreakerMachine(RuleBasedStateMachine):
    """Against a model that keeps the state in words."""

    @initialize(failures=st.integers(1, 3), probes=st.integers(1, 3))
    def start(self, failures: int, probes: int) -> None:
        settings = CircuitBreaker(consecutive_failures=failures, open_duration=10.0, half_open_probes=probes)
        self.failures_allowed, self.probes_allowed = failures, probes
        self.now = 0.0
        self.told: list[tuple[BreakerState, BreakerState]] = []
        self.breaker = ServiceBreaker(settings, 0.0, lambda old, new: self.told.append((old, new)))
        self.model, self.failures, self.opened_at, self.age = CLOSED, 0, 0.0, 0
        self.in_flight: list[tuple[int, int]] = []  # token, and the model's age when it was given

    def become(self, state: BreakerState) -> None:
        self.model, self.failures, self.opened_at = state, 0, self.now
        self.age += 1

    def probes(self) -> int:
        return sum(age == self.age for _, age in self.in_flight)

    @rule()
    def admit(self) -> None:
        if self.model is OPEN and self.now >= self.opened_at + 10.0:
            self.become(HALF_OPEN)
        refused = self.model is OPEN or (self.model is HALF_OPEN and self.probes() >= self.probes_allowed)
        token = self.breaker.admit(self.now)
        assert (token == -1) == refused
        if not refused:
            self.in_flight.append((token, self.age))

    @precondition(lambda self: self.in_flight)
    @rule(outcome=st.sampled_from(Outcome), data=st.data())
    def settle(self, outcome: Outcome, data: st.DataObject) -> None:
        token, age = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        before = self.breaker.state(self.now), len(self.told)
        self.breaker.settle(token, outcome, self.now)
        if age != self.age or outcome is Outcome.NEUTRAL:
            assert (self.breaker.state(self.now), len(self.told)) == before
        elif outcome is Outcome.SUCCESS:
            self.failures = 0
            if self.model is HALF_OPEN:
                self.become(CLOSED)
        else:
            self.failures += 1
            if self.model is HALF_OPEN or self.failures >= self.failures_allowed:
                self.become(OPEN)

    @rule(seconds=st.sampled_from([0.5, 3.0, 9.5, 10.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: hasattr(self, "breaker"))
    @invariant()
    def as_modelled(self) -> None:
        due = self.model is OPEN and self.now >= self.opened_at + 10.0
        assert self.breaker.state(self.now) is (HALF_OPEN if due else self.model)
        left = self.opened_at + 10.0 - self.now if self.model is OPEN else 0.0
        assert self.breaker.retry_after(self.now) == pytest.approx(max(0.0, left))
        assert len(self.told) == self.age
        assert all(new is following for (_, new), (following, _) in zip(self.told, self.told[1:], strict=False))


TestBreakerMachine = BreakerMachine.TestCase
