from __future__ import annotations

from random import Random

import pytest

from mesh_client.core.model import StatusCode
from mesh_client.core.trace_delivery import BACK_TO_FIRST, BACKOFF, Delivery, NextStep


class Longest(Random):
    """Draws the longest wait each time."""

    def random(self) -> float:
        return 1.0

    def uniform(self, a: float, b: float) -> float:
        return b


def test_spans_are_kept_while_nobody_can_be_reached_and_waits_grow() -> None:
    delivery = Delivery(1, Longest())
    steps = [delivery.failed(StatusCode.UNAVAILABLE, 0.0) for _ in range(9)]
    assert all(step.keep for step in steps)
    assert [step.wait for step in steps] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert delivery.failures == 9
    delivery.answered()
    assert delivery.failed(StatusCode.DEADLINE_EXCEEDED, 0.0) == NextStep(True, BACKOFF.initial)


def test_each_control_plane_has_its_turn_before_anything_waits() -> None:
    delivery = Delivery(3, Longest())
    visited, waits = [], []
    for _ in range(6):
        visited.append(delivery.whom(0.0))
        waits.append(delivery.failed(StatusCode.UNAVAILABLE, 0.0).wait)
    assert visited == [0, 1, 2, 0, 1, 2]
    assert waits == [0.0, 0.0, 0.5, 0.0, 0.0, 1.0]


def test_the_first_control_plane_is_tried_again_after_a_while() -> None:
    delivery = Delivery(2, Longest())
    delivery.failed(StatusCode.UNAVAILABLE, 10.0)
    assert delivery.whom(10.0 + BACK_TO_FIRST - 1) == 1
    assert delivery.whom(10.0 + BACK_TO_FIRST) == 0
    assert delivery.whom(11.0) == 0


@pytest.mark.parametrize(
    ("code", "wait"),
    [
        (StatusCode.RESOURCE_EXHAUSTED, 1.0),
        (StatusCode.PERMISSION_DENIED, 10.0),
        (StatusCode.UNIMPLEMENTED, 60.0),
        (StatusCode.INVALID_ARGUMENT, 0.0),
        (StatusCode.INTERNAL, 0.0),
    ],
)
def test_what_is_refused_is_not_sent_again(code: StatusCode, wait: float) -> None:
    delivery = Delivery(2, Longest())
    delivery.failed(StatusCode.UNAVAILABLE, 0.0)
    assert delivery.failed(code, 0.0) == NextStep(False, wait)
    assert delivery.failures == 0
    assert delivery.whom(0.0) == 1
