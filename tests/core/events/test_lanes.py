"""Which deliveries are handled now: order by key, concurrency, waiting behind retries, and suspects."""

from __future__ import annotations

from collections import defaultdict
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.events.lanes import RETURN_PATIENCE, SUSPECT_AFTER, SUSPECT_QUIET, Defer, Delivery, Lanes, Run

DELAYS = (1.0, 5.0)


class World:
    """Lanes, and short ways to talk to them. Deliveries are named by key and number, such as ``a1``."""

    def __init__(self, concurrency: int = 2, *, ordered: bool = True) -> None:
        self.lanes = Lanes(concurrency, DELAYS, Random(1), ordered=ordered)
        self.tag = 0
        self.deliveries: dict[str, Delivery] = {}
        self.now = 0.0
        self.wait = 0.0

    def arrive(self, *names: str, deliveries: int = 0) -> None:
        for name in names:
            self.tag += 1
            key = "" if name[0] == "-" else name[0]
            self.deliveries[name] = Delivery(self.tag, name, key, deliveries)
            self.wait = self.lanes.arrived(self.deliveries[name], self.now)

    def next(self) -> list[str]:
        """``a1`` for one that is handled, ``a1>0`` for one that is deferred to level 0."""
        return [
            action.delivery.id if isinstance(action, Run) else f"{action.delivery.id}>{action.level}"
            for action in self.lanes.next(self.now)
        ]

    def finish(self, *names: str) -> list[str]:
        for name in names:
            self.lanes.finished(self.deliveries[name])
        return self.next()

    def postpone(self, name: str, level: int = 0) -> list[str]:
        self.lanes.postponed(self.deliveries[name], level, self.now)
        return self.next()


def test_the_concurrency_can_change_while_handlers_run() -> None:
    world = World(2)
    world.arrive("a1", "b1", "c1", "d1")
    assert world.next() == ["a1", "b1"]
    world.lanes.concurrency = 1
    assert world.finish("a1") == []
    assert world.finish("b1") == ["c1"]
    world.lanes.concurrency = 2
    assert world.next() == ["d1"]


def test_one_of_each_key_runs_and_no_more_than_the_concurrency_allows() -> None:
    world = World(2)
    world.arrive("a1", "a2", "b1", "c1", "-1")
    assert world.next() == ["a1", "b1"]
    assert (world.lanes.running, world.lanes.waiting) == (2, 3)
    assert world.finish("a1") == ["c1"]
    assert world.finish("b1") == ["-1"]
    assert world.finish("c1") == ["a2"]
    assert world.finish("-1", "a2") == []
    assert (world.lanes.running, world.lanes.waiting) == (0, 0)


def test_without_order_keys_have_no_lanes_and_retries_hold_nobody_up() -> None:
    world = World(3, ordered=False)
    world.arrive("a1", "a2", "a3")
    assert world.next() == ["a1", "a2", "a3"]
    assert world.postpone("a1") == []
    world.arrive("a4")
    assert world.next() == ["a4"]


def test_events_without_a_key_are_not_held_up_by_one_that_waits() -> None:
    world = World(1)
    world.arrive("-1", "-2")
    assert world.next() == ["-1"]
    assert world.postpone("-1") == ["-2"]


def test_what_is_delivered_twice_is_not_handled_twice_at_once() -> None:
    world = World(4)
    world.arrive("-1")
    assert world.next() == ["-1"]
    first = world.deliveries["-1"]
    world.arrive("-1")
    assert world.next() == []
    world.lanes.finished(first)
    assert world.next() == ["-1"]


def test_those_behind_one_that_is_tried_again_wait_behind_it_in_order() -> None:
    world = World(2)
    world.arrive("a1", "a2", "a3", "b1")
    assert world.next() == ["a1", "b1"]
    assert world.postpone("a1", 0) == ["a2>0", "a3>0"]
    world.arrive("a4")
    assert world.next() == ["a4>0"]
    # They come back in the order in which they were sent to wait; the first fails again, and waits longer.
    world.arrive("a1")
    assert world.next() == ["a1"]
    world.arrive("a2")
    assert world.postpone("a1", 1) == ["a2>1"]
    world.arrive("a3", "a4", "a5")
    assert world.next() == ["a3>1", "a4>1", "a5>1"]
    world.arrive("a1")
    assert world.next() == ["a1"]
    assert world.finish("a1") == []
    for name in ("a2", "a3", "a4", "a5"):
        world.arrive(name)
        assert world.next() == [name]
        assert world.finish(name) == []
    world.arrive("a6")
    assert world.next() == ["a6"]


