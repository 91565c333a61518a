from __future__ import annotations

from dataclasses import dataclass

from control_plane.operations.roster import ProcessKey, Roster, means


@dataclass(eq=False)
class Member:
    key: ProcessKey
    instances: tuple[str, ...] = ()


def member(service: str, process: str, *instances: str, workload: str = "w") -> Member:
    return Member(ProcessKey(workload, service, process), instances)


def test_each_process_counts_once_by_its_last_stream() -> None:
    roster = Roster[Member]()
    old, new = member("orders", "p1", "orders-1"), member("orders", "p1", "orders-1")
    roster.add(old)
    assert list(roster) == [old]
    roster.add(new)
    assert list(roster) == [new]
    assert roster.streams() == [old, new]
    assert (roster.counts(old), roster.counts(new)) == (False, True)
    assert len(roster) == 2
    roster.remove(old)
    roster.remove(old)
    assert list(roster) == [new]
    roster.remove(new)
    assert list(roster) == []
    assert not roster.counts(new)
    assert len(roster) == 0


def test_a_workload_cannot_take_the_place_of_another_one() -> None:
    roster = Roster[Member]()
    mine, theirs = member("orders", "p1"), member("orders", "p1", workload="other")
    roster.add(mine)
    roster.add(theirs)
    assert len(list(roster)) == 2


def test_they_are_in_order() -> None:
    roster = Roster[Member]()
    for each in (member("b", "1", "x"), member("a", "3", "z"), member("a", "2", "y")):
        roster.add(each)
    assert [each.key.process for each in roster] == ["2", "3", "1"]


def test_operators_mean_a_service_or_one_of_its_processes_by_any_name() -> None:
    process = member("orders", "p1", "orders-1", "orders-host-7")
    assert means(process, "orders", "")
    assert not means(process, "payments", "")
    for name in ("p1", "orders-1", "orders-host-7"):
        assert means(process, "orders", name)
        assert not means(process, "payments", name)
    assert not means(process, "orders", "orders-2")
