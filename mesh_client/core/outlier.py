"""Ejection of single endpoints that fail, after Envoy's outlier detection.

https://www.envoyproxy.io/docs/envoy/latest/intro/arch_overview/upstream/outlier
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from mesh_client.core.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mesh_client.core.policy import OutlierDetection

_SUCCESS = Outcome.SUCCESS
_FAILURE = Outcome.FAILURE
_ROUNDING = 1e-9


class EjectionReason(enum.Enum):
    """Why an endpoint was ejected."""

    CONSECUTIVE_FAILURES = "failures in a row"
    SUCCESS_RATE = "fewer successes than the others"


@dataclass(frozen=True, slots=True)
class Ejection:
    """One ejection: which endpoint, from when to when, and why."""

    endpoint_id: str
    at: float
    until: float
    reason: EjectionReason


class EndpointRecord:
    """What is counted of one endpoint."""

    __slots__ = ("consecutive", "ejected", "ejections", "failures", "free_since", "successes", "until")

    def __init__(self, now: float) -> None:
        self.consecutive = 0
        """Failures since the last success."""
        self.successes = 0
        """In the window, as ``failures``."""
        self.failures = 0
        self.ejections = 0
        """Ejections in a row: the multiplier of the next one's length."""
        self.ejected = False
        self.until = now
        """End of the latest ejection."""
        self.free_since = now

    def release(self, now: float) -> None:
        """The ejection is over."""
        self.ejected = False
        self.free_since = now
        self.successes = 0


class OutlierDetector:
    """Decides which endpoints of one service this client leaves out for a while.

    - An endpoint is ejected at ``consecutive_failures`` failures in a row, or when at the end of an ``interval`` its
      success rate is below ``mean - factor * standard deviation`` of the endpoints with enough calls.
    - An ejection lasts ``base_ejection`` times the number of ejections in a row, at most ``max_ejection``. That number
      falls by one with each whole interval in which the endpoint was not ejected.
    - At most ``max_ejected_percent`` of the endpoints, rounded down but one at least, are ejected at once. An endpoint
      that is the only one is never ejected: it would be called all the same. When endpoints leave, those whose
      ejection ends first return until the limit holds again.
    - Refusals for load, and calls that their caller gave up, never count.

    What ejected endpoints still answer, to late calls or in panic, is ignored.

    Args:
        settings: the policy's.
        on_ejection: told of each ejection.

    Attributes:
        ejected: ids of the endpoints that are ejected; replaced when it changes.
    """

    __slots__ = ("_on_ejection", "_records", "_settings", "_sweep_at", "ejected")

    def __init__(
        self, settings: OutlierDetection, on_ejection: Callable[[Ejection], None] = lambda ejection: None
    ) -> None:
        self._settings = settings
        self._on_ejection = on_ejection
        self._records: dict[str, EndpointRecord] = {}
        self._sweep_at = math.inf
        self.ejected: frozenset[str] = frozenset()

    def set_endpoints(self, ids: Iterable[str], now: float) -> bool:
        """These are the endpoints now: forget the others. True if the ejected set changed."""
        if not self._settings.enabled:
            return False
        old = self._records
        records = self._records = {endpoint_id: old.get(endpoint_id) or EndpointRecord(now) for endpoint_id in ids}
        if not old:
            self._sweep_at = now + self._settings.interval
        ejected = sorted((records[endpoint_id] for endpoint_id in self.ejected & records.keys()), key=_end)
        for record in ejected[: max(0, len(ejected) - self._limit())]:
            record.release(now)
        return self._refresh()

    def record_of(self, endpoint_id: str) -> EndpointRecord:
        """What is counted of an endpoint, for whoever counts successes in place. Nobody looks at an unknown one's."""
        return self._records.get(endpoint_id) or EndpointRecord(0.0)

    def record(self, endpoint_id: str, outcome: Outcome, now: float) -> bool:
        """An attempt on the endpoint ended. True if the ejected set changed. Unknown endpoints are ignored."""
        record = self._records.get(endpoint_id)
        if record is None:
            return False
        if outcome is _SUCCESS:
            record.successes += 1
            if record.consecutive:
                record.consecutive = 0
            return False
        if outcome is not _FAILURE or record.ejected:
            return False
        record.failures += 1
        record.consecutive += 1
        if record.consecutive < self._settings.consecutive_failures or len(self.ejected) >= self._limit():
            return False
        self._eject(endpoint_id, record, EjectionReason.CONSECUTIVE_FAILURES, now)
        return self._refresh()

    def tick(self, now: float) -> bool:
        """Time has passed: ejections end, and success rates are compared once an interval. True if the set changed."""
        for endpoint_id in self.ejected:
            record = self._records[endpoint_id]
            if record.until <= now:
                record.release(now)
        if now >= self._sweep_at and self._records:
            self._sweep(now)
            self._sweep_at = now + self._settings.interval
        return self._refresh()

    def next_tick(self, now: float) -> float | None:
        """When `tick` is next worth calling, on the clock of ``now``; None when there is nothing to wait for."""
        if len(self._records) < 2:
            return None
        return min(
            self._sweep_at, min((self._records[endpoint_id].until for endpoint_id in self.ejected), default=math.inf)
        )

    def _limit(self) -> int:
        count = len(self._records)
        return max(1, int(count * self._settings.max_ejected_percent / 100.0 + _ROUNDING)) if count > 1 else 0

    def _eject(self, endpoint_id: str, record: EndpointRecord, reason: EjectionReason, now: float) -> None:
        record.ejected = True
        record.ejections += 1
        record.until = now + min(self._settings.base_ejection * record.ejections, self._settings.max_ejection)
        record.consecutive = record.successes = record.failures = 0
        self._on_ejection(Ejection(endpoint_id, now, record.until, reason))

    def _refresh(self) -> bool:
        ejected = frozenset(endpoint_id for endpoint_id, record in self._records.items() if record.ejected)
        changed = ejected != self.ejected
        self.ejected = ejected
        return changed

    def _sweep(self, now: float) -> None:
        settings = self._settings
        free = [(endpoint_id, record) for endpoint_id, record in self._records.items() if not record.ejected]
        rated = [
            (record.successes / (record.successes + record.failures), endpoint_id, record)
            for endpoint_id, record in free
            if record.successes + record.failures >= settings.success_rate_min_requests
        ]
        for _, record in free:
            if record.ejections and record.free_since <= now - settings.interval:
                record.ejections -= 1
            record.successes = record.failures = 0
        if len(rated) < settings.success_rate_min_endpoints:
            return
        rates = [rate for rate, _, _ in rated]
        # Rates that are equal but for rounding must not count as below their own mean.
        threshold = fmean(rates) - settings.success_rate_stdev_factor * pstdev(rates) - _ROUNDING
        room = self._limit() - (len(self._records) - len(free))
        worst = sorted((entry for entry in rated if entry[0] < threshold), key=lambda entry: entry[0])
        for _, endpoint_id, record in worst[:room]:
            self._eject(endpoint_id, record, EjectionReason.SUCCESS_RATE, now)


def _end(record: EndpointRecord) -> float:
    return record.until