def test_deferring_needs_no_free_handler() -> None:
    world = World(1)
    world.arrive("a1")
    assert world.next() == ["a1"]
    assert world.postpone("a1") == []
    world.arrive("b1", "a2")
    assert world.next() == ["b1", "a2>0"]


def test_one_that_never_comes_back_is_not_waited_for_for_ever() -> None:
    world = World()
    world.arrive("a1")
    assert world.next() == ["a1"]
    assert world.postpone("a1") == []
    world.now += DELAYS[0] + RETURN_PATIENCE + 0.1
    world.arrive("a2")
    assert world.next() == ["a2"]


def test_a_lost_connection_drops_what_waits_and_lets_what_runs_end() -> None:
    world = World(2)
    world.arrive("a1", "a2", "b1", "c1")
    assert world.next() == ["a1", "b1"]
    assert world.postpone("b1") == ["c1"]
    assert {delivery.id for delivery in world.lanes.reset()} == {"a2"}
    old = world.deliveries["a1"]
    world.arrive("a1", "b2")
    assert world.next() == []
    world.lanes.finished(old)
    assert world.next() == ["b2"]
    assert world.finish("c1") == ["a1"]


def test_suspects_run_alone_the_last_one_first_then_the_first_then_any() -> None:
    world = World(4)
    world.arrive("a1")
    assert world.next() == ["a1"]
    world.arrive("b1", "c1", "d1", deliveries=SUSPECT_AFTER)
    assert world.wait == SUSPECT_QUIET
    assert world.finish("a1") == []  # more of them may be on their way
    world.now += SUSPECT_QUIET
    world.arrive("a2")
    assert world.wait == 0.0
    assert world.next() == ["d1"]
    world.arrive("e1")
    assert world.finish("d1") == ["c1"]
    assert world.finish("c1") == ["b1"]
    assert world.finish("b1") == ["a2", "e1"]
    second = World(4)
    second.arrive("b1", "c1", "d1", deliveries=SUSPECT_AFTER + 1)
    second.now = SUSPECT_QUIET
    assert second.next() == ["b1"]
    third = World(4)
    third.arrive("b1", "c1", "d1", deliveries=SUSPECT_AFTER + 2)
    third.now = SUSPECT_QUIET
    assert len(third.next()) == 1


@given(st.lists(st.sampled_from("abc-"), min_size=1, max_size=30), st.integers(1, 4), st.integers(0, 1 << 32))
def test_whatever_fails_each_key_is_handled_in_order_and_everything_once(
    keys: list[str], concurrency: int, seed: int
) -> None:
    """The queue and the retry queues as RabbitMQ has them: each first in, first out."""
    random, world = Random(seed), World(concurrency)
    queue = [f"{key}{number}" for number, key in enumerate(keys)]
    retries: list[list[str]] = [[], []]
    running: list[str] = []
    failures: dict[str, int] = defaultdict(int)
    done: list[str] = []
    for _ in range(5_000):
        if not (queue or running or any(retries)):
            break
        move = random.choice(("deliver", "end", "return"))
        if move == "deliver" and queue:
            world.arrive(queue.pop(0))
        elif move == "return" and any(retries):
            queue.append(random.choice([level for level in retries if level]).pop(0))
        elif move == "end" and running:
            name = running.pop(random.randrange(len(running)))
            if failures[name] < 2 and random.random() < 0.4:
                retries[failures[name]].append(name)
                world.lanes.postponed(world.deliveries[name], failures[name], world.now)
                failures[name] += 1
            else:
                done.append(name)
                world.lanes.finished(world.deliveries[name])
        for action in world.lanes.next(world.now):
            if isinstance(action, Defer):
                retries[action.level].append(action.delivery.id)
            else:
                running.append(action.delivery.id)
        assert len(running) <= concurrency
    assert sorted(done) == sorted(f"{key}{number}" for number, key in enumerate(keys))
    for key in "abc":
        numbers = [int(name[1:]) for name in done if name[0] == key]
        assert numbers == sorted(numbers)
