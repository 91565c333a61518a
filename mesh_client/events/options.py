"""How a group of consumers works."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.retry import RetrySchedule


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """How a group works. All of its instances must say the same of what the broker keeps: delays, limit and order.

    Attributes:
        concurrency: handlers at once, 1 to 1000.
        prefetch: events that the broker sends ahead; 0 for four times the concurrency. At most 65535.
        ordered: events of one key are handled in their order, by one instance of the group at a time, the others stand
            by. False: all instances share the work, in no order.
        retries: delays between attempts.
        delivery_limit: how often an event is delivered again whose handler's process died, 1 to 1000.
        max_bytes: larger bodies go to the dead-letter queue.
    """

    concurrency: int = 16
    prefetch: int = 0
    ordered: bool = True
    retries: RetrySchedule = RetrySchedule()  # noqa: RUF009 - frozen
    delivery_limit: int = 20
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, value, most in (
            ("concurrency", self.concurrency, 1_000),
            ("prefetch", self.ahead, 65_535),
            ("delivery_limit", self.delivery_limit, 1_000),
            ("max_bytes", self.max_bytes, 128 << 20),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{name}: {value} is not allowed; expected 1 to {most}")

    @property
    def ahead(self) -> int:
        """Events that the broker sends ahead."""
        return self.prefetch or 4 * self.concurrency
