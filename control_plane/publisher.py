"""When changes become a new snapshot: after a quiet period, at the latest after a maximum delay.

After the debounce of Istio, https://github.com/istio/istio/blob/master/pilot/pkg/xds/discovery.go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from control_plane.snapshot import (
    EMPTY,
    InconsistentSnapshotError,
    Snapshot,
    changes,
    check_consistency,
)
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import ResourceKind

_log = logging.getLogger(__name__)


class Debounce:
    """Joins changes that come close together. Pure.

    Args:
        quiet: seconds without a change after which it is due, at least 0.
        maximum: seconds after the first change at which it is due in any case, at least ``quiet``.

    Raises:
        InvalidValueError: a time is outside its range.
    """

    def __init__(self, quiet: float = 0.02, maximum: float = 0.2) -> None:
        if not quiet >= 0.0:
            raise InvalidValueError("debounce.quiet", quiet, "at least 0 s")
        if not maximum >= quiet:
            raise InvalidValueError("debounce.maximum", maximum, "at least the quiet period")
        self._quiet = quiet
        self._maximum = maximum
        self._first: float | None = None
        self._last = 0.0

    def touch(self, now: float) -> None:
        """Something changed."""
        if self._first is None:
            self._first = now
        self._last = now

    @property
    def first(self) -> float | None:
        """When the first change came that has not been published; None when nothing changed."""
        return self._first

    def deadline(self) -> float | None:
        """When it is due unless there are further changes; None when nothing changed."""
        return None if self._first is None else min(self._last + self._quiet, self._first + self._maximum)

    def due(self, now: float) -> bool:
        """Whether to publish now."""
        deadline = self.deadline()
        return deadline is not None and now >= deadline

    def reset(self) -> None:
        """Everything up to here was published."""
        self._first = None


class Compile(Protocol):
    """Makes the snapshot of what is known at ``now``, and says when it changes by time alone."""

    def __call__(self, previous: Snapshot, now: float) -> tuple[Snapshot, float | None]:
        """The snapshot, with the resources of ``previous`` where equal, and the next deadline or None."""


Listener = Callable[[Snapshot, frozenset[tuple[ResourceKind, str]]], None]
"""Gets each new snapshot with the resources that changed. Called in the event loop; never blocks."""


class Publisher:
    """Holds the current snapshot and replaces it when due. The latest state wins; what was between is never seen."""

    def __init__(self, compile_snapshot: Compile, debounce: Debounce) -> None:
        self._compile = compile_snapshot
        self._debounce = debounce
        self._listeners: list[Listener] = []
        self._timer: asyncio.TimerHandle | None = None
        self._wake_at: float | None = None
        self.snapshot: Snapshot = EMPTY
        """What is published."""
        self.opened = asyncio.Event()
        """Set by `open`."""
        self.published = 0
        """Snapshots that were published."""
        self.changed_at = 0.0
        """When the first of the changes came that are being published; for listeners."""

    def listen(self, listener: Listener) -> None:
        """Calls ``listener`` on every further change."""
        self._listeners.append(listener)

    def open(self) -> None:
        """Publishes for the first time.

        To be called when every source was read once: until then an unknown service only means that nobody has said
        anything of it yet, and telling clients so would take their endpoints away.
        """
        self.opened.set()
        self.publish_now()

    def notify(self) -> None:
        """Something changed that may change the snapshot."""
        self._debounce.touch(asyncio.get_running_loop().time())
        self._arm()

    def publish_now(self) -> None:
        """Publishes without waiting for quiet: for drains, which somebody waits for."""
        self._publish(asyncio.get_running_loop().time())

    def close(self) -> None:
        """Stops the timer; nothing is published any more until the next `notify`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        deadlines = [at for at in (self._debounce.deadline(), self._wake_at) if at is not None]
        if not deadlines:
            return
        at = min(deadlines)
        if self._timer is not None:
            # Under a stream of changes the deadline only moves away: the timer looks again when it fires.
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        if self._debounce.due(now) or (self._wake_at is not None and now >= self._wake_at):
            self._publish(now)
        else:
            self._arm()

    def _publish(self, now: float) -> None:
        first = self._debounce.first
        self.changed_at = now if first is None else first
        self._debounce.reset()
        if not self.opened.is_set():
            return
        snapshot, self._wake_at = self._compile(self.snapshot, now)
        changed = frozenset(changes(self.snapshot, snapshot))
        if changed:
            try:
                check_consistency(snapshot, self.snapshot)
            except InconsistentSnapshotError:
                _log.exception("snapshot is not published")
            else:
                self.snapshot = snapshot
                self.published += 1
                for listener in self._listeners:
                    listener(snapshot, changed)
        self._arm()
