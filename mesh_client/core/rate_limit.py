"""What a server admits: token buckets by rule and caller, and a limit on calls in flight."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.policy import RateLimitScope, method_matches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh_client.core.policy import RateLimit

MAX_METHODS = 1000
"""Methods whose rule is remembered; the rules are gone through again for others."""

_ROUNDING = 1e-6


class TokenBucket:
    """Admits ``rate`` calls a second on average and ``burst`` at once; it begins full.

    RFC 2697's committed bucket, filled when looked at instead of by a timer.
    """

    __slots__ = ("_burst", "_filled_at", "_rate", "_tokens")

    def __init__(self, rate: float, burst: int, now: float) -> None:
        """``rate`` is in calls a second, above 0; ``burst`` is 1 or more."""
        self._rate = rate
        self._burst = float(burst)
        self._tokens = self._burst
        self._filled_at = now

    def take(self, now: float) -> float:
        """0.0 when the call is admitted, else seconds until the next token."""
        tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        # Whoever comes back after exactly the time that was asked for must not fail for rounding.
        if tokens >= 1.0 - _ROUNDING:
            self._tokens = tokens - 1.0
            return 0.0
        self._tokens = tokens
        return (1.0 - tokens) / self._rate


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a call is admitted."""

    limit: RateLimit | None = None
    """The rule that refuses it; None when it is admitted."""
    retry_after: float = 0.0
    """Seconds until it would be admitted; 0 when it is."""


ADMITTED = Verdict()


class _Rule:
    __slots__ = ("burst", "limit", "number", "shared")

    def __init__(self, number: int, limit: RateLimit, now: float) -> None:
        self.number = number
        self.limit = limit
        self.burst = limit.burst if limit.burst is not None else math.ceil(limit.requests_per_second)
        self.shared: TokenBucket | None = None
        if limit.scope is RateLimitScope.ALL:
            self.shared = self.bucket(now)

    def bucket(self, now: float) -> TokenBucket:
        return TokenBucket(self.limit.requests_per_second, self.burst, now)


class RateLimiter:
    """All rate limits of one server: the first rule that matches the method decides.

    Each caller has a bucket of its own for each rule with scope PER_CALLER, made when first needed. Memory is bounded:
    past ``max_buckets`` the bucket that was used longest ago is forgotten, which is most likely a full one again.
    """

    __slots__ = ("_buckets", "_matches", "_max_buckets", "_rules")

    def __init__(self, rules: Sequence[RateLimit], now: float, max_buckets: int = 10_000) -> None:
        self._rules = tuple(_Rule(number, limit, now) for number, limit in enumerate(rules))
        self._max_buckets = max_buckets
        self._matches: dict[str, _Rule | None] = {}
        self._buckets: OrderedDict[tuple[int, str], TokenBucket] = OrderedDict()

    def take(self, caller: str, method: str, now: float) -> Verdict:
        """Whether ``caller`` may call the full method ``method``, with or without its leading slash, at ``now``."""
        if not self._rules:
            return ADMITTED
        try:
            rule = self._matches[method]
        except KeyError:
            rule = self._match(method)
        if rule is None:
            return ADMITTED
        bucket = rule.shared
        if bucket is None:
            key = (rule.number, caller)
            bucket = self._buckets.get(key)
            if bucket is None:
                bucket = self._new_bucket(key, rule, now)
            else:
                self._buckets.move_to_end(key)
        wait = bucket.take(now)
        return Verdict(rule.limit, wait) if wait else ADMITTED

    def _match(self, method: str) -> _Rule | None:
        found = next((rule for rule in self._rules if method_matches(rule.limit.method, method)), None)
        if len(self._matches) < MAX_METHODS:
            self._matches[method] = found
        return found

    def _new_bucket(self, key: tuple[int, str], rule: _Rule, now: float) -> TokenBucket:
        bucket = self._buckets[key] = rule.bucket(now)
        if len(self._buckets) > self._max_buckets:
            self._buckets.popitem(last=False)
        return bucket


class ConcurrencyGate:
    """Admits at most ``limit`` calls in flight; None for no limit.

    Attributes:
        in_flight: calls that entered and have not left.
    """

    __slots__ = ("in_flight", "limit")

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.in_flight = 0

    def enter(self) -> bool:
        """True and one more in flight, or False when the limit is reached."""
        if self.limit is not None and self.in_flight >= self.limit:
            return False
        self.in_flight += 1
        return True

    def leave(self) -> None:
        """A call that entered is over.

        Raises:
            InvalidTransitionError: none is in flight.
        """
        if not self.in_flight:
            raise InvalidTransitionError("a call left a gate that holds none")
        self.in_flight -= 1
