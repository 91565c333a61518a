"""Metrics as values, before they are written in anybody's format. Names follow Prometheus's conventions.

https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mesh_client.core.tally import BOUNDS, BUCKETS_PER_OCTAVE, Tally

HISTOGRAM_BOUNDS: tuple[float, ...] = BOUNDS[BUCKETS_PER_OCTAVE::BUCKETS_PER_OCTAVE]
"""Upper bounds of histograms in seconds, 100 us to 105 s: each is twice the one before, and one of the tally's."""


class Kind(enum.Enum):
    """What a metric's value means."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric.

    Attributes:
        name: as it is queried; counters end with ``_total``.
        kind: what its value means.
        help: in a sentence.
        labels: names of its labels.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Histogram:
    """Durations.

    Attributes:
        buckets: how many took at most each of `HISTOGRAM_BOUNDS`, and, last, how many there were: each includes those
            before.
        seconds: how long all took together.
    """

    buckets: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, buckets: Sequence[int], seconds: float) -> Histogram:
        """What a tally's finer buckets hold."""
        passed = tuple(accumulate(buckets))
        return cls((*passed[BUCKETS_PER_OCTAVE:-1:BUCKETS_PER_OCTAVE], passed[-1]), max(0.0, seconds))

    def plus(self, other: Histogram) -> Histogram:
        """Both together."""
        added = (mine + its for mine, its in zip(self.buckets, other.buckets, strict=True))
        return Histogram(tuple(added), self.seconds + other.seconds)


Value = float | Histogram


class MetricSet:
    """Values of metrics at one moment. What several parts of a process say of one thing is added up.

    Args:
        families: the metrics that there are.
    """

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = {family.name: family for family in families}
        self._values: dict[str, dict[tuple[str, ...], Value]] = {name: {} for name in self._families}

    def add(self, name: str, labels: tuple[str, ...], value: float) -> None:
        """Adds to a counter or gauge.

        Raises:
            KeyError: there is no such metric.
            ValueError: it has other labels.
        """
        values = self._of(name, labels)
        known = values.get(labels, 0.0)
        values[labels] = value + known if isinstance(known, int | float) else value

    def top(self, name: str, labels: tuple[str, ...], value: float) -> None:
        """Sets a gauge, unless it is larger already."""
        values = self._of(name, labels)
        known = values.get(labels)
        if not isinstance(known, int | float) or value > known:
            values[labels] = value

    def durations(self, name: str, labels: tuple[str, ...], tally: Tally) -> None:
        """Adds what a tally holds to a histogram."""
        values = self._of(name, labels)
        made, known = Histogram.of(tally.buckets, tally.seconds), values.get(labels)
        values[labels] = made.plus(known) if isinstance(known, Histogram) else made

    def _of(self, name: str, labels: tuple[str, ...]) -> dict[tuple[str, ...], Value]:
        if len(labels) != len(self._families[name].labels):
            raise ValueError(f"{name} has the labels {self._families[name].labels}, not {labels}")
        return self._values[name]

    def __iter__(self) -> Iterator[tuple[Family, Mapping[tuple[str, ...], Value]]]:
        """Each metric with its values by labels; also those without any."""
        return ((family, self._values[name]) for name, family in self._families.items())
