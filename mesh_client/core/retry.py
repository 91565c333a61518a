"""Retries: the budget that bounds them, the wait before each, and what a server says about them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh_client.core.errors import InvalidValueError

if TYPE_CHECKING:
    from random import Random

    from mesh_client.core import policy

WINDOW = 10
"""Seconds for which a call counts towards the budget, in buckets of one second."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata key of gRFC A6."""

_ROUNDING = 1e-9
_MAX_INT32 = 2**31 - 1
_INTEGER = re.compile(r"-?[0-9]{1,20}")


class RetryBudget:
    """Bounds retries by a share of calls.

    In any window of `WINDOW` seconds there are at most ``ratio`` retries a call plus ``min_per_second`` a second. After
    tower's ``TpsBudget`` (https://github.com/tower-rs/tower/blob/master/tower/src/retry/budget/tps_budget.rs), itself
    after Finagle's ``RetryBudget``: calls deposit, retries withdraw, both expire with their bucket.

    Attributes:
        bucket_end: seconds; until then a call may be counted in `calls_now` instead of by `deposit`.
        calls_now: calls in the bucket that is being filled.
    """

    __slots__ = (
        "_calls",
        "_calls_before",
        "_ratio",
        "_reserve",
        "_retries",
        "_retries_before",
        "_retries_now",
        "bucket_end",
        "calls_now",
    )

    def __init__(self, settings: policy.RetryBudget, now: float) -> None:
        self._ratio = settings.ratio
        self._reserve = settings.min_per_second * WINDOW
        self._calls = [0] * (WINDOW - 1)
        """Calls in each full bucket, oldest first, as ``_retries``; the bucket being filled is apart."""
        self._retries = [0] * (WINDOW - 1)
        self.calls_now = 0
        self._retries_now = 0
        self._calls_before = 0
        """Calls in all buckets that were ever filled, as ``_retries_before``."""
        self._retries_before = 0
        self.bucket_end = now + 1.0

    @property
    def calls(self) -> int:
        """Calls that ever began."""
        return self._calls_before + self.calls_now

    @property
    def retries(self) -> int:
        """Retries that were ever granted."""
        return self._retries_before + self._retries_now

    def deposit(self, now: float) -> None:
        """A call began."""
        if now >= self.bucket_end:
            self._advance(now)
        self.calls_now += 1

    def withdraw(self, now: float) -> bool:
        """Ask for one retry; False when the budget is spent."""
        if now >= self.bucket_end:
            self._advance(now)
        if self._left(0) < 1.0 - _ROUNDING:
            return False
        self._retries_now += 1
        return True

    def balance(self, now: float) -> float:
        """Retries left at ``now``, at least 0. Reading it never changes it."""
        return max(0.0, self._left(self._passed(now)))

    def _passed(self, now: float) -> int:
        return max(0, int(now - self.bucket_end) + 1) if now >= self.bucket_end else 0

    def _left(self, passed: int) -> float:
        """What is left when the ``passed`` oldest buckets are gone."""
        calls = sum(self._calls[passed:])
        retries = sum(self._retries[passed:])
        if passed < WINDOW:
            calls += self.calls_now
            retries += self._retries_now
        return self._reserve + self._ratio * calls - retries

    def _advance(self, now: float) -> None:
        passed = self._passed(now)
        empty = [0] * (min(passed, WINDOW) - 1)
        self._calls = [*self._calls, self.calls_now, *empty][-(WINDOW - 1) :]
        self._retries = [*self._retries, self._retries_now, *empty][-(WINDOW - 1) :]
        self._calls_before += self.calls_now
        self._retries_before += self._retries_now
        self.calls_now = self._retries_now = 0
        self.bucket_end += passed


def backoff_delay(settings: policy.Backoff, retry_number: int, rng: Random) -> float:
    """Seconds to wait before a retry: uniform between 0 and ``min(initial * multiplier ** (retry_number - 1), max)``.

    gRFC A6, which is the full jitter of
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.

    Args:
        settings: the policy's backoff.
        retry_number: 1 for the first retry.
        rng: the caller's random generator.

    Raises:
        InvalidValueError: ``retry_number`` is below 1.
    """
    if retry_number < 1:
        raise InvalidValueError("retry_number", retry_number, "1 or more")
    try:
        bound = min(settings.initial * settings.multiplier ** (retry_number - 1), settings.max)
    except OverflowError:
        bound = settings.max
    return rng.random() * bound


@dataclass(frozen=True, slots=True)
class Pushback:
    """What a server says about retrying the call that it failed."""

    allowed: bool = True
    """False: do not retry."""
    delay: float | None = None
    """Seconds to wait in place of the backoff; None: it says nothing."""


NO_PUSHBACK = Pushback()
DO_NOT_RETRY = Pushback(allowed=False)


def parse_pushback(value: str | None) -> Pushback:
    """What the value of ``grpc-retry-pushback-ms`` means: gRFC A6.

    Absent: nothing. A 32-bit integer of 0 or more: retry after so many milliseconds. Anything else: do not retry.
    """
    if value is None:
        return NO_PUSHBACK
    if not _INTEGER.fullmatch(value):
        return DO_NOT_RETRY
    milliseconds = int(value)
    if not 0 <= milliseconds <= _MAX_INT32:
        return DO_NOT_RETRY
    return Pushback(delay=milliseconds / 1000.0)
