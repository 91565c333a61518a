from __future__ import annotations

import pytest

from control_plane.traces import following
from control_plane.traces.following import QUIET, QUIET_WITHOUT_ROOT, Following
from control_plane.traces.links import TraceLinks
from control_plane.traces.query import TraceFilter
from control_plane.traces.store import TraceLimits, TraceStore
from mesh_client.core.errors import ConfigError
from tests.control_plane.spans import span, trace_id


def told(follower: Following, now: float) -> list[int]:
    return [int(trace.id, 16) for trace in follower.due(now)[0]]


def test_a_trace_is_told_once_it_seems_to_be_complete() -> None:
    store = TraceStore()
    store.add(trace_id(1), span(1), 0.0)
    follower = Following(store, TraceFilter())
    assert follower.due(9.0) == ([], None)  # what was there before is not told
    store.add(trace_id(2), span(2, 1), 10.0)
    assert follower.due(10.0) == ([], QUIET)
    store.add(trace_id(2), span(1), 11.0)
    store.add(trace_id(3), span(1), 12.0)
    assert follower.due(11.5) == ([], 0.5)
    assert follower.due(12.0) == ([], 1.0)
    assert told(follower, 13.0) == [2]
    assert follower.due(13.0) == ([], 1.0)
    assert told(follower, 14.0) == [3]
    assert follower.due(14.0) == ([], None)


def test_one_whose_root_never_comes_is_told_later() -> None:
    store = TraceStore()
    follower = Following(store, TraceFilter())
    store.add(trace_id(1), span(2, 1), 0.0)
    assert told(follower, QUIET_WITHOUT_ROOT - 0.1) == []
    assert told(follower, QUIET_WITHOUT_ROOT) == [1]


def test_late_spans_tell_a_trace_again_only_if_it_was_not_wanted_before() -> None:
    store = TraceStore()
    everything, errors = Following(store, TraceFilter()), Following(store, TraceFilter(errors=True))
    store.add(trace_id(1), span(1), 0.0)
    assert (told(everything, 5.0), told(errors, 5.0)) == ([1], [])
    store.add(trace_id(1), span(2, 1, error="INTERNAL"), 6.0)
    assert (told(everything, 9.0), told(errors, 9.0)) == ([], [1])


def test_what_is_not_there_any_more_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_REMEMBERED", 2)
    store = TraceStore(TraceLimits(max_traces=2))
    follower = Following(store, TraceFilter())
    for number in range(1, 6):
        store.add(trace_id(number), span(1), 0.0)
        assert told(follower, 0.0) == []
    assert told(follower, 5.0) == [4, 5]
    for number in range(6, 20):
        store.add(trace_id(number), span(1), 10.0)
        told(follower, 15.0)
    assert len(follower._told) <= 4


def test_links_lead_to_jaeger_if_there_is_one() -> None:
    links = TraceLinks("https://jaeger.example:16686/ui/")
    assert links
    assert links.link("ab" * 16) == f"https://jaeger.example:16686/ui/trace/{'ab' * 16}"
    assert not TraceLinks()
    assert TraceLinks().link("ab" * 16) == ""


@pytest.mark.parametrize(
    "address",
    [
        "jaeger:16686",
        "ftp://jaeger",
        "http://",
        "http:///trace",
        "https://jaeger/?a=b",
        "https://u@jaeger",
        "http://a b",
    ],
)
def test_what_is_no_address_of_jaeger_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="jaeger_ui"):
        TraceLinks(address)
