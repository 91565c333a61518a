"""When changes are published."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from types import MappingProxyType

import pytest

from control_plane.policies import PolicyBook
from control_plane.publisher import Debounce, Publisher
from control_plane.snapshot import EMPTY, Snapshot, build_snapshot
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import ResourceKind
from mesh_client.core.policy import ServicePolicy


class TestDebounce:
    def test_nothing_is_due_without_a_change(self) -> None:
        debounce = Debounce()
        assert debounce.deadline() is None
        assert not debounce.due(1e6)

    def test_a_single_change_is_due_after_the_quiet_period(self) -> None:
        debounce = Debounce(quiet=0.02, maximum=0.2)
        debounce.touch(10.0)
        assert debounce.deadline() == 10.02
        assert not debounce.due(10.019)
        assert debounce.due(10.02)

    def test_each_change_starts_the_quiet_period_again(self) -> None:
        debounce = Debounce(quiet=0.02, maximum=0.2)
        debounce.touch(10.0)
        debounce.touch(10.015)
        assert debounce.deadline() == pytest.approx(10.035)

    def test_changes_without_end_are_published_after_the_maximum_delay(self) -> None:
        debounce = Debounce(quiet=0.02, maximum=0.2)
        for step in range(100):
            debounce.touch(10.0 + step / 100)
        assert debounce.deadline() == 10.2

    def test_after_a_reset_the_next_change_counts_anew(self) -> None:
        debounce = Debounce(quiet=0.02, maximum=0.2)
        debounce.touch(10.0)
        debounce.reset()
        assert not debounce.due(11.0)
        debounce.touch(20.0)
        assert debounce.deadline() == 20.02

    @pytest.mark.parametrize(("quiet", "maximum"), [(-0.1, 0.2), (0.3, 0.2), (float("nan"), 0.2)])
    def test_times_outside_their_range_are_refused(self, quiet: float, maximum: float) -> None:
        with pytest.raises(InvalidValueError, match="debounce"):
            Debounce(quiet, maximum)


class World:
    """What a catalog and a policy book would say."""

    def __init__(self, quiet: float = 0.0, maximum: float = 10.0) -> None:
        self.services: set[str] = set()
        self.deadline: float | None = None
        self.compiled = 0
        self.published: asyncio.Queue[tuple[Snapshot, frozenset[tuple[ResourceKind, str]]]] = asyncio.Queue()
        self.book = PolicyBook(ServicePolicy)
        self.publisher = Publisher(self.compile, Debounce(quiet, maximum))
        self.publisher.listen(lambda snapshot, changed: self.published.put_nowait((snapshot, changed)))

    def compile(self, previous: Snapshot, now: float) -> tuple[Snapshot, float | None]:
        self.compiled += 1
        deadline, self.deadline = self.deadline, None
        return build_snapshot(dict.fromkeys(self.services, ()), self.book.policy, previous), deadline

    def add(self, name: str) -> None:
        self.services.add(name)
        self.publisher.notify()

    async def next(self) -> tuple[Snapshot, frozenset[tuple[ResourceKind, str]]]:
        async with asyncio.timeout(30.0):
            return await self.published.get()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    world.publisher.open()
    yield world
    world.publisher.close()


class TestPublisher:
    async def test_a_change_is_published_with_what_changed(self, world: World) -> None:
        world.add("orders")
        snapshot, changed = await world.next()
        assert changed == {(ResourceKind.POLICY, "orders"), (ResourceKind.ENDPOINTS, "orders")}
        assert world.publisher.snapshot is snapshot

    async def test_changes_that_come_together_are_published_together(self) -> None:
        world = World(quiet=0.02, maximum=5.0)
        world.publisher.open()
        for number in range(20):
            world.add(f"s{number}")
        snapshot, _ = await world.next()
        assert len(snapshot.endpoints) == 20
        assert world.compiled == 2
        world.publisher.close()

    async def test_a_stream_of_changes_is_published_after_the_maximum_delay(self) -> None:
        world = World(quiet=0.05, maximum=0.1)
        world.publisher.open()
        async with asyncio.timeout(30.0):
            for number in itertools.count():
                world.add(f"s{number}")
                await asyncio.sleep(0.001)
                if not world.published.empty():
                    break
        assert "s0" in world.published.get_nowait()[0].endpoints
        world.publisher.close()

    async def test_nothing_is_published_before_the_first_time_is_asked_for(self) -> None:
        world = World()
        world.add("orders")
        world.publisher.publish_now()
        assert world.publisher.snapshot is EMPTY
        world.publisher.open()
        assert world.published.get_nowait()
        world.publisher.close()

    async def test_a_drain_does_not_wait_for_quiet(self) -> None:
        world = World(quiet=10.0, maximum=10.0)
        world.publisher.open()
        world.add("orders")
        world.publisher.publish_now()
        assert world.published.qsize() == 1
        world.publisher.close()

    async def test_what_changes_nothing_wakes_nobody(self, world: World) -> None:
        compiled = world.compiled
        world.publisher.publish_now()
        assert world.compiled == compiled + 1
        assert world.published.empty()

    async def test_what_changes_by_time_alone_is_published_at_its_time(self, world: World) -> None:
        world.deadline = asyncio.get_running_loop().time() + 0.01
        world.publisher.publish_now()
        world.services.add("orders")
        snapshot, _ = await world.next()
        assert "orders" in snapshot.endpoints

    async def test_a_change_before_a_distant_deadline_is_not_delayed_by_it(self, world: World) -> None:
        world.deadline = asyncio.get_running_loop().time() + 1000.0
        world.publisher.publish_now()
        world.add("orders")
        await world.next()

    async def test_an_inconsistent_snapshot_is_not_published_and_the_last_good_one_stays(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.add("orders")
        good, _ = await world.next()
        broken = Publisher(lambda previous, now: (Snapshot(good.policies, MappingProxyType({})), None), Debounce())
        with caplog.at_level(logging.CRITICAL + 1):
            broken.open()
        assert broken.snapshot is EMPTY
        broken.close()
