"""When and where a server registers, and whether it is well: what `mesh_client.registration` obeys."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mesh_client.core.errors import ConfigError, InvalidTransitionError
from mesh_client.core.policy import Backoff
from mesh_client.core.retry import backoff_delay

WAITS = Backoff(initial=0.2, max=10.0, multiplier=2.0)
"""Waits between rounds over all addresses."""


class RegistrationState(enum.Enum):
    """Where a registration stands."""

    WAITING = "waiting"
    """Not registered; the next attempt is due at a known time."""
    ATTEMPTING = "attempting"
    """An attempt is under way."""
    REGISTERED = "registered"
    LEAVING = "leaving"
    """Still registered, but not to be renewed when it breaks."""
    GONE = "gone"
    """Deregistered, or given up on while leaving. Final."""


@dataclass(frozen=True, slots=True)
class RegistrationStatus:
    """What an operator wants to know of a registration."""

    state: RegistrationState
    registry: str
    """Address of the registry that holds it or is tried next; empty when there is none."""
    since: float
    """When the state began, in the clock that the machine was driven with."""
    failures: int
    """Failed attempts since it was last registered."""
    detail: str
    """Why the last attempt failed; empty once registered."""


class Registration:
    """Keeps one registration alive through several registries that can each break at any time.

    A failure moves on to the next address. Each round over all addresses waits longer: full jitter over exponential
    growth, reset only by a registration that was confirmed. A refusal is waited out longer from the start, since trying
    again soon cannot help.

    Args:
        addresses: registries, in the order of preference; at least one.
        rng: draws the waits.
        now: seconds, monotonic. The first attempt is due at once.

    Raises:
        ConfigError: there is no address.
    """

    def __init__(self, addresses: Sequence[str], rng: Random, now: float) -> None:
        if not addresses:
            raise ConfigError("no registry to register with; give at least one address as host:port")
        self._addresses = tuple(addresses)
        self._rng = rng
        self._next = 0
        self._state = RegistrationState.WAITING
        self._since = now
        self._due = now
        self._failures = 0
        self._detail = ""

    @property
    def state(self) -> RegistrationState:
        """Where it stands."""
        return self._state

    def status(self) -> RegistrationStatus:
        """The state in full; reading changes nothing."""
        return RegistrationStatus(self._state, self._addresses[self._next], self._since, self._failures, self._detail)

    def wait(self, now: float) -> float:
        """Seconds until the next attempt is due; 0 when it is.

        Raises:
            InvalidTransitionError: no attempt is planned.
        """
        self._require("plan an attempt", RegistrationState.WAITING)
        return max(0.0, self._due - now)

    def attempt(self, now: float) -> str:
        """Begins an attempt; the address to try.

        Raises:
            InvalidTransitionError: none is due.
        """
        self._require("attempt", RegistrationState.WAITING)
        if now < self._due:
            raise InvalidTransitionError(f"the next attempt is due in {self._due - now:.3f} s")
        self._enter(RegistrationState.ATTEMPTING, now)
        return self._addresses[self._next]

    def confirmed(self, now: float) -> bool:
        """The registry holds the registration; True when this is news.

        Raises:
            InvalidTransitionError: none was attempted.
        """
        self._require("confirm", RegistrationState.ATTEMPTING, RegistrationState.REGISTERED, RegistrationState.LEAVING)
        if self._state is not RegistrationState.ATTEMPTING:
            return False
        self._failures = 0
        self._detail = ""
        self._enter(RegistrationState.REGISTERED, now)
        return True

    def failed(self, now: float, detail: str, *, refused: bool = False) -> None:
        """The attempt failed, or the registration broke.

        Args:
            now: seconds.
            detail: what happened, for operators.
            refused: the registry answered that it will not have it, so that only a change elsewhere can help.

        Raises:
            InvalidTransitionError: nothing was attempted or registered.
        """
        self._require("fail", RegistrationState.ATTEMPTING, RegistrationState.REGISTERED, RegistrationState.LEAVING)
        self._detail = detail
        if self._state is RegistrationState.LEAVING:
            self._enter(RegistrationState.GONE, now)
            return
        self._failures += 1
        self._next = (self._next + 1) % len(self._addresses)
        if refused:
            wait = self._rng.uniform(WAITS.max / 2, WAITS.max)
        else:
            wait = backoff_delay(WAITS, 1 + (self._failures - 1) // len(self._addresses), self._rng)
        self._due = now + wait
        self._enter(RegistrationState.WAITING, now)

    def leave(self, now: float) -> None:
        """The server is about to stop. What is registered stays so until `left`; nothing is attempted any more."""
        if self._state is RegistrationState.REGISTERED:
            self._enter(RegistrationState.LEAVING, now)
        elif self._state in (RegistrationState.WAITING, RegistrationState.ATTEMPTING):
            self._enter(RegistrationState.GONE, now)

    def left(self, now: float) -> None:
        """The registry has confirmed the deregistration.

        Raises:
            InvalidTransitionError: it was not leaving.
        """
        self._require("finish leaving", RegistrationState.LEAVING, RegistrationState.GONE)
        if self._state is RegistrationState.LEAVING:
            self._detail = ""
            self._enter(RegistrationState.GONE, now)

    def _enter(self, state: RegistrationState, now: float) -> None:
        self._state = state
        self._since = now

    def _require(self, event: str, *states: RegistrationState) -> None:
        if self._state not in states:
            raise InvalidTransitionError(f"cannot {event} while {self._state.value}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a server is well, as it finds by calling itself."""

    healthy: bool
    detail: str


class SelfCheckRecord:
    """Judges a server by its self-checks.

    One check that gets no answer may be a pause of the event loop and decides nothing; several in a row do. The
    server's own word that it is not serving counts at once, and so does each good answer.

    Args:
        failures: unanswered checks in a row that make it unhealthy, at least 1.
    """

    def __init__(self, failures: int = 2) -> None:
        self._threshold = failures
        self._unanswered = 0
        self.verdict = Verdict(False, "not checked yet")

    def answered(self, serving: bool, detail: str) -> Verdict:
        """A check was answered; the verdict now."""
        self._unanswered = 0
        self.verdict = Verdict(serving, detail)
        return self.verdict

    def unanswered(self, detail: str) -> Verdict | None:
        """A check failed or took too long; the verdict now, or None while it is open."""
        self._unanswered += 1
        if self._unanswered < self._threshold:
            return None
        self.verdict = Verdict(False, detail)
        return self.verdict
