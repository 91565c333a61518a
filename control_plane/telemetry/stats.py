"""What counters say: rates, shares and percentiles. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from control_plane.telemetry.timeline import ATTEMPTS, CODE_NAMES, FIRST_BUCKET
from mesh_client.core.tally import ANSWERS, BOUNDS, GIVEN_UP, percentile


@dataclass(frozen=True, slots=True)
class Stats:
    """How calls, or attempts, went.

    Attributes:
        count: how many ended.
        rate: how many a second.
        success_rate: share of those that were answered well; None without any. Those that were given up do not count.
        p50: seconds that half of them took at most; None without any, infinity beyond what is told apart.
        p95: likewise 95%.
        p99: likewise 99%.
        codes: how many, by name of their status.
        attempts: how many attempts calls took; 0 where attempts are counted themselves.
    """

    count: int = 0
    rate: float = 0.0
    success_rate: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    codes: Mapping[str, int] = field(default_factory=dict)
    attempts: int = 0

    @property
    def retries(self) -> int:
        """Attempts beyond the first of each call."""
        return max(0, self.attempts - self.count)

    @property
    def failed(self) -> int:
        """How many were neither answered well nor given up."""
        return sum(count for code, count in self.codes.items() if code not in ANSWERS and code != GIVEN_UP)

    @classmethod
    def of(cls, counters: Mapping[int, int], seconds: float) -> Stats:
        """What counters say that grew within so many seconds."""
        codes = {name: counters[number] for number, name in CODE_NAMES.items() if counters.get(number)}
        count = sum(codes.values())
        judged = count - codes.get(GIVEN_UP, 0)
        well = sum(number for code, number in codes.items() if code in ANSWERS)
        buckets = [counters.get(FIRST_BUCKET + bucket, 0) for bucket in range(len(BOUNDS) + 1)]
        return cls(
            count,
            count / seconds if seconds > 0 else 0.0,
            well / judged if judged else None,
            percentile(buckets, 0.5),
            percentile(buckets, 0.95),
            percentile(buckets, 0.99),
            codes,
            counters.get(ATTEMPTS, 0),
        )
