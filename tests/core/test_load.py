from __future__ import annotations

import math

import pytest

from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.load import FAILURE_LATENCY, UNMEASURED_PENALTY, EndpointLoad
from mesh_client.core.model import Outcome


def measured(latency: float, *, decay: float = 10.0) -> EndpointLoad:
    """A load whose only call took ``latency`` and ended at 100."""
    load = EndpointLoad(decay)
    load.start(100.0 - latency)
    load.finish(100.0 - latency, 100.0, Outcome.SUCCESS)
    return load


def call(load: EndpointLoad, now: float, latency: float, outcome: Outcome = Outcome.SUCCESS) -> None:
    load.start(now - latency)
    load.finish(now - latency, now, outcome)


def test_calls_in_flight_are_counted() -> None:
    load = EndpointLoad()
    load.start(0.0)
    load.start(0.0)
    assert load.outstanding == 2
    load.finish(0.0, 1.0, Outcome.NEUTRAL)
    assert load.outstanding == 1


def test_a_finish_without_a_start_is_refused_and_changes_nothing() -> None:
    load = measured(0.5)
    with pytest.raises(InvalidTransitionError):
        load.finish(0.0, 101.0, Outcome.SUCCESS)
    assert load.outstanding == 0
    assert load.latency_cost(100.0) == 0.5


def test_an_endpoint_never_called_costs_nothing() -> None:
    assert EndpointLoad().latency_cost(5.0) == 0.0


def test_an_endpoint_that_has_not_answered_yet_is_avoided() -> None:
    load = EndpointLoad()
    load.start(0.0)
    assert load.latency_cost(1.0) == UNMEASURED_PENALTY + 1


def test_cost_grows_with_calls_in_flight() -> None:
    load = measured(0.2)
    load.start(100.0)
    load.start(100.0)
    assert load.latency_cost(100.0) == pytest.approx(0.2 * 3)


def test_a_slower_answer_counts_at_once() -> None:
    load = measured(0.1)
    call(load, 100.0, 3.0)
    assert load.latency_cost(100.0) == 3.0


def test_a_faster_answer_counts_exponentially() -> None:
    load = measured(1.0)
    call(load, 110.0, 0.2)
    assert load.latency_cost(110.0) == pytest.approx(0.2 + 0.8 * math.exp(-1.0))


def test_an_idle_endpoint_is_forgiven_by_its_decay() -> None:
    load = measured(1.0, decay=5.0)
    assert load.latency_cost(105.0) == pytest.approx(math.exp(-1.0))


def test_reading_changes_nothing() -> None:
    load = measured(1.0)
    load.latency_cost(150.0)
    assert load.latency_cost(100.0) == 1.0


@pytest.mark.parametrize("outcome", [Outcome.FAILURE, Outcome.OVERLOAD])
def test_a_quick_failure_does_not_look_fast(outcome: Outcome) -> None:
    fresh = EndpointLoad()
    call(fresh, 100.0, 0.001, outcome)
    assert fresh.latency_cost(100.0) == FAILURE_LATENCY
    fast = measured(0.01)
    call(fast, 100.0, 0.001, outcome)
    assert fast.latency_cost(100.0) == FAILURE_LATENCY
    slow = measured(5.0)
    call(slow, 100.0, 0.001, outcome)
    assert slow.latency_cost(100.0) == 5.0


def test_a_slow_failure_counts_as_slow() -> None:
    load = measured(0.1)
    call(load, 100.0, 4.0, Outcome.FAILURE)
    assert load.latency_cost(100.0) == 4.0


def test_giving_up_early_says_nothing_and_giving_up_late_says_slow() -> None:
    load = measured(1.0)
    call(load, 100.0, 0.5, Outcome.NEUTRAL)
    assert load.latency_cost(100.0) == 1.0
    call(load, 100.0, 2.0, Outcome.NEUTRAL)
    assert load.latency_cost(100.0) == 2.0
