"""What is counted of calls: how they ended and how long they took, by endpoint and method.

Counters only grow, so that whoever reads them may read as often as they like and lose or double nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping

BUCKETS_PER_OCTAVE = 4
"""Buckets between one duration and twice that: a percentile read off them is at most 19% above the true one."""

BOUNDS: tuple[float, ...] = tuple(50e-6 * 2.0 ** (n / BUCKETS_PER_OCTAVE) for n in range(21 * BUCKETS_PER_OCTAVE + 1))
"""Upper bounds of the buckets in seconds, each inclusive: 50 us to 105 s. One more bucket holds what is longer."""

MAX_METHODS = 200
"""Methods of one service that are told apart; calls of any others count for `OTHER`. Names come from the application,
which may be a proxy that calls whatever it is asked for."""
OTHER = "/other"

_METHOD = re.compile(r"/[!-~]{1,255}")

MAX_GONE = 200
"""Endpoints that have left and are still told apart; those that left first count for `GONE` together."""
GONE = ""

ANSWERS = frozenset(
    {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE"}
)
"""Statuses by which a service that is well answers. Success rates count all others but `GIVEN_UP` as failures."""
GIVEN_UP = "CANCELLED"
"""The status that says nothing of the service: its caller gave up."""


def is_method(name: str) -> bool:
    """Whether it is a full method name with leading slash, of a length and of characters that can be shown."""
    return _METHOD.fullmatch(name) is not None


class Tally:
    """How the attempts, or calls, of one kind ended.

    Attributes:
        ok: how many ended with OK.
        failures: how many ended with another status, by its name.
        seconds: how long all of them took together.
        buckets: how many took how long: one more than there are `BOUNDS`.
    """

    __slots__ = ("buckets", "failures", "ok", "seconds")

    def __init__(self) -> None:
        self.ok = 0
        self.failures: dict[str, int] = {}
        self.seconds = 0.0
        self.buckets = [0] * (len(BOUNDS) + 1)

    @property
    def count(self) -> int:
        """How many there were."""
        return self.ok + sum(self.failures.values())

    def succeeded(self, seconds: float) -> None:
        """One more ended with OK."""
        self.ok += 1
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS, seconds)] += 1

    def failed(self, code: str, seconds: float) -> None:
        """One more ended with this status."""
        self.failures[code] = self.failures.get(code, 0) + 1
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS, seconds)] += 1

    def ended(self, code: str, seconds: float) -> None:
        """One more ended with this status, which may be OK."""
        if code == "OK":
            self.succeeded(seconds)
        else:
            self.failed(code, seconds)

    def add(self, other: Tally, sign: int = 1) -> None:
        """Takes in what another one counted; with -1 for ``sign`` takes out what it took in before."""
        self.ok += sign * other.ok
        for code, count in list(other.failures.items()):
            self.failures[code] = self.failures.get(code, 0) + sign * count
        self.seconds += sign * other.seconds
        self.buckets = [mine + sign * its for mine, its in zip(self.buckets, other.buckets, strict=True)]


def percentile(buckets: Collection[int], share: float) -> float | None:
    """The duration in seconds that ``share`` (0 to 1) of what buckets hold did not exceed: its bucket's upper bound.

    None when they hold nothing, infinity when it is beyond the last bound.
    """
    rank = share * sum(buckets)
    passed = 0
    for index, held in enumerate(buckets):
        passed += held
        if held and passed >= rank:
            return BOUNDS[index] if index < len(BOUNDS) else float("inf")
    return None


class TallyBook:
    """The tallies of one service's attempts, by endpoint and method; endpoints that have left included.

    Its size is bounded by `MAX_METHODS` and by the endpoints that are there and `MAX_GONE` more.
    """

    def __init__(self) -> None:
        self._endpoints: dict[str, dict[str, Tally]] = {}
        self._methods: set[str] = set()

    def of(self, endpoint_id: str) -> dict[str, Tally]:
        """The tallies of one endpoint by method, to be read; `tally` makes those that are missing."""
        return self._endpoints.setdefault(endpoint_id, {})

    def tally(self, endpoint_id: str, method: str) -> Tally:
        """Where attempts of a method on an endpoint are counted."""
        return self.of(endpoint_id).setdefault(self.known(method), Tally())

    def known(self, method: str) -> str:
        """The method, or `OTHER` when there are too many, or it is no name of a method."""
        if method not in self._methods:
            if len(self._methods) >= MAX_METHODS or not is_method(method):
                return OTHER
            self._methods.add(method)
        return method

    def keep(self, endpoint_ids: Collection[str]) -> None:
        """These endpoints are there now. Of those that are not, the ones that left first lose their names."""
        gone = [each for each in self._endpoints if each not in endpoint_ids and each != GONE]
        for endpoint_id in gone[: max(0, len(gone) - MAX_GONE)]:
            for method, tally in self._endpoints.pop(endpoint_id).items():
                self.of(GONE).setdefault(method, Tally()).add(tally)

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Tally]]]:
        """Each endpoint's id with its tallies by method, as it is now: what is counted meanwhile does no harm."""
        return iter([(endpoint_id, dict(methods)) for endpoint_id, methods in list(self._endpoints.items())])
