"""The store: what it holds, what it answers, and that it holds no more than it may."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from control_plane.traces import retention
from control_plane.traces.query import TraceFilter, check_id_prefix
from control_plane.traces.span import Kind, Span, SpanEvent, pack
from control_plane.traces.store import Added, TraceLimits, TraceStore
from control_plane.traces.trace import SPAN_SLOT, TRACE_COST, Reason, Trace
from mesh_client.core.errors import InvalidValueError
from tests.control_plane.spans import MS, process, span, trace_id

MIB = 1024 * 1024


def ids(traces: Iterable[Trace]) -> list[int]:
    return [int(trace.id, 16) for trace in traces]


def filled(*spans: tuple[int, Span], limits: TraceLimits | None = None) -> TraceStore:
    """A store to which these came, one a second from 0 on."""
    made = TraceStore(limits)
    for second, (number, each) in enumerate(spans):
        made.add(trace_id(number), each, float(second))
    return made


# -- traces


def test_spans_are_grouped_by_trace_newest_trace_first() -> None:
    made = filled((1, span(1)), (2, span(1)), (1, span(2, 1)))
    assert ids(made.latest(10, 3.0)) == [2, 1]
    assert ids(made.latest(1, 3.0)) == [2]
    first = made.get(trace_id(1), 3.0)
    assert first is not None
    assert [each.span_id for each in first.spans] == [f"{1:016x}", f"{2:016x}"]
    assert (len(made), made.spans, len(first), first.first_seen, first.last_seen) == (2, 3, 2, 0.0, 2.0)
    assert made.get(trace_id(3), 3.0) is None


def test_a_trace_is_about_its_longest_root_and_about_its_longest_span_before_that() -> None:
    made = TraceStore()
    (trace,) = filled((7, span(1))).latest(1, 0.0)
    for each, entry, complete in (
        (span(3, 2, took=5, service="payments"), 3, False),
        (span(2, 1, took=50), 2, False),
        (span(4, 2, took=40), 2, False),
        (span(1, took=30, service="gateway"), 1, True),
        (span(5, took=20), 1, True),
        (span(6, took=60), 6, True),
    ):
        made.add(trace_id(7), each, 0.0)
        (trace,) = made.latest(10, 0.0)
        assert (int(trace.entry.span_id, 16), trace.complete) == (entry, complete)
        assert trace.duration == trace.entry.duration
    assert trace.services == ("gateway", "orders", "payments")


def test_what_comes_twice_is_kept_once() -> None:
    made = filled((1, span(1)))
    cost = made.cost
    assert made.add(trace_id(1), span(1, took=99), 1.0) is Added.DUPLICATE
    assert made.add(trace_id(1), span(1, service="gateway"), 1.0) is Added.KEPT
    assert made.add(trace_id(1), span(1, service=process("orders", workload_id="")), 1.0) is Added.KEPT
    assert made.spans == 3
    assert cost < made.cost
    assert made.counts == {Added.KEPT: 3, Added.DUPLICATE: 1}


def test_a_trace_has_bounds_of_its_own() -> None:
    made = TraceStore(TraceLimits(max_spans=2, max_trace_bytes=64 * 1024))
    assert [made.add(trace_id(1), span(number), 0.0) for number in (1, 2, 3)] == [
        *(Added.KEPT, Added.KEPT, Added.TRACE_FULL)
    ]
    assert made.add(trace_id(2), span(1), 0.0) is Added.KEPT
    assert made.add(trace_id(2), span(2, attributes={"key": "x" * 65_000}), 0.0) is Added.TRACE_FULL
    assert [trace.refused for trace in made.latest(2, 0.0)] == [1, 1]
    # One that is too large for any trace leaves none behind.
    assert made.add(trace_id(3), span(1, attributes={"key": "x" * 65_000}), 0.0) is Added.TRACE_FULL
    assert ids(made.latest(10, 0.0)) == [2, 1]


def test_what_a_process_is_costs_once_in_each_trace() -> None:
    large = process(packed=pack({"host.name": "x" * 1_000}.items()))
    made = TraceStore()
    made.add(trace_id(1), span(1, service=large), 0.0)
    first = made.cost
    made.add(trace_id(1), span(2, service=large), 0.0)
    assert made.cost - first < 1_000 < first
    made.add(trace_id(2), span(1, service=large), 0.0)
    assert made.cost > 2 * first


# -- age


def test_traces_end_by_age_counted_from_their_last_span() -> None:
    made = TraceStore(TraceLimits(max_age=60.0))
    made.add(trace_id(1), span(1), 0.0)
    made.add(trace_id(2), span(1), 10.0)
    made.add(trace_id(1), span(2, 1), 20.0)
    assert ids(made.latest(10, 70.0)) == [2, 1]
    assert ids(made.latest(10, 70.1)) == [1]
    assert made.get(trace_id(1), 80.0) is not None
    assert not made.find("0", 80.1)
    assert (len(made), made.spans, made.cost, made.expired) == (0, 0, 0, 2)


# -- queries


def test_traces_are_found_by_the_beginning_of_their_id() -> None:
    made = TraceStore()
    for each in ("ab" * 16, "abc" + "0" * 29, "f" * 32):
        made.add(each, span(1), 0.0)
    assert [trace.id for trace in made.find("ab", 0.0)] == ["abc" + "0" * 29, "ab" * 16]
    assert [trace.id for trace in made.find("abc", 0.0)] == ["abc" + "0" * 29]
    assert [trace.id for trace in made.find("ab" * 16, 0.0)] == ["ab" * 16]
    assert not made.find("1", 0.0)
    assert check_id_prefix(" ABC ") == "abc"
    for bad in ("", "xyz", "0" * 33, "a b"):
        with pytest.raises(InvalidValueError, match="trace_id"):
            check_id_prefix(bad)


PLACE, CHARGE = "shop.v1.OrderService/PlaceOrder", "shop.v1.PaymentService/Charge"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (TraceFilter(), [3, 2, 1]),
        (TraceFilter(service="orders"), [3, 2, 1]),
        (TraceFilter(service="payments"), [2]),
        (TraceFilter(service="inventory"), []),
        (TraceFilter(method=PLACE), [3, 1]),
        (TraceFilter(method=f"/{PLACE}"), [3, 1]),
        (TraceFilter(method="PlaceOrder"), [3, 1]),
        (TraceFilter(method="Place"), []),
        (TraceFilter(method="shop.v1.PaymentService/*"), [2]),
        (TraceFilter(method="Service/PlaceOrder"), []),
        (TraceFilter(service="orders", method=CHARGE), [2]),
        (TraceFilter(service="payments", method=PLACE), []),
        (TraceFilter(errors=True), [2]),
        (TraceFilter(service="payments", errors=True), [2]),
        (TraceFilter(service="orders", errors=True), []),
        (TraceFilter(min_duration=100 * MS), [3]),
        (TraceFilter(min_duration=10 * MS), [3, 2, 1]),
        (TraceFilter(service="payments", min_duration=40 * MS), [2]),
        (TraceFilter(service="payments", min_duration=41 * MS), []),
        (TraceFilter(errors=True, min_duration=100 * MS), []),
    ],
)
def test_traces_are_found_by_what_their_spans_are(wanted: TraceFilter, expected: list[int]) -> None:
    made = filled(
        (1, span(1, name=PLACE)),
        (2, span(1, name="job", took=50)),
        (2, span(2, 1, name="charge", method=CHARGE)),
        (2, span(3, 2, name="charge", method=CHARGE, service="payments", took=40, error="UNAVAILABLE")),
        (3, span(1, name=PLACE, took=100)),
    )
    assert ids(made.latest(10, 9.0, wanted)) == expected
    assert ids(made.latest(1, 9.0, wanted)) == expected[:1]


def test_it_is_known_what_changed_since() -> None:
    made = filled((1, span(1)), (2, span(1)), (1, span(2, 1)))
    assert ids(made.changed_since(0)) == [1, 2]
    assert ids(made.changed_since(2)) == [1]
    assert not made.changed_since(made.revision)


# -- what stays


def bounded(count: int) -> TraceStore:
    return TraceStore(TraceLimits(max_traces=count))


def test_the_oldest_ordinary_trace_goes_first() -> None:
    made = bounded(3)
    for number in range(1, 6):
        made.add(trace_id(number), span(1), float(number))
    assert ids(made.latest(10, 6.0)) == [5, 4, 3]
    assert made.evicted == {Reason.ORDINARY: 2}


def test_traces_with_errors_outlive_the_others_up_to_half_of_the_room() -> None:
    made = bounded(10)
    for number in range(1, 9):
        made.add(trace_id(number), span(1, error="INTERNAL" if number <= 4 else ""), float(number))
    for number in range(100, 200):
        made.add(trace_id(number), span(1), float(number))
    assert ids(made.latest(10, 200.0)) == [199, 198, 197, 196, 195, 194, 4, 3, 2, 1]
    assert made.kept_for(Reason.ERROR) == 4
    for number in range(200, 300):
        made.add(trace_id(number), span(1, error="INTERNAL"), float(number))
    # They push the others out to half of the room, then each other.
    assert ids(made.latest(10, 300.0)) == [299, 298, 297, 296, 295, 199, 198, 197, 196, 195]


def test_errors_alone_may_have_all_the_room() -> None:
    made = bounded(4)
    for number in range(1, 9):
        made.add(trace_id(number), span(1, error="INTERNAL"), float(number))
    assert ids(made.latest(10, 9.0)) == [8, 7, 6, 5]
    assert made.evicted == {Reason.ERROR: 4}


def test_a_late_error_makes_a_trace_one_that_stays() -> None:
    made = bounded(3)
    made.add(trace_id(1), span(1), 0.0)
    made.add(trace_id(2), span(1), 1.0)
    made.add(trace_id(1), span(2, 1, error="INTERNAL"), 2.0)
    for number in range(3, 9):
        made.add(trace_id(number), span(1), float(number))
    assert ids(made.latest(10, 9.0)) == [8, 7, 1]


def test_slow_traces_outlive_the_others_up_to_a_quarter_of_the_room() -> None:
    made = bounded(40)
    for number in range(1, 301):
        took = 500.0 if number in {30, 130, 131} else 10.0 + number % 7
        made.add(trace_id(number), span(1, took=took), float(number))
    kept = ids(made.latest(40, 301.0))
    assert kept[-3:] == [131, 130, 30]
    assert len(kept) == 40
    assert made.kept_for(Reason.SLOW) == 3
    for number in range(301, 1_000):
        made.add(trace_id(number), span(1, took=10.0 * number), float(number))  # each slower than all before
    assert made.kept_for(Reason.SLOW) == 10
    assert made.kept_for(Reason.ORDINARY) == 30


def test_slow_is_measured_against_traces_with_the_same_entry() -> None:
    durations = retention.Durations()

    def judge(took: float, name: str = "a") -> bool:
        return durations.judge(Trace("1", span(1, took=took, name=name), 0.0))

    assert not any(judge(1_000, "report") for _ in range(50))
    assert not any(judge(10) for _ in range(retention.LEAST - 1))
    assert not judge(5_000)  # of too few nothing can be said
    assert judge(11)
    assert not judge(10)
    assert not judge(1_000, "report")
    # What was usual is forgotten.
    for _ in range(retention.WINDOW):
        judge(2_000)
    assert not judge(2_000)
    for number in range(retention.MAX_ENTRIES + 50):
        judge(10, f"entry {number}")
    assert len(durations) == retention.MAX_ENTRIES
    assert not judge(99_999)


def test_a_service_that_floods_the_store_makes_room_by_its_own_traces() -> None:
    made = bounded(10)
    for number in range(1, 4):
        made.add(trace_id(number), span(1, service="payments"), float(number))
    for number in range(100, 150):
        made.add(trace_id(number), span(1, service="orders"), float(number))
    assert ids(made.latest(10, 150.0))[-3:] == [3, 2, 1]
    for number in range(200, 250):
        made.add(trace_id(number), span(1, service="orders", error="made up"), float(number))
    assert {1, 2, 3} <= set(ids(made.latest(10, 250.0)))


def test_what_claims_to_be_a_service_without_identity_takes_nothing_from_it() -> None:
    made = bounded(4)
    made.add(trace_id(1), span(1, service="orders"), 1.0)
    made.add(trace_id(2), span(1, service="orders"), 2.0)
    for number in range(10, 20):
        made.add(trace_id(number), span(1, service=process(f"claim-{number}", workload_id="")), float(number))
    assert ids(made.latest(4, 20.0)) == [19, 18, 2, 1]


def test_bytes_are_bounded_too_and_shared_likewise() -> None:
    made = TraceStore(TraceLimits(max_bytes=MIB))
    for number in range(400):
        made.add(trace_id(number), span(1, attributes={"key": "x" * 10_000}, error="oh" if number < 200 else ""), 0.0)
        assert made.cost <= MIB
    errors = sum(trace.errors for trace in made.newest(0.0))
    assert 40 <= errors <= 50
    assert 80 <= len(made) <= 95


@pytest.mark.parametrize(
    "limits",
    [
        {"max_bytes": 1},
        {"max_traces": 0},
        {"max_spans": 0},
        {"max_trace_bytes": 1},
        {"max_trace_bytes": 2 * MIB, "max_bytes": MIB},
        {"max_age": 0.0},
        {"max_age": float("nan")},
    ],
)
def test_limits_are_checked(limits: dict[str, int]) -> None:
    with pytest.raises(InvalidValueError, match=next(iter(limits))):
        TraceLimits(**limits)


class Bounds(RuleBasedStateMachine):
    """Whatever comes, the store is within its limits, and its counts are those of what it holds."""

    @initialize()
    def begin(self) -> None:
        self.store = TraceStore(
            TraceLimits(max_bytes=MIB, max_traces=12, max_spans=5, max_trace_bytes=MIB // 4, max_age=100.0)
        )
        self.now = 0.0

    @rule(
        trace=st.integers(1, 40),
        number=st.integers(1, 8),
        parent=st.integers(0, 8),
        service=st.sampled_from(["orders", "payments"]),
        verified=st.booleans(),
        took=st.floats(0, 1_000),
        error=st.sampled_from(["", "", "INTERNAL"]),
        size=st.sampled_from([0, 10_000, 200_000, 300_000]),
    )
    def add(
        self,
        trace: int,
        number: int,
        parent: int,
        service: str,
        verified: bool,
        took: float,
        error: str,
        size: int,
    ) -> None:
        made = span(
            number,
            parent,
            service=process(service, "1" * 16 if verified else ""),
            took=took,
            error=error,
            attributes={"key": "x" * size},
            kind=Kind.SERVER,
        )
        before = self.store.get(trace_id(trace), self.now)
        there = before is not None and made in before
        added = self.store.add(trace_id(trace), made, self.now)
        assert (added is Added.DUPLICATE) == there

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def holds_no_more_than_it_may_and_knows_what_it_holds(self) -> None:
        limits, traces = self.store.limits, list(self.store.newest(self.now))
        assert len(traces) == len(self.store) <= limits.max_traces
        assert self.store.cost == sum(trace.cost for trace in traces) <= limits.max_bytes
        assert self.store.spans == sum(len(trace) for trace in traces)
        assert {trace.id for trace in self.store.changed_since(0)} == {trace.id for trace in traces}
        for reason in Reason:
            assert self.store.kept_for(reason) == sum(trace.reason is reason for trace in traces)
        for trace in traces:
            assert 1 <= len(trace) <= limits.max_spans
            assert trace.cost <= limits.max_trace_bytes
            assert trace.errors == sum(each.failed for each in trace.spans)
            assert self.now - trace.last_seen <= limits.max_age
            assert (trace.reason is Reason.ERROR) == bool(trace.errors)
            assert trace.cost == TRACE_COST + sum(each.cost + SPAN_SLOT for each in trace.spans) + sum(
                each.cost for each in {id(each.process): each.process for each in trace.spans}.values()
            )


Bounds.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
TestBounds = Bounds.TestCase


def test_what_it_counts_is_what_it_takes_under_a_flood() -> None:
    limits = TraceLimits(max_bytes=MIB)
    made = TraceStore(limits)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(600):  # four times what there is room for
            for each in range(1, 5):
                made.add(f"{number:032x}", fresh(number, each), float(number) / 100)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.95 * limits.max_bytes <= made.cost <= limits.max_bytes
    assert made.spans > 600
    assert 0.75 * made.cost < taken < 1.1 * made.cost


def fresh(number: int, each: int) -> Span:
    """As a server makes them of what was sent: no text is another's."""
    return span(
        each,
        each - 1,
        service=process(f"service-{number % 7}", f"{each:016x}"),
        name=f"shop.v1.OrderService/Method{number % 50}",
        attributes={"rpc.system": "grpc", "rpc.service": "shop.v1.OrderService", "server.address": f"10.0.0.{each}"},
        events=(SpanEvent(number * MS, "retry", pack({"attempt": str(number)}.items())),) if each == 1 else (),
        error="UNAVAILABLE" if number % 10 == 0 else "",
        kind=Kind.SERVER,
    )
