"""The last events of a process, within bounds, for operators who come when something has happened already."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mesh_client.core.log_entry import LogEntry, clipped


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


@dataclass(slots=True)
class LogRing:
    """Keeps the newest events; the oldest go when there are too many, or they are too large together.

    Attributes:
        max_entries: events at most.
        max_size: characters of all of them, about.
        forgotten: events that had to go.
    """

    max_entries: int = 1_000
    max_size: int = 1024 * 1024
    forgotten: int = 0
    _entries: deque[LogEntry] = field(default_factory=deque)
    _size: int = 0

    def append(self, entry: LogEntry) -> LogEntry:
        """Takes one event in, and returns it as it is kept: what is too long is cut."""
        kept = clipped(entry)
        self._entries.append(kept)
        self._size += kept.size
        while len(self._entries) > self.max_entries or self._size > self.max_size:
            self._size -= self._entries.popleft().size
            self.forgotten += 1
        return kept

    def last(self, count: int, wanted: LogFilter) -> list[LogEntry]:
        """The newest ``count`` events that are wanted, oldest first."""
        found: list[LogEntry] = []
        for entry in reversed(self._entries):
            if len(found) >= count:
                break
            if wanted.matches(entry):
                found.append(entry)
        found.reverse()
        return found
