"""Whether a source can be read, as the sum of what each of its watches meets. Pure."""

from __future__ import annotations

from control_plane.events import SourceConnected, SourceLost


class SourceHealth:
    """Turns what watches meet into `SourceConnected` and `SourceLost`, each said once.

    Args:
        source: its name.
        starting: what it does until `started`, in words.
    """

    def __init__(self, source: str, starting: str) -> None:
        self._source = source
        self._starting = starting
        self._troubles: dict[str, str] = {}
        self._said: str | None = None
        """Detail of the last `SourceLost`; empty after `SourceConnected`; None before any."""

    def begin(self) -> SourceLost:
        """What to emit first: nothing was read yet."""
        self._said = self._starting
        return SourceLost(self._source, self._starting)

    def started(self) -> SourceConnected | SourceLost | None:
        """Everything was read once; what to emit."""
        self._starting = ""
        return self._news()

    def trouble(self, watch: str, detail: str) -> SourceConnected | SourceLost | None:
        """A watch cannot be read; what to emit."""
        self._troubles[watch] = detail
        return self._news()

    def well(self, watch: str) -> SourceConnected | SourceLost | None:
        """A watch was read, or is not needed any more; what to emit."""
        self._troubles.pop(watch, None)
        return self._news()

    def _news(self) -> SourceConnected | SourceLost | None:
        # One trouble at a time, the oldest: it is usually the same for all watches.
        detail = next(iter(self._troubles.values()), self._starting)
        if detail == self._said:
            return None
        self._said = detail
        return SourceLost(self._source, detail) if detail else SourceConnected(self._source)
