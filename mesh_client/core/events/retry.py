"""When a failed event is tried again, and when not any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mesh_client.core.errors import ConfigError

DEFAULT_DELAYS = (1.0, 5.0, 30.0, 120.0, 600.0)
"""Seconds before the second attempt, the third, and so on."""

MAX_DELAYS = 12
MIN_DELAY, MAX_DELAY = 0.01, 86_400.0


@dataclass(frozen=True, slots=True)
class RetrySchedule:
    """Growing delays, one before each repetition: so there is one attempt more than there are delays.

    Attributes:
        delays: seconds, 0.01 to a day, each at least as long as the one before; at most 12. None for a single attempt.

    Raises:
        ConfigError: they are not.
    """

    delays: Sequence[float] = DEFAULT_DELAYS

    def __post_init__(self) -> None:
        fits = all(MIN_DELAY <= delay <= MAX_DELAY for delay in self.delays)
        if not fits or len(self.delays) > MAX_DELAYS or list(self.delays) != sorted(self.delays):
            raise ConfigError(
                f"retry delays: {list(self.delays)} are not allowed; expected at most {MAX_DELAYS}, growing, "
                f"{MIN_DELAY:g} s to a day"
            )

    @property
    def attempts(self) -> int:
        """How often a handler is called for one event at most."""
        return len(self.delays) + 1

    def level(self, attempt: int) -> int | None:
        """Which delay comes after a failed attempt, from 0; None when it was the last.

        Args:
            attempt: counts from 1.
        """
        return attempt - 1 if attempt <= len(self.delays) else None

    @property
    def milliseconds(self) -> tuple[int, ...]:
        """The delays in whole milliseconds, as brokers count them."""
        return tuple(round(delay * 1000) for delay in self.delays)
