"""Levels of loggers that are other than configured, for a while, and what they fall back to.

event, logger      as configured          overridden
set                overridden             overridden anew; falls back to the same
reset              nothing                as configured
its time passes    -                      as configured
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mesh_client.core.errors import InvalidValueError

MAX_OVERRIDES = 100
"""Loggers at most that have another level at one time."""
DEFAULT_DURATION = 600.0
LONGEST_DURATION = 24 * 3_600.0
"""Seconds for which a level is other than configured."""

_LOGGER = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True, slots=True)
class Restore:
    """Give a logger the level that it was configured with; 0: the one of its parent."""

    logger: str
    level: int


@dataclass(frozen=True, slots=True)
class _Override:
    configured: int
    until: float


class LevelOverrides:
    """Which loggers have another level than configured, and until when. The root logger's name is empty."""

    def __init__(self) -> None:
        self._overrides: dict[str, _Override] = {}

    def set(self, logger: str, level: int, until: float) -> None:
        """A logger has another level now.

        Args:
            logger: its name.
            level: the level that it has up to now.
            until: when it falls back, monotonic seconds.

        Raises:
            InvalidValueError: there are too many, or no logger has such a name.
        """
        before = self._overrides.get(check_logger(logger))
        if before is None and len(self._overrides) >= MAX_OVERRIDES:
            raise InvalidValueError("loggers", len(self._overrides) + 1, f"at most {MAX_OVERRIDES} with another level")
        self._overrides[logger] = _Override(level if before is None else before.configured, until)

    def reset(self, logger: str) -> Restore | None:
        """A logger falls back before its time; None when it is as configured."""
        override = self._overrides.pop(logger, None)
        return None if override is None else Restore(logger, override.configured)

    def expire(self, now: float) -> tuple[Restore, ...]:
        """Those whose time has passed."""
        due = [logger for logger, override in self._overrides.items() if now >= override.until]
        return tuple(Restore(logger, self._overrides.pop(logger).configured) for logger in due)

    def next_expiry(self) -> float | None:
        """When the next one falls back; None while all are as configured."""
        return min((override.until for override in self._overrides.values()), default=None)


def check_logger(name: str) -> str:
    """The name, if it can be a logger's: at most 200 printable characters; empty for the root logger.

    Raises:
        InvalidValueError: it cannot.
    """
    if name and not _LOGGER.fullmatch(name):
        raise InvalidValueError("logger", name, "at most 200 printable characters, or nothing for the root logger")
    return name


def check_duration(seconds: float) -> float:
    """The time for which a level is other than configured: above 0, at most 24 h.

    Raises:
        InvalidValueError: it is something else.
    """
    if not 0.0 < seconds <= LONGEST_DURATION:
        raise InvalidValueError("for", seconds, "more than 0 and at most 24 hours")
    return seconds
