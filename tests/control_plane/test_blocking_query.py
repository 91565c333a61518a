"""Blocking queries of Consul."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from control_plane.sources.blocking_query import BlockingQuery, Failure, Question, Verdict
from mesh_client.core.errors import InvalidTransitionError


def query() -> BlockingQuery:
    return BlockingQuery(Random(1), wait=55.0, spacing=0.01, idle_spacing=1.0, min_backoff=0.1, max_backoff=3.0)


def answer(machine: BlockingQuery, index: int | None, at: float | None = None) -> Verdict:
    """Asks as early as may be, answers 30 s later or at ``at``, and accepts."""
    asked = max(machine.ready_at, 0.0)
    machine.ask(asked)
    now = asked + 30.0 if at is None else at
    verdict = machine.answered(index, now)
    machine.accept(now)
    return verdict


def fail(machine: BlockingQuery, failure: Failure) -> None:
    now = max(machine.ready_at, 0.0)
    machine.ask(now)
    machine.failed(failure, now)


def next_question(machine: BlockingQuery) -> Question:
    return machine.ask(max(machine.ready_at, 0.0))


def test_the_first_question_does_not_wait() -> None:
    assert query().ask(0.0) == Question(index=0, wait=0.0)


def test_an_index_is_asked_to_be_exceeded() -> None:
    machine = query()
    assert answer(machine, 7) == Verdict(changed=True, restarted=False)
    assert next_question(machine) == Question(index=7, wait=55.0)


def test_the_same_index_again_is_no_news() -> None:
    machine = query()
    answer(machine, 7)
    assert answer(machine, 7) == Verdict(changed=False, restarted=False)


def test_an_index_that_goes_backwards_is_a_restart_and_is_forgotten() -> None:
    machine = query()
    answer(machine, 1343)
    assert answer(machine, 12) == Verdict(changed=True, restarted=True)
    assert next_question(machine) == Question(index=0, wait=0.0)


def test_after_a_restart_the_new_index_counts() -> None:
    machine = query()
    answer(machine, 1343)
    answer(machine, 12)
    assert answer(machine, 13) == Verdict(changed=True, restarted=False)
    assert next_question(machine).index == 13


@pytest.mark.parametrize("index", [None, 0, -5])
def test_an_answer_without_a_usable_index_leads_to_polling(index: int | None) -> None:
    machine = query()
    answer(machine, index, at=5.0)
    assert machine.ready_at == 6.0
    assert next_question(machine) == Question(index=0, wait=0.0)


def test_an_early_answer_without_news_is_not_followed_at_once() -> None:
    machine = query()
    answer(machine, 7, at=1.0)
    machine.ask(2.0)
    machine.answered(7, 2.1)
    machine.accept(2.1)
    assert machine.ready_at == pytest.approx(3.1)


def test_the_end_of_the_wait_is_followed_at_once() -> None:
    machine = query()
    answer(machine, 7, at=1.0)
    machine.ask(2.0)
    machine.answered(7, 58.0)
    machine.accept(58.0)
    assert machine.ready_at == pytest.approx(58.01)


@pytest.mark.parametrize("failure", list(Failure))
def test_after_a_failure_the_index_is_forgotten(failure: Failure) -> None:
    machine = query()
    answer(machine, 1343)
    fail(machine, failure)
    assert machine.failures == 1
    assert next_question(machine) == Question(index=0, wait=0.0)


def test_an_agent_that_was_away_may_have_restarted_even_if_its_index_is_larger() -> None:
    machine = query()
    answer(machine, 7)
    fail(machine, Failure.UNREACHABLE)
    fail(machine, Failure.UNAVAILABLE)
    assert answer(machine, 900) == Verdict(changed=True, restarted=True)
    assert answer(machine, 901) == Verdict(changed=True, restarted=False)


def test_a_leader_that_is_lost_is_no_restart() -> None:
    machine = query()
    answer(machine, 7)
    fail(machine, Failure.UNAVAILABLE)
    assert answer(machine, 9) == Verdict(changed=True, restarted=False)


def test_an_agent_that_was_never_read_cannot_have_restarted() -> None:
    machine = query()
    fail(machine, Failure.UNREACHABLE)
    assert answer(machine, 9) == Verdict(changed=True, restarted=False)


def test_a_restart_is_not_forgotten_when_the_answer_that_shows_it_is_refused() -> None:
    machine = query()
    answer(machine, 1343)
    machine.ask(machine.ready_at)
    assert machine.answered(12, 100.0).restarted
    machine.failed(Failure.DOUBTFUL, 100.0)
    assert answer(machine, 13) == Verdict(changed=True, restarted=True)


def test_backoff_grows_and_is_bounded() -> None:
    machine = query()
    waits = []
    for _ in range(40):
        now = max(machine.ready_at, 0.0)
        machine.ask(now)
        machine.failed(Failure.UNREACHABLE, now)
        waits.append(machine.ready_at - now)
    assert 0.1 <= waits[0] <= 0.2
    assert all(1.5 <= wait <= 3.0 + 1e-9 for wait in waits[5:])


@pytest.mark.parametrize("failure", [Failure.FORBIDDEN, Failure.DOUBTFUL])
def test_what_passes_by_itself_is_asked_again_quickly_at_first(failure: Failure) -> None:
    machine = query()
    for number in range(20):
        now = max(machine.ready_at, 0.0)
        machine.ask(now)
        machine.failed(failure, now)
        wait = machine.ready_at - now
        assert 0.1 <= wait <= 0.2 + 1e-9 if number < 10 else wait > 1.0


def test_illegal_events_raise_and_change_nothing() -> None:
    machine = query()
    with pytest.raises(InvalidTransitionError):
        machine.answered(1, 0.0)
    with pytest.raises(InvalidTransitionError):
        machine.failed(Failure.MALFORMED, 0.0)
    with pytest.raises(InvalidTransitionError):
        machine.accept(0.0)
    machine.ask(0.0)
    with pytest.raises(InvalidTransitionError):
        machine.ask(0.0)
    machine.answered(1, 0.0)
    with pytest.raises(InvalidTransitionError):
        machine.answered(1, 0.0)
    machine.accept(0.0)
    with pytest.raises(InvalidTransitionError, match="too early"):
        machine.ask(0.0)


class Queries(RuleBasedStateMachine):
    """Against a Consul that changes and restarts: no change is ever waited past, and no question comes too early."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.machine = query()
        self.index = 5
        self.seen: tuple[int, int] | None = None
        self.epoch = 0
        self.question: Question | None = None

    @rule(seconds=st.sampled_from([0.001, 0.2, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def change(self) -> None:
        self.index += 1

    @rule(lost=st.booleans())
    def restart(self, lost: bool) -> None:
        if lost:
            self.epoch += 1
            self.index = 1
        if self.question is not None:
            self.machine.failed(Failure.UNREACHABLE, self.now)
            self.question = None

    @precondition(lambda self: self.question is None)
    @rule()
    def ask(self) -> None:
        self.now = max(self.now, self.machine.ready_at)
        self.question = self.machine.ask(self.now)

    @precondition(lambda self: self.question is not None)
    @rule()
    def respond(self) -> None:
        assert self.question is not None
        if self.question.index == 0 or self.index > self.question.index:
            verdict = self.machine.answered(self.index, self.now)
            assert verdict.changed
            self.machine.accept(self.now)
            assert self.machine.failures == 0
            self.seen = (self.epoch, self.index)
        else:
            self.now += self.question.wait
            # Nothing wakes it. What a restart brought must not lie below the index that it waits for.
            assert not self.machine.answered(self.question.index, self.now).changed
            self.machine.accept(self.now)
        self.question = None

    @precondition(lambda self: self.question is not None)
    @rule(failure=st.sampled_from(Failure))
    def fail(self, failure: Failure) -> None:
        self.machine.failed(failure, self.now)
        self.question = None
        assert self.now < self.machine.ready_at <= self.now + 3.0 + 1e-9

    @invariant()
    def it_never_waits_for_an_index_that_it_has_not_seen(self) -> None:
        if self.question is not None and self.question.index:
            assert self.seen is not None
            assert self.question.index == self.seen[1]


TestQueries = Queries.TestCase
