"""Which of the calls that a service received a policy would have refused. Pure.

The record says, for each instance, how many calls of each caller and method came within each step, how long they took
together, and how many were in flight at most. From that:

- who may not call is known exactly;
- what rate limits refuse is reckoned as if calls came evenly within a step: at least so many;
- what a limit on calls in flight refuses follows from Erlang's loss formula, which holds whatever the distribution of
  durations is (A. K. Erlang, 1917; https://en.wikipedia.org/wiki/Erlang_(unit)#Erlang_B_formula): about so many, and
  none where there were never more in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from control_plane.telemetry.timeline import BUSY, PEAK, STEP, count_of
from control_plane.telemetry.traffic import ReceivedStep
from mesh_client.core.authorization import Authorizer
from mesh_client.core.policy import RateLimit, RateLimitScope, ServicePolicy, method_matches

MAX_DETAILS = 100
MAX_PLACES = 5_000
"""Calls in flight up to which a limit is reckoned exactly."""


@dataclass(slots=True)
class RefusedCalls:
    """Calls of one caller to one method: how many came, and how many of them would have been refused.

    Attributes:
        caller: who; empty for nobody of the mesh.
        method: full name with leading slash.
        calls: received.
        unauthorized: refused because of who called.
        rate_limited: refused by a rate limit.
        shed: refused because too many were in flight.
    """

    caller: str
    method: str
    calls: int = 0
    unauthorized: int = 0
    rate_limited: int = 0
    shed: int = 0

    @property
    def refused(self) -> int:
        """For whatever reason."""
        return self.unauthorized + self.rate_limited + self.shed


@dataclass(frozen=True, slots=True)
class Refusals:
    """Calls that a policy would have refused; ``details`` have those of the most, at most `MAX_DETAILS`."""

    calls: int
    unauthorized: int
    rate_limited: int
    shed: int
    details: Sequence[RefusedCalls]

    @property
    def refused(self) -> int:
        """For whatever reason."""
        return self.unauthorized + self.rate_limited + self.shed


def try_policy(policy: ServicePolicy, received: Iterable[ReceivedStep]) -> Refusals:
    """What a policy of a service would have refused of what its instances received, in order of their steps."""
    found: dict[tuple[str, str], RefusedCalls] = {}
    authorizer = Authorizer(policy.authorization, policy.version)
    limit = policy.server_concurrency_limit.max_in_flight
    buckets: dict[str, _Buckets] = {}
    for step in received:
        left: dict[tuple[str, str], int] = {}
        for key, counters in step.calls.items():
            row = found.setdefault(key, RefusedCalls(*key))
            count = count_of(counters)
            row.calls += count
            if authorizer.check(*key) is not None:
                row.unauthorized += count
            else:
                left[key] = count
        if limit is not None and step.whole.get(PEAK, 0) > limit:
            busy = sum(step.calls[key].get(BUSY, 0) for key in left) / 1e6
            share = blocked_share(limit, busy / STEP)
            for key, shed in _shared(int(sum(left.values()) * share), left).items():
                found[key].shed += shed
                left[key] -= shed
        limits = buckets.setdefault(step.instance_id, _Buckets(policy.rate_limits))
        for key, refused in limits.refused(step.step, left).items():
            found[key].rate_limited += refused
    rows = sorted(found.values(), key=lambda row: (-row.refused, row.caller, row.method))
    return Refusals(
        sum(row.calls for row in rows),
        sum(row.unauthorized for row in rows),
        sum(row.rate_limited for row in rows),
        sum(row.shed for row in rows),
        [row for row in rows if row.refused][:MAX_DETAILS],
    )


def blocked_share(places: int, load: float) -> float:
    """Share of calls that find every place taken: Erlang's loss formula.

    Args:
        places: calls in flight that are admitted, at least 1.
        load: calls that would be in flight on average if all were, at least 0.
    """
    if places > MAX_PLACES:  # then what is above the limit is what is refused
        return max(0.0, 1.0 - places / load) if load > 0 else 0.0
    share = 1.0
    for place in range(1, places + 1):
        share = load * share / (place + load * share)
    return share


class _Buckets:
    """The token buckets of one instance, between one step and the next."""

    def __init__(self, rules: Sequence[RateLimit]) -> None:
        self._rules = rules
        self._tokens: dict[tuple[int, str], tuple[int, float]] = {}
        """By number of the rule, and caller: the step after which it was left, and with how many tokens."""

    def refused(self, step: int, calls: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
        """How many of the calls of one step find no token, by caller and method."""
        drawing: dict[tuple[int, str], dict[tuple[str, str], int]] = {}
        for key, count in calls.items():
            number = next(
                (number for number, rule in enumerate(self._rules) if method_matches(rule.method, key[1])), None
            )
            if number is not None:
                shared = self._rules[number].scope is RateLimitScope.ALL
                drawing.setdefault((number, "" if shared else key[0]), {})[key] = count
        refused: dict[tuple[str, str], int] = {}
        for bucket, drawn in drawing.items():
            refused |= _shared(self._draw(bucket, step, sum(drawn.values())), drawn)
        return refused

    def _draw(self, bucket: tuple[int, str], step: int, calls: int) -> int:
        rule = self._rules[bucket[0]]
        burst = float(rule.burst if rule.burst is not None else -(-rule.requests_per_second // 1))
        last, tokens = self._tokens.get(bucket, (step - 1, burst))
        tokens = min(burst, tokens + (step - 1 - last) * STEP * rule.requests_per_second)
        there = tokens + STEP * rule.requests_per_second
        refused = max(0, int(calls - there))
        self._tokens[bucket] = step, min(burst, there - (calls - refused))
        return refused


def _shared(refused: int, calls: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    """Shares refusals out in proportion to calls, in whole numbers that add up."""
    whole = sum(calls.values())
    shares, passed = {}, 0
    for key, count in calls.items():
        before = passed * refused // whole if whole else 0
        passed += count
        shares[key] = (passed * refused // whole if whole else 0) - before
    return shares
