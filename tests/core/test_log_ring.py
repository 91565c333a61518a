from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_client.core.log_entry import LogEntry
from mesh_client.core.log_ring import LogFilter, LogRing

ALL = LogFilter()


def entry(number: int, level: int = 20, logger: str = "shop", length: int = 1) -> LogEntry:
    return LogEntry(float(number), level, logger, "m" * length)


def test_the_newest_are_kept_and_given_oldest_first() -> None:
    ring = LogRing(max_entries=3)
    for number in range(5):
        ring.append(entry(number))
    assert [each.entry.time for each in ring.last(10, ALL)] == [2.0, 3.0, 4.0]
    assert [each.entry.time for each in ring.last(2, ALL)] == [3.0, 4.0]
    assert ring.last(0, ALL) == []
    assert [each.sequence for each in ring.last(10, ALL, after=3)] == [4, 5]
    assert ring.last(10, ALL, after=5) == []
    assert ring.forgotten == 2


@settings(max_examples=40)
@given(st.lists(st.integers(min_value=0, max_value=20_000), max_size=40))
def test_neither_bound_is_ever_passed(lengths: list[int]) -> None:
    ring = LogRing(max_entries=20, max_size=30_000)
    for number, length in enumerate(lengths):
        kept = ring.append(entry(number, length=length))
        found = ring.last(100, ALL)
        assert found[-1] is kept
        assert len(found) <= 20
        assert sum(each.size for each in found) <= 30_000
    assert ring.forgotten + len(ring.last(100, ALL)) == len(lengths)


def test_the_wanted_are_found_by_level_and_logger() -> None:
    ring = LogRing()
    for number, (level, logger) in enumerate([(10, "shop"), (30, "shop.db"), (40, "shopping"), (30, "mesh")]):
        ring.append(entry(number, level, logger))

    def found(level: int, logger: str = "") -> list[float]:
        return [each.entry.time for each in ring.last(10, LogFilter(level, logger))]

    assert found(0) == [0.0, 1.0, 2.0, 3.0]
    assert found(30) == [1.0, 2.0, 3.0]
    assert found(0, "shop") == [0.0, 1.0]
    assert found(20, "shop.db") == [1.0]
