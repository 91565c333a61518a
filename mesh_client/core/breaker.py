"""Breaker of a service as a whole: pybreaker's state machine, driven by events and an injected clock."""

from __future__ import annotations

import enum
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pybreaker

from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh_client.core.policy import CircuitBreaker

_SUCCESS = Outcome.SUCCESS
_NEUTRAL = Outcome.NEUTRAL
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class BreakerState(enum.Enum):
    """State of a breaker, in the field's usual sense: open refuses."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class _CallFailedError(Exception):
    """What pybreaker is shown for a failed call."""


class MonotonicStorage(pybreaker.CircuitMemoryStorage):
    """pybreaker's memory storage on the injected clock: ``opened_at`` is ``now``, whatever the wall clock says."""

    def __init__(self, now: float) -> None:
        super().__init__(pybreaker.STATE_CLOSED)
        self.now = now
        self.opened_at_seconds = now

    @property
    def opened_at(self) -> datetime:
        """The latest moment of opening, before any the start, as time since 1970 on the injected clock."""
        return _EPOCH + timedelta(seconds=self.opened_at_seconds)

    @opened_at.setter
    def opened_at(self, _wall_clock: datetime) -> None:
        self.opened_at_seconds = self.now


class ServiceBreaker:
    """Opens after failures in a row, refuses for a while, then lets a few probes decide.

    Closed, it counts consecutive failures; open, it refuses until ``open_duration`` has passed; half-open, it lets
    ``half_open_probes`` calls through at once: the first that succeeds closes it, the first that fails opens it again,
    a neutral one gives its place to the next. Every transition begins a new generation, and what calls of an older
    generation say is ignored: it is about the past.

    pybreaker's ``call`` would hold its lock for the whole call and let any number of probes through, so it sees a call
    only when that has ended, and only when it matters. One owner at a time: the breaker does not lock.

    Attributes:
        changed_at: when it entered its state, seconds.
        generation: the token of calls that are admitted now.
        closed: whether every call is admitted.
        quiet: whether it is closed and has counted no failure, so that another success says nothing.
    """

    __slots__ = (
        "_listener",
        "_machine",
        "_probes",
        "_settings",
        "_state",
        "_storage",
        "changed_at",
        "closed",
        "generation",
        "quiet",
    )

    def __init__(
        self,
        settings: CircuitBreaker,
        now: float,
        listener: Callable[[BreakerState, BreakerState], None] | None = None,
    ) -> None:
        """``listener`` is called with the old and the new state after each transition.

        The breaker is in the new state by then. An error that it raises reaches the caller of `admit` or `settle`; an
        `admit` that raises has admitted nothing.
        """
        self._settings = settings
        self._listener = listener
        self._storage = MonotonicStorage(now)
        self._machine = pybreaker.CircuitBreaker(
            fail_max=settings.consecutive_failures,
            reset_timeout=settings.open_duration,
            state_storage=self._storage,
            throw_new_error_on_trip=False,
        )
        self._state = BreakerState.CLOSED
        self.changed_at = now
        self.generation = 0
        self._probes = 0
        self.closed = True
        self.quiet = True

    def admit(self, now: float) -> int:
        """Ask for one call: a token for `settle`, or -1 when it is refused. Half-open, it takes a probe's place."""
        if self.closed:
            return self.generation
        if self._state is BreakerState.OPEN:
            if self.retry_after(now) > 0.0:
                return -1
            self._storage.now = now
            self._machine.half_open()
            self._follow(BreakerState.OPEN, BreakerState.HALF_OPEN)
        if self._probes >= self._settings.half_open_probes:
            return -1
        self._probes += 1
        return self.generation

    def settle(self, token: int, outcome: Outcome, now: float) -> None:
        """Say how an admitted call ended, exactly once.

        Raises:
            InvalidTransitionError: the token was never given, or every probe of its generation has settled.
        """
        generation = self.generation
        if token == generation and self.quiet and outcome is _SUCCESS:
            return
        if not 0 <= token <= generation:
            raise InvalidTransitionError(f"token {token} was never given; the generation is {generation}")
        if token < generation or not self._settings.enabled:
            return
        if not self.closed:
            if not self._probes:
                raise InvalidTransitionError("a probe settled that was not under way")
            self._probes -= 1
        if outcome is _NEUTRAL:
            return
        self._storage.now = now
        if outcome is _SUCCESS:
            self._machine.call(_succeed)
        else:
            with suppress(_CallFailedError):
                self._machine.call(_fail)
        state = BreakerState(self._storage.state)
        if state is not self._state:
            self._follow(self._state, state)
        else:
            self.quiet = self._storage.counter == 0

    def state(self, now: float) -> BreakerState:
        """The state at ``now``: open becomes half-open by the clock, even before the first probe. Changes nothing."""
        if self._state is BreakerState.OPEN and self.retry_after(now) <= 0.0:
            return BreakerState.HALF_OPEN
        return self._state

    def retry_after(self, now: float) -> float:
        """Seconds until probes are let through; 0 unless open."""
        if self._state is not BreakerState.OPEN:
            return 0.0
        return max(0.0, self._storage.opened_at_seconds + self._settings.open_duration - now)

    def _follow(self, old: BreakerState, new: BreakerState) -> None:
        """Begin a new generation where pybreaker has changed its state; then tell the listener."""
        self._state = new
        self.changed_at = self._storage.now
        self.generation += 1
        self._probes = 0
        self.closed = self.quiet = new is BreakerState.CLOSED
        if self._listener is not None:
            self._listener(old, new)


def _succeed() -> None:
    """A call that went well."""


def _fail() -> None:
    raise _CallFailedError
