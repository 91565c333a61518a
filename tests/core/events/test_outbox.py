"""The outbox's relay, as a model and by example: nothing is lost, keys stay in order, few are on their way at once."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.events.outbox import RETURN_DELAYS, OutboxRelay

WINDOW = 4


class RelayModel(RuleBasedStateMachine):
    """A table, a broker that confirms, returns and forgets, a connection that breaks, and a relay that may be new."""

    def __init__(self) -> None:
        super().__init__()
        self.relay = OutboxRelay(WINDOW)
        self.table: dict[int, str] = {}
        self.number = 0
        self.sent: list[int] = []
        """On their way, in order of sending."""
        self.arrived: list[int] = []
        """What the broker has, with duplicates."""
        self.keys: dict[int, str] = {}
        self.now = 0.0

    @rule(key=st.sampled_from(["", "a", "b", "c"]), count=st.integers(1, 3))
    def publish(self, key: str, count: int) -> None:
        for _ in range(count):
            self.number += 1
            self.table[self.number] = self.keys[self.number] = key

    @rule(limit=st.integers(1, 8))
    def read(self, limit: int) -> None:
        rows = [row for row in sorted(self.table.items()) if row[0] > self.relay.last]
        self.relay.learn(rows[:limit])

    @rule()
    def read_again(self) -> None:
        self.relay.learn([row for row in sorted(self.table.items()) if row[0] <= self.relay.last])

    @rule(passed=st.floats(0.0, 40.0))
    def send(self, passed: float) -> None:
        self.now += passed
        self.sent += self.relay.take(self.now)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.sent))
        self.sent.remove(number)
        self.arrived.append(number)
        self.relay.settled(number)
        del self.table[number]

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.sent))
        self.sent.remove(number)
        assert self.relay.returned(number, self.now) in RETURN_DELAYS

    @rule(data=st.data())
    def break_connection(self, data: st.DataObject) -> None:
        """What is on its way arrives up to some point; nobody hears of it."""
        self.arrived += self.sent[: data.draw(st.integers(0, len(self.sent)))]
        self.sent.clear()
        self.relay.lost()

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """The process ends; another one begins with the table."""
        self.arrived += self.sent[: data.draw(st.integers(0, len(self.sent)))]
        self.sent.clear()
        self.relay = OutboxRelay(WINDOW)

    @invariant()
    def no_more_than_the_window_is_on_its_way(self) -> None:
        assert self.relay.in_flight == len(self.sent) <= WINDOW
        assert self.relay.idle >= self.relay.in_flight
        assert self.relay.known >= self.relay.held + self.relay.in_flight

    @invariant()
    def of_each_key_one_is_on_its_way(self) -> None:
        keyed = [self.keys[number] for number in self.sent if self.keys[number]]
        assert len(keyed) == len(set(keyed))

    @invariant()
    def first_arrivals_of_each_key_are_in_order(self) -> None:
        first: dict[str, list[int]] = defaultdict(list)
        for number in dict.fromkeys(self.arrived):
            if self.keys[number]:
                first[self.keys[number]].append(number)
        assert all(numbers == sorted(numbers) for numbers in first.values())

    def teardown(self) -> None:
        """Once the broker works and the relay reads, everything arrives."""
        for _ in range(4 * self.number + 10):
            self.read(8)
            self.send(max(RETURN_DELAYS))
            while self.sent:
                number = self.sent.pop(0)
                self.arrived.append(number)
                self.relay.settled(number)
                del self.table[number]
        assert set(self.arrived) == set(range(1, self.number + 1))
        assert self.table == {}
        assert (self.relay.known, self.relay.held, self.relay.next_due) == (0, 0, None)
        self.first_arrivals_of_each_key_are_in_order()


TestRelayModel = RelayModel.TestCase


def test_what_comes_back_is_sent_again_later_and_later_and_its_key_waits() -> None:
    relay = OutboxRelay(10)
    relay.learn([(1, "a"), (2, "a"), (3, "b")])
    now = 0.0
    assert list(relay.take(now)) == [1, 3]
    relay.settled(3)
    for delay in (*RETURN_DELAYS, RETURN_DELAYS[-1]):
        assert relay.returned(1, now) == delay
        assert relay.next_due == now + delay
        assert list(relay.take(now + delay / 2)) == []
        now += delay
        assert list(relay.take(now)) == [1]
    relay.settled(1)
    assert list(relay.take(now)) == [2]


def test_an_event_that_is_not_on_its_way_can_neither_be_confirmed_nor_come_back() -> None:
    relay = OutboxRelay(1)
    relay.learn([(1, ""), (2, "")])
    assert list(relay.take(0.0)) == [1]
    for number in (2, 3):
        with pytest.raises(InvalidTransitionError, match=f"event {number} is not on its way"):
            relay.settled(number)
    with pytest.raises(InvalidTransitionError):
        relay.returned(2, 0.0)
    relay.settled(1)
    assert list(relay.take(0.0)) == [2]


def test_the_window_may_be_narrowed() -> None:
    relay = OutboxRelay(3)
    relay.learn((number, "") for number in range(1, 6))
    relay.window = 1
    assert list(relay.take(0.0)) == [1]
    relay.window = 3
    assert list(relay.take(0.0)) == [2, 3]
