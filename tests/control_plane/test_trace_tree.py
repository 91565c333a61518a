"""Which span stands below which, with everything that can be wrong with what processes send."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from control_plane.traces.clocks import corrections
from control_plane.traces.span import Kind, Process, Span, Status
from control_plane.traces.tree import Node, assemble, walk
from control_plane.traces.waterfall import Waterfall, waterfall
from tests.control_plane.spans import BEGINNING, MS, process, span


def shape(roots: list[Node]) -> list[str]:
    """One line a span, indented by its depth; orphans with a question mark."""
    return [f"{'  ' * depth}{int(node.span.span_id, 16)}{'?' * node.orphan}" for node, depth in walk(roots)]


def test_spans_in_any_order_make_one_tree_with_siblings_by_their_beginnings() -> None:
    spans = [span(4, 2, start=3), span(3, 1, start=5), span(1, took=20), span(5, 2, start=2), span(2, 1, start=1)]
    expected = ["1", "  2", "    5", "    4", "  3"]
    assert shape(assemble(spans)) == expected
    assert shape(assemble(reversed(spans))) == expected


def test_a_span_that_came_twice_is_there_once() -> None:
    assert shape(assemble([span(1), span(2, 1), span(2, 1), span(1)])) == ["1", "  2"]


def test_spans_whose_parent_did_not_come_are_orphans_after_the_roots() -> None:
    assert shape(assemble([span(3, 9), span(4, 3), span(1, start=50), span(2, 1, start=51)])) == [
        *("1", "  2"),
        *("3?", "  4"),
    ]


def test_a_late_parent_takes_its_children_back() -> None:
    assert shape(assemble([span(2, 1)])) == ["2?"]
    assert shape(assemble([span(2, 1), span(1)])) == ["1", "  2"]


def test_a_span_that_names_itself_as_its_parent_is_an_orphan() -> None:
    assert shape(assemble([span(1, 1), span(2, 1)])) == ["1?", "  2"]


def test_a_ring_is_cut_at_its_first_span() -> None:
    spans = [span(1, 3, start=0), span(2, 1, start=1), span(3, 2, start=2), span(4, 2, start=3)]
    assert shape(assemble(spans)) == ["1?", "  2", "    3", "    4"]
    # One that hangs off the ring, and is older than it, does not cut it.
    assert shape(assemble([span(9, 3, start=-5), *spans])) == ["1?", "  2", "    3", "      9", "    4"]


def test_ids_are_the_services_own() -> None:
    # A callee knows the id of its caller's span: one of its own under that id takes neither place nor children of it.
    caller, forged = span(2, 1, service="gateway", kind=Kind.CLIENT), span(2, 1, service="orders", start=-1)
    served = span(3, 2, service="orders", kind=Kind.SERVER, start=1)
    local = span(4, 2, service="gateway", start=2)
    roots = assemble([forged, span(1, service="gateway"), caller, served, local])
    below = {node.span: [child.span for child in node.children] for node, _ in walk(roots)}
    assert below[caller] == [served, local]
    assert below[forged] == []


def test_spans_without_identity_are_not_those_with_it() -> None:
    claimed = span(1, service=process("orders", workload_id=""))
    assert len(assemble([claimed, span(1)])) == 2


def chain(length: int) -> list[Span]:
    return [span(number, number - 1, start=number) for number in range(1, length + 1)]


def test_a_trace_may_be_deeper_than_python_s_stack() -> None:
    rows = waterfall(chain(3_000)).rows
    assert [row.depth for row in rows] == list(range(3_000))


@st.composite
def traces(draw: st.DrawFn) -> list[Span]:
    ids = st.integers(1, 12)
    return draw(
        st.lists(
            st.builds(
                span,
                ids,
                st.integers(0, 12),
                service=st.sampled_from(["gateway", "orders", Process("envoy")]),
                start=st.floats(-5_000, 5_000),
                took=st.floats(0, 1_000),
                kind=st.sampled_from(Kind),
                status=st.sampled_from(Status),
            ),
            max_size=20,
        )
    )


@settings(max_examples=60)
@given(traces())
def test_whatever_comes_each_span_has_one_place(spans: list[Span]) -> None:
    distinct = {(each.service, each.process.verified, each.span_id) for each in spans}
    drawn = list(walk(assemble(spans)))
    assert len(drawn) == len(distinct)
    assert {(node.span.service, node.span.process.verified, node.span.span_id) for node, _ in drawn} == distinct
    for node, depth in drawn:
        assert (node.parent is None) == (depth == 0)
        assert node.orphan == (node.parent is None and bool(node.span.parent_id))
        assert node.parent is None or node.parent.span.span_id == node.span.parent_id


@settings(max_examples=60)
@given(traces())
def test_a_waterfall_begins_at_0_ends_with_its_last_span_and_has_each_below_its_parent(spans: list[Span]) -> None:
    drawn = waterfall(spans)
    assert len(drawn.rows) == len(assemble(spans)) + sum(row.depth > 0 for row in drawn.rows)
    if not drawn.rows:
        assert drawn == Waterfall(0, 0, ())
        return
    assert min(row.offset for row in drawn.rows) == 0
    assert max(row.offset + row.duration for row in drawn.rows) == drawn.duration
    above: list[str] = []
    for row in drawn.rows:
        del above[row.depth :]
        assert row.depth == len(above)
        assert row.depth == 0 or above[-1] == row.span.parent_id
        assert row.offset == row.span.start + row.correction - drawn.start
        above.append(row.span.span_id)


@settings(max_examples=60)
@given(traces())
def test_every_process_has_one_correction(spans: list[Span]) -> None:
    found = corrections(assemble(spans))
    assert found.keys() == {each.process for each in spans}
    assert all(isinstance(each, int) for each in found.values())


# -- clocks


def call(ahead: float = 0.0, *, start: float = 20.0, took: float = 60.0, **fields: object) -> list[Span]:
    """A client of 100 ms from 0 on, and the server that it called, whose clock is ahead by so many milliseconds."""
    kind = fields.pop("kind", Kind.SERVER)
    return [
        span(1, service="gateway", took=100, kind=Kind.CLIENT, **fields),  # type: ignore[arg-type] # of the span
        span(2, 1, service="orders", start=start + ahead, took=took, kind=kind),
        span(3, 2, service="orders", start=start + ahead + 1, took=1),
    ]


def offsets(spans: list[Span]) -> list[float]:
    return [row.offset / MS for row in waterfall(spans).rows]


def test_clocks_that_may_be_right_are_believed() -> None:
    for ahead in (0.0, -19.0, 19.0):
        assert offsets(call(ahead)) == [0.0, 20 + ahead, 21 + ahead]


def test_a_server_that_would_begin_before_its_call_or_end_after_it_is_set_right() -> None:
    for ahead in (-1_000.0, -25.0, 21.0, 3_600_000.0):
        assert offsets(call(ahead)) == [0.0, 20.0, 21.0]
    assert {row.correction for row in waterfall(call(500.0)).rows} == {0, -500 * MS}
    assert waterfall(call(-1_000.0)).start == BEGINNING
    assert waterfall(call(-1_000.0)).duration == 100 * MS


def test_each_further_call_narrows_down_how_far_a_clock_is_off() -> None:
    quick = span(4, service="gateway", parent=1, start=40, took=10, kind=Kind.CLIENT)
    served = span(5, 4, service="orders", start=1_041, took=8, kind=Kind.SERVER)
    assert offsets([*call(1_000.0), quick, served]) == [0.0, 20.0, 21.0, 40.0, 41.0]


def test_a_server_that_goes_on_after_its_caller_gave_up_is_left_where_it_is() -> None:
    assert offsets(call(start=50, took=80, error="DEADLINE_EXCEEDED")) == [0.0, 50.0, 51.0]
    # Longer than the call: whatever its clock, it went on.
    assert offsets(call(start=50, took=300)) == [0.0, 50.0, 51.0]
    assert offsets(call(start=-50, took=300)) == [0.0, 0.0, 1.0]


def test_a_consumer_may_come_late_but_not_early() -> None:
    assert offsets(call(5_000.0, kind=Kind.CONSUMER)) == [0.0, 5_020.0, 5_021.0]
    assert offsets(call(-5_000.0, kind=Kind.CONSUMER)) == [0.0, 0.0, 1.0]


def test_a_clock_is_set_by_processes_whose_own_is_known() -> None:
    spans = [
        span(1, service="gateway", took=100, kind=Kind.CLIENT),
        span(2, 1, service="orders", start=1_010, took=80, kind=Kind.SERVER),
        span(3, 2, service="orders", start=1_020, took=60, kind=Kind.CLIENT),
        span(4, 3, service="payments", start=-970, took=40, kind=Kind.SERVER),
        # Seen from payments, orders would be somewhere else again.
        span(5, 4, service="orders", start=1_200, took=1, kind=Kind.SERVER),
    ]
    assert offsets(spans) == [0.0, 10.0, 20.0, 30.0, 200.0]


def test_an_orphan_s_process_is_set_right_by_what_else_it_did() -> None:
    orphan = span(7, 99, service="orders", start=1_030, took=5)
    assert [
        (int(row.span.span_id, 16), row.offset / MS, row.orphan) for row in waterfall([orphan, *call(1_000.0)]).rows
    ] == [(1, 0.0, False), (2, 20.0, False), (3, 21.0, False), (7, 30.0, True)]


def test_two_processes_of_a_service_have_two_clocks() -> None:
    one, two = process("orders", "1" * 16), process("orders", "2" * 16)
    spans = [
        span(1, service="gateway", took=100, kind=Kind.CLIENT),
        span(2, 1, service=one, start=10, took=20, kind=Kind.SERVER),
        span(3, 1, service=two, start=9_000, took=20, kind=Kind.SERVER),
    ]
    assert offsets(spans) == [0.0, 10.0, 40.0]


def test_a_waterfall_knows_its_services_and_when_events_happened() -> None:
    drawn = waterfall(call(500.0))
    assert drawn.services == ("gateway", "orders")
    served = drawn.rows[1]
    assert drawn.event_offset(served, served.span.start + 5 * MS) == 25 * MS
