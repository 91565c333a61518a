"""From cumulative counters to what happened when: nothing lost, nothing twice, nothing believed that cannot be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.subscription import ClientNode
from control_plane.telemetry.recorder import (
    MAX_SERVICES,
    OutboxReport,
    ProcessState,
    Recorder,
    Session,
    SupersededError,
    TooManyReportersError,
)
from control_plane.telemetry.timeline import BUSY, CODES, PEAK, WINDOW
from control_plane.telemetry.window import EndpointKey, FailureKey, Limits, MethodKey, ReceivedKey, Window
from mesh_client.core.errors import InvalidValueError, Reason
from mesh_client.core.events.state import RelayState
from mesh_client.core.load_report import (
    CalledService,
    EndpointTotals,
    FailureTotals,
    LoadReport,
    MethodTotals,
    ReceivedTotals,
    ServedInstance,
    Totals,
)
from mesh_client.core.tally import OTHER
from tests.control_plane.load_reports import PLACE, Process

OK = CODES["OK"]


class World:
    """A recorder with its window."""

    def __init__(self, **limits: int) -> None:
        self.limits = Limits(**limits)
        self.window = Window(self.limits)
        self.recorder = Recorder(self.window, self.limits)

    def open(self, process: Process, now: float, owner: str = "w1") -> Session:
        return self.recorder.open(process.node, process.epoch, now - process.began, owner, now)

    def report(self, process: Process, session: Session, now: float) -> None:
        self.recorder.take(session, process.report(now), now)

    def calls(self) -> dict[MethodKey, int]:
        """Calls within the window that ended well, by name."""
        sums = self.window.methods.grouped(-9, lambda key: key)
        return {key: counters.get(OK, 0) for key, counters in sums.items()}

    def steps(self, key: MethodKey) -> dict[int, int]:
        return {step: counters[OK] for step, counters in self.window.methods.steps(key, 0)}


EDGE = MethodKey("checkout", "orders", PLACE)


def totals(**codes: int) -> Totals:
    return Totals(codes, {10: sum(codes.values())})


def called(count: int, service: str = "orders", method: str = PLACE) -> LoadReport:
    return LoadReport(5.0, (CalledService(service, methods=(MethodTotals(method, totals(OK=count), count),)),))


def test_what_is_above_the_last_value_is_new() -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    for now, count in ((5.0, 3), (10.0, 0), (15.0, 4)):
        process.calls(count)
        world.report(process, session, now)
    assert world.calls() == {EDGE: 7}
    (reporter,) = world.recorder.reporters
    assert reporter.calls == {"orders": 7}
    assert world.recorder.taken == 3


def test_a_process_that_comes_back_goes_on_where_it_was_and_what_it_did_meanwhile_counts_for_that_time() -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    process.calls(10)
    world.report(process, session, 5.0)
    world.recorder.close(session, 6.0)
    assert world.recorder.connected == 0
    process.calls(40)
    process.builder.reset()
    session = world.open(process, 45.0)
    world.report(process, session, 45.0)
    assert world.recorder.connected == 1
    assert world.steps(EDGE) == {0: 15, 1: 10, 2: 10, 3: 10, 4: 5}


def test_a_recorder_that_was_restarted_knows_the_total_and_spreads_it_over_the_life_of_the_process() -> None:
    process = Process(began=0.0)
    process.calls(1000)
    process.report(99.0)
    process.builder.reset()
    world = World()
    world.report(process, world.open(process, 100.0), 100.0)
    (reporter,) = world.recorder.reporters
    assert reporter.calls == {"orders": 1000}
    assert world.steps(EDGE) == dict.fromkeys(range(10), 100)


def test_a_process_that_was_restarted_counts_from_nothing() -> None:
    world, before, after = World(), Process(), Process(began=20.0)
    session = world.open(before, 0.0)
    before.calls(5)
    world.report(before, session, 5.0)
    world.recorder.close(session, 6.0)
    after.calls(3)
    world.report(after, world.open(after, 21.0), 21.0)
    assert world.calls() == {EDGE: 8}
    assert [each.calls for each in world.recorder.reporters] == [{"orders": 5}, {"orders": 3}]


def test_a_report_in_parts_covers_the_same_time_in_each() -> None:
    world, process = World(), Process()
    session = world.open(process, 10.0)
    world.recorder.take(session, called(6), 10.0, more=True)
    world.recorder.take(session, called(6, method="/s/M"), 10.0)
    assert world.recorder.taken == 1
    other = MethodKey("checkout", "orders", "/s/M")
    assert world.calls() == {EDGE: 6, other: 6}
    assert world.steps(EDGE) == world.steps(other)


def test_an_older_stream_of_a_process_does_not_count_any_more() -> None:
    world, process = World(), Process()
    old = world.open(process, 0.0)
    new = world.open(process, 1.0)
    with pytest.raises(SupersededError, match="another stream"):
        world.report(process, old, 2.0)
    world.recorder.close(old, 3.0)
    assert world.recorder.connected == 1
    world.recorder.close(new, 4.0)
    assert world.recorder.connected == 0


def test_a_counter_that_falls_has_begun_anew() -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    for count in (5, 2, 3):
        world.recorder.take(session, called(count), 1.0)
    assert world.calls() == {EDGE: 8}


@pytest.mark.parametrize(
    ("report", "what"),
    [
        (called(10**7 * 2), "grow by at most 1000000 a second"),
        (called(2**64 - 1), "grow by at most"),
        (LoadReport(5.0, (*called(1).called, *called(1).called)), "each counter once"),
        (
            LoadReport(5.0, served=(ServedInstance("checkout", "c-1", 0, 0, 2**63, 0, 0),)),
            "grow by at most",
        ),
    ],
)
def test_nothing_counts_of_a_report_that_cannot_be_true(report: LoadReport, what: str) -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    with pytest.raises(InvalidValueError, match=what):
        world.recorder.take(
            session, dataclasses.replace(report, called=(*called(1, "stock").called, *report.called)), 1.0
        )
    assert world.calls() == {}


@pytest.mark.parametrize("uptime", [-1.0, float("nan"), float("inf"), 1e12])
def test_an_uptime_that_cannot_be_is_refused(uptime: float) -> None:
    with pytest.raises(InvalidValueError, match="uptime"):
        World().recorder.open(ClientNode("n", "checkout"), "e", uptime, "", 0.0)


@pytest.mark.parametrize("epoch", ["", "x" * 65, "a b", "\x00"])
def test_an_epoch_that_cannot_be_is_refused(epoch: str) -> None:
    with pytest.raises(InvalidValueError, match="epoch"):
        World().recorder.open(ClientNode("n", "checkout"), epoch, 0.0, "", 0.0)


@pytest.mark.parametrize("covers", [-5.0, 1e300])
def test_a_span_that_cannot_be_harms_nothing(covers: float) -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    world.recorder.take(session, called(1), 1.0)
    world.recorder.take(session, dataclasses.replace(called(2), covers=covers), 2.0)
    assert sum(world.calls().values()) in {1, 2}


def test_processes_of_one_workload_are_bounded_and_the_one_that_went_first_makes_room() -> None:
    world = World(reporters_of_one=2)
    first = world.open(Process("p1"), 0.0)
    world.open(Process("p2"), 1.0)
    with pytest.raises(TooManyReportersError, match="2 processes of this workload"):
        world.open(Process("p3"), 2.0)
    world.open(Process("p4"), 2.0, owner="another")
    world.recorder.close(first, 3.0)
    world.open(Process("p3"), 4.0)
    assert [each.node.id for each in world.recorder.reporters] == ["p2", "p4", "p3"]


def test_processes_are_bounded_in_all() -> None:
    world = World(reporters=2)
    world.open(Process("p1"), 0.0, owner="")
    world.open(Process("p2"), 0.0, owner="")
    with pytest.raises(TooManyReportersError, match="2 processes report already"):
        world.open(Process("p3"), 0.0, owner="")


def test_counters_of_one_process_and_of_all_are_bounded() -> None:
    world = World(series_of_one=2, series=3)
    one, two = Process("p1"), Process("p2")
    session = world.open(one, 0.0)
    for number in range(3):
        world.recorder.take(session, called(1, method=f"/s/M{number}"), 1.0)
    assert world.recorder.ignored == 1
    other = world.open(two, 0.0, "w2")
    for number in range(2):
        world.recorder.take(other, called(1, method=f"/s/M{number}"), 1.0)
    assert world.recorder.ignored == 2
    assert sum(world.calls().values()) == 3
    world.recorder.close(session, 2.0)
    world.recorder.expire(2.0 + WINDOW)
    world.recorder.take(other, called(1, method="/s/M9"), 2.0)
    assert world.recorder.ignored == 2


def test_names_past_the_budget_of_a_service_count_together_and_leave_room_for_others() -> None:
    world = World(keys_of_one=2, keys=5)
    session = world.open(Process("p1", "noisy"), 0.0)
    for number in range(4):
        world.recorder.take(session, called(1, service=f"s{number}", method=f"/s/M{number}"), 1.0)
    assert world.calls() == {
        MethodKey("noisy", "s0", "/s/M0"): 1,
        MethodKey("noisy", "s1", "/s/M1"): 1,
        MethodKey("noisy", OTHER, OTHER): 2,
    }
    quiet = world.open(Process("p2", "quiet"), 0.0, "w2")
    for number in range(2):
        world.recorder.take(quiet, called(1, method=f"/s/M{number}"), 1.0)
    assert world.calls()[MethodKey("quiet", "orders", "/s/M1")] == 1


def test_methods_past_the_budget_count_for_their_service_while_there_is_room_for_that() -> None:
    world = World(keys_of_one=3)
    session = world.open(Process("p1", "noisy"), 0.0)
    world.recorder.take(session, called(1, method="/s/M0"), 1.0)
    world.recorder.take(session, called(1, method=OTHER), 1.0)
    for number in range(1, 5):
        world.recorder.take(session, called(1, method=f"/s/M{number}"), 1.0)
    assert world.calls() == {
        MethodKey("noisy", "orders", "/s/M0"): 1,
        MethodKey("noisy", "orders", OTHER): 4,
        MethodKey("noisy", "orders", "/s/M1"): 1,
    }


def test_every_kind_of_name_has_a_common_one() -> None:
    assert EndpointKey("a", "b", "c").folded() == (EndpointKey("a", "b", OTHER), EndpointKey("a", OTHER, OTHER))
    failure = FailureKey("a", "b", "/s/M", "INTERNAL", Reason.ATTEMPTS_FAILED)
    assert failure.folded() == (
        FailureKey("a", "b", OTHER, "INTERNAL", Reason.ATTEMPTS_FAILED),
        FailureKey("a", OTHER, OTHER, "UNKNOWN", None),
    )
    assert ReceivedKey("a", "b", "c", "/s/M").folded() == (
        ReceivedKey("a", "b", OTHER, OTHER),
        ReceivedKey("a", OTHER, OTHER, OTHER),
    )


def test_failures_come_with_their_last_example() -> None:
    world, one, two = World(), Process("p1"), Process("p2")
    sessions = [world.open(one, 0.0), world.open(two, 0.0)]
    one.fails(2, now=3.0)
    two.fails(1, now=2.0)
    world.report(one, sessions[0], 5.0)
    world.report(two, sessions[1], 5.0)
    key = FailureKey("checkout", "orders", PLACE, "UNAVAILABLE", Reason.ATTEMPTS_FAILED)
    assert world.window.failures.grouped(0, lambda each: each) == {key: {CODES["UNAVAILABLE"]: 3}}
    assert (world.window.examples[key].node_id, world.window.examples[key].example.at) == ("p1", 3.0)
    world.recorder.expire(5.0 + WINDOW + 10.0)
    assert (len(world.window.failures), world.window.examples) == (0, {})


def test_an_example_of_what_is_not_kept_is_not_kept_either() -> None:
    world, process = World(keys=0), Process()
    process.fails()
    world.report(process, world.open(process, 0.0), 5.0)
    assert world.window.examples == {}


def test_what_a_server_received_is_kept_by_instance_caller_and_method() -> None:
    world, process = World(), Process("orders-1", "orders")
    process.receives(4, "checkout", took=0.5)
    process.book.peak, process.book.shed = 3, 2
    world.report(process, world.open(process, 0.0), 5.0)
    sums = world.window.received.grouped(0, lambda key: key)
    received = sums[ReceivedKey("orders", "orders-1", "checkout", PLACE)]
    assert received[OK] == 4
    assert received[BUSY] / 1e6 == pytest.approx(2.0, rel=0.1)
    assert sums[ReceivedKey("orders", "orders-1", "", "")][PEAK] == 3
    (reporter,) = world.recorder.reporters
    assert reporter.served["orders-1"].shed == 2


def test_a_stream_begins_with_all_events_and_goes_on_with_new_ones() -> None:
    world = World()
    process = Process(outlier_detection={"consecutive_failures": 1}, retry={"max_attempts": 1})
    session = world.open(process, 0.0)
    process.fails(now=1.0)
    world.report(process, session, 5.0)
    world.report(process, session, 10.0)
    (reporter,) = world.recorder.reporters
    assert [each.at for each in reporter.called["orders"].ejections] == [1.0]
    world.recorder.close(session, 11.0)
    process.builder.reset()
    world.report(process, world.open(process, 12.0), 12.0)
    assert [each.at for each in reporter.called["orders"].ejections] == [1.0]
    state = reporter.called["orders"].state
    assert state is not None
    assert len(state.ejected) == 1


def test_states_of_services_and_servers_are_bounded() -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    services = tuple(CalledService(f"s{number}") for number in range(MAX_SERVICES + 5))
    servers = tuple(ServedInstance("checkout", f"i{number}", 0, 0, 0, 0, 0) for number in range(MAX_SERVICES + 5))
    world.recorder.take(session, LoadReport(5.0, services, servers), 5.0)
    world.recorder.take(session, LoadReport(5.0, services, servers), 10.0)
    (reporter,) = world.recorder.reporters
    assert (len(reporter.called), len(reporter.served)) == (MAX_SERVICES, MAX_SERVICES)


def test_who_has_gone_is_remembered_for_the_length_of_the_window() -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    process.calls()
    world.report(process, session, 5.0)
    world.recorder.close(session, 6.0)
    world.recorder.expire(5.0 + WINDOW)
    assert len(world.recorder.reporters) == 1
    world.recorder.expire(6.0 + WINDOW)
    assert len(world.recorder.reporters) == 0
    world.recorder.expire(2 * WINDOW)
    assert len(world.window.methods) == 0


_NAMES = st.sampled_from(["a", "b", "c"])
_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.integers(0, 2), st.integers(1, 9), st.sampled_from(["/s/A", "/s/B", PLACE])),
        st.tuples(st.just("fail"), st.integers(0, 2), st.integers(1, 3), st.just("")),
        st.tuples(st.just("receive"), st.integers(0, 2), st.integers(1, 9), _NAMES),
        st.tuples(st.just("report"), st.integers(0, 2), st.just(0), st.just("")),
        st.tuples(st.just("break"), st.integers(0, 2), st.just(0), st.just("")),
        st.tuples(st.just("restart"), st.integers(0, 2), st.just(0), st.just("")),
        st.tuples(st.just("wait"), st.just(0), st.sampled_from([1, 5, 30]), st.just("")),
    ),
    max_size=25,
)


@settings(max_examples=200)
@given(_EVENTS, st.sampled_from([{}, {"keys_of_one": 2}, {"keys": 3}, {"keys": 0}]))
def test_the_window_adds_up_to_what_was_reported(events: list[tuple[str, int, int, str]], limits: Any) -> None:
    world, now = World(**limits), 1000.0
    processes = [Process(f"p{number}", caller, now) for number, caller in enumerate(["web", "web", "jobs"])]
    sessions: list[Session | None] = [None, None, None]
    made = dict.fromkeys(("calls", "received"), 0)

    def report(number: int) -> None:
        process = processes[number]
        session = sessions[number]
        if session is None:
            process.builder.reset()
            session = sessions[number] = world.open(process, now, f"w{number}")
        world.report(process, session, now)

    for what, number, count, name in events:
        process = processes[number]
        if what == "call":
            process.calls(count, name)
            made["calls"] += count
        elif what == "fail":
            process.fails(count)
            made["calls"] += count
        elif what == "receive":
            process.receives(count, name)
            made["received"] += count
        elif what == "report":
            report(number)
        elif what == "break":
            sessions[number] = None
        elif what == "restart":
            report(number)
            processes[number] = Process(f"p{number}", process.node.service, now)
            sessions[number] = None
        else:
            now = min(now + count, 1500.0)
    for number in range(3):
        report(number)
    codes = set(CODES.values())

    def calls_in(sums: dict[Any, dict[int, int]]) -> int:
        return sum(n for counters in sums.values() for counter, n in counters.items() if counter in codes)

    assert calls_in(world.window.methods.grouped(0, lambda key: key)) == made["calls"]
    assert world.window.edges.grouped(0, lambda key: key) == world.window.methods.grouped(0, lambda key: key[:2])
    assert len(world.window.edges) <= len(world.window.methods)
    assert calls_in(world.window.received.grouped(0, lambda key: key)) == made["received"]
    assert sum(sum(each.calls.values()) for each in world.recorder.reporters) == made["calls"]
    assert len(world.window.methods) <= max(world.limits.keys, 0) + 2 * 2
    world.recorder.expire(now + 2 * WINDOW)
    window = world.window
    assert [len(each) for each in (window.methods, window.edges, window.endpoints, window.received)] == [0, 0, 0, 0]
    assert world.window.methods.add(MethodKey("web", "orders", PLACE), {OK: 1}, now, 1.0) is not None


def test_counters_of_endpoints_and_received_calls_that_cannot_be_are_refused_too() -> None:
    world, process = World(), Process()
    session = world.open(process, 0.0)
    for report in (
        LoadReport(5.0, (CalledService("orders", endpoints=(EndpointTotals("a", totals(OK=10**9)),)),)),
        LoadReport(
            5.0,
            (CalledService("orders", failures=(FailureTotals(PLACE, "INTERNAL", None, 10**9),)),),
        ),
        LoadReport(
            5.0,
            served=(
                ServedInstance("checkout", "c1", 0, 0, 0, 0, 0, (ReceivedTotals("web", PLACE, totals(OK=10**9)),)),
            ),
        ),
    ):
        with pytest.raises(InvalidValueError):
            world.recorder.take(session, report, 5.0)


def test_outboxes_are_those_of_processes_that_report_now() -> None:
    recorder = Recorder(Window())
    waits = OutboxReport(3, 100, 5.0, 0, RelayState.NO_BROKER, "no broker is configured")
    sessions = []
    for name, outbox in (("orders-1", waits), ("orders-2", None), ("orders-3", waits)):
        sessions.append(recorder.open(ClientNode(name, "orders"), "e", 0.0, "", 0.0))
        sessions[-1].reporter.process = ProcessState(outbox=outbox)
    recorder.close(sessions[2], 1.0)
    assert list(recorder.outboxes()) == [("orders", "orders-1", waits)]


@pytest.mark.parametrize(
    ("events", "refused", "relay", "quiet"),
    [
        (0, 0, RelayState.CONNECTED, True),
        (0, 0, RelayState.STANDBY, True),
        (1, 0, RelayState.CONNECTED, False),
        (0, 1, RelayState.CONNECTED, False),
        (0, 0, RelayState.DISCONNECTED, False),
        (0, 0, RelayState.NO_BROKER, False),
        (0, 0, None, False),
    ],
)
def test_an_outbox_is_quiet_while_nothing_waits_and_what_comes_is_sent(
    events: int, refused: int, relay: RelayState | None, quiet: bool
) -> None:
    assert OutboxReport(events, 100, None, refused, relay, "").is_quiet == quiet
