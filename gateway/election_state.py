"""Which of several gateways tells their edge what to do: one by a lock in Consul, each where there is no Consul. Pure.

The lock is a key that a session holds (https://developer.hashicorp.com/consul/docs/dynamic-app-config/sessions). A
session that is not renewed ends between one and two times its TTL later. What is pushed twice does no harm, so whoever
cannot ask Consul for a TTL acts alone: an edge that two gateways configure is better than one that nobody does.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mesh_client.core.errors import InvalidTransitionError, InvalidValueError

MIN_TTL, MAX_TTL = 10.0, 86_400.0
"""Seconds; Consul's own limits."""
LOOK_INTERVAL = 1.0
"""Seconds between looks at the lock of those that do not hold it."""


class Role(enum.Enum):
    """What a gateway is among those of one edge."""

    UNDECIDED = "undecided"
    """Consul has not answered yet."""
    LEADER = "leader"
    """It holds the lock."""
    STANDBY = "standby"
    """Another one holds the lock, or none does yet."""
    ALONE = "alone"
    """There is no Consul that could be asked: it acts as if there were no others."""

    @property
    def pushes(self) -> bool:
        """Whether it tells the edge what to do."""
        return self in (Role.LEADER, Role.ALONE)


class Ask(enum.Enum):
    """One question to Consul."""

    CREATE = "create"
    """Make a session."""
    RENEW = "renew"
    """Renew the session."""
    LOOK = "look"
    """Read which session holds the lock."""
    ACQUIRE = "acquire"
    """Take the lock."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask now; the answer goes to the method that is named like it."""

    ask: Ask
    session: str
    sent_at: float


class Election:
    """The machine of one gateway. One question is open at a time.

    Args:
        ttl: of its session, seconds, `MIN_TTL` to `MAX_TTL`.
        now: the time, monotonic seconds, as everywhere below.

    Raises:
        InvalidValueError: the TTL is outside its range.
    """

    def __init__(self, ttl: float, now: float) -> None:
        if not MIN_TTL <= ttl <= MAX_TTL:
            raise InvalidValueError("ttl", ttl, f"{MIN_TTL:.0f} to {MAX_TTL:.0f} seconds")
        self._ttl = ttl
        self._open: Question | None = None
        self._next_at = now
        self._answered_at = now
        """When a question was sent that Consul answered; before the first one, the start."""
        self._heard = False
        self._session = ""
        self._renew_at = now
        self._looked = False
        """Whether the lock was read since the last wait."""
        self._free = False
        self._held = False
        self.trouble = ""
        """Why Consul could not be asked last; empty when it was."""
        self.holder = ""
        """Who holds the lock, in words; empty when nobody does or it is not known."""

    @property
    def session(self) -> str:
        """The session that may hold the lock; empty when there is none."""
        return self._session

    def role(self, now: float) -> Role:
        """What this gateway is."""
        if now >= self._answered_at + self._ttl:
            return Role.ALONE
        if self._held:
            return Role.LEADER
        return Role.STANDBY if self._heard else Role.UNDECIDED

    def deadline(self) -> float | None:
        """When there is something to ask, or the role changes by time alone; None while an answer is awaited."""
        return None if self._open is not None else self._next_at

    def question(self, now: float) -> Question | None:
        """What to ask now; None when it is not time, or an answer is awaited."""
        if self._open is not None or now < self._next_at:
            return None
        if not self._session:
            ask = Ask.CREATE
        elif now >= self._renew_at:
            ask = Ask.RENEW
        elif self._looked and self._free:
            ask = Ask.ACQUIRE
        else:
            ask = Ask.LOOK
        self._open = Question(ask, self._session, now)
        return self._open

    def created(self, session: str) -> None:
        """There is a session."""
        sent_at = self._answered(Ask.CREATE)
        self._session, self._held, self._looked = session, False, False
        self._renew_at = sent_at + self._ttl / 3

    def renewed(self, *, alive: bool) -> None:
        """The session was renewed, or there is none any more, and so no lock that it could hold."""
        sent_at = self._answered(Ask.RENEW)
        if alive:
            self._renew_at = sent_at + self._ttl / 3
        else:
            self._session, self._held = "", False

    def looked(self, session: str, holder: str, now: float) -> None:
        """The lock is held by a session; an empty one: by none.

        Args:
            session: which.
            holder: who that is, in words.
            now: the time.
        """
        self._answered(Ask.LOOK)
        self._looked, self._free = True, not session
        self._held = session == self._session
        self.holder = holder if session else ""
        self._heard = True
        if session:
            self._rest(now)

    def acquired(self, now: float, *, taken: bool) -> None:
        """The lock was taken, or another one was quicker, or Consul still delays it after its last holder's end."""
        self._answered(Ask.ACQUIRE)
        self._held = taken
        self._heard = True
        self._rest(now)

    def failed(self, trouble: str, now: float) -> None:
        """The question was not answered, or refused.

        Raises:
            InvalidTransitionError: none was open.
        """
        self._take()
        self.trouble = trouble
        self._rest(now)

    def _rest(self, now: float) -> None:
        self._looked = False
        quiet = now + LOOK_INTERVAL
        self._next_at = max(quiet, self._renew_at) if self._held and not self.trouble else quiet

    def _answered(self, ask: Ask) -> float:
        question = self._take(ask)
        self.trouble = ""
        self._answered_at = question.sent_at
        return question.sent_at

    def _take(self, ask: Ask | None = None) -> Question:
        question = self._open
        if question is None or ask not in (None, question.ask):
            raise InvalidTransitionError(f"{ask.value if ask else 'nothing'} was not asked")
        self._open = None
        return question
