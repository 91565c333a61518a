"""The last events of a process, within bounds, for operators who come when something has happened already."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from mesh_client.core.log_entry import LogEntry, clipped

MAX_KEPT = 1_000
"""Events that a process keeps."""


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which events are wanted.

    Attributes:
        level: the lowest, as a number of `logging`.
        logger: events of this logger and those below it; empty for all.
    """

    level: int = 0
    logger: str = ""

    def matches(self, entry: LogEntry) -> bool:
        """Whether an event is wanted."""
        if entry.level < self.level:
            return False
        return not self.logger or entry.logger == self.logger or entry.logger.startswith(f"{self.logger}.")


class Kept(NamedTuple):
    """An event as it is kept."""

    sequence: int
    """Counts the events of the process, from 1."""
    entry: LogEntry
    size: int
    """About how many characters it takes."""


@dataclass(slots=True)
class LogRing:
    """Keeps the newest events; the oldest go when there are too many, or they are too large together.

    Attributes:
        max_entries: events at most.
        max_size: characters of all of them, about.
        forgotten: events that had to go.
    """

    max_entries: int = MAX_KEPT
    max_size: int = 1024 * 1024
    forgotten: int = 0
    _kept: deque[Kept] = field(default_factory=deque)
    _size: int = 0
    _sequence: int = 0

    def append(self, entry: LogEntry) -> Kept:
        """Takes one event in, and returns it as it is kept: what is too long is cut."""
        self._sequence += 1
        cut = clipped(entry)
        kept = Kept(self._sequence, cut, cut.size())
        self._kept.append(kept)
        self._size += kept.size
        while len(self._kept) > self.max_entries or self._size > self.max_size:
            self._size -= self._kept.popleft().size
            self.forgotten += 1
        return kept

    def last(self, count: int, wanted: LogFilter, after: int = 0) -> list[Kept]:
        """The newest ``count`` events that are wanted, oldest first; none up to the sequence number ``after``."""
        found: list[Kept] = []
        for kept in reversed(self._kept):
            if len(found) >= count or kept.sequence <= after:
                break
            if wanted.matches(kept.entry):
                found.append(kept)
        found.reverse()
        return found
