"""Turns of services without a watch of their own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control_plane.sources.poll_queue import PollQueue


def test_a_new_service_is_polled_at_once_and_then_every_interval() -> None:
    queue = PollQueue(interval=30.0)
    queue.add("a", 0.0)
    queue.add("a", 5.0)
    assert queue.next_due() == 0.0
    assert queue.take(0.0) == "a"
    assert queue.take(0.0) is None
    assert queue.services == {"a"}
    queue.put_back("a", 1.0)
    assert queue.take(30.9) is None
    assert queue.take(31.0) == "a"


def test_an_empty_queue_has_nothing_to_do() -> None:
    queue = PollQueue()
    assert queue.next_due() is None
    assert queue.take(0.0) is None


def test_a_triggered_service_is_next() -> None:
    queue = PollQueue(interval=30.0)
    for name in ("a", "b"):
        queue.add(name, 0.0)
        queue.take(0.0)
        queue.put_back(name, 0.0)
    queue.trigger(["b", "unknown"], 10.0)
    assert queue.take(10.0) == "b"
    assert queue.take(10.0) is None


def test_a_trigger_for_later_does_not_put_off_what_is_due_sooner() -> None:
    queue = PollQueue(interval=30.0)
    queue.add("a", 0.0)
    queue.trigger(["a"], 50.0)
    assert queue.next_due() == 0.0


def test_a_trigger_during_a_poll_leads_to_another_one_at_once() -> None:
    queue = PollQueue(interval=30.0)
    queue.add("a", 0.0)
    queue.take(0.0)
    queue.trigger(["a"], 0.5)
    assert queue.take(0.5) is None
    queue.put_back("a", 1.0)
    assert queue.take(1.0) == "a"


def test_a_discarded_service_is_not_polled_again() -> None:
    queue = PollQueue()
    queue.add("a", 0.0)
    queue.discard("a")
    assert queue.take(0.0) is None
    queue.add("b", 0.0)
    queue.take(0.0)
    queue.discard("b")
    queue.put_back("b", 1.0)
    assert queue.services == frozenset()
    assert queue.next_due() is None


def test_a_failed_poll_may_be_repeated_soon() -> None:
    queue = PollQueue(interval=30.0)
    queue.add("a", 0.0)
    queue.take(0.0)
    queue.put_back("a", 1.0, delay=2.0)
    assert queue.next_due() == 3.0


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "put", "trigger", "discard"]), st.sampled_from("abc"))))
def test_nobody_waits_longer_than_the_interval(steps: list[tuple[str, str]]) -> None:
    queue = PollQueue(interval=30.0)
    now = 0.0
    polling: set[str] = set()
    for step, name in steps:
        now += 1.0
        if step == "add":
            queue.add(name, now)
        elif step == "trigger":
            queue.trigger([name], now)
        elif step == "discard":
            queue.discard(name)
            polling.discard(name)
        elif step == "put" and polling:
            queue.put_back(polling.pop(), now)
        elif step == "take":
            taken = queue.take(now)
            if taken is not None:
                assert taken not in polling
                polling.add(taken)
    waiting = queue.services - polling
    taken_later = set()
    while (taken := queue.take(now + 30.0)) is not None:
        taken_later.add(taken)
    assert taken_later == waiting
