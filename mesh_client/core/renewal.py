"""When a certificate is renewed, how often that is tried, and how loudly it is said that it did not work.

Two clocks: ``now`` is the time of day, seconds since the epoch, which certificates are written in and which may jump;
``tick`` is monotonic.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from random import Random
from typing import Protocol

from mesh_client.core.errors import InvalidValueError

BACKDATE = 60.0
"""Seconds before its issuance from which a certificate is valid, so that clocks may differ a little."""
LATEST = 2 / 3
"""Share of its life after which a certificate is renewed at the latest."""
JITTER = 1 / 15
"""Share of its life by which that is earlier at most, so that workloads that started together do not renew together."""
ROTATION_SPREAD = 60.0
"""Seconds over which workloads renew, at random, when the root that signs has changed; less for short lives."""
ROTATION_SHARE = 1 / 10
"""Share of a certificate's life that `ROTATION_SPREAD` is at most."""

_RETRY = (0.5, 15.0)
_REFUSED = (5.0, 300.0)


@dataclass(frozen=True, slots=True)
class Validity:
    """From when until when a certificate is valid: seconds since the epoch.

    Raises:
        InvalidValueError: it ends before it begins.
    """

    not_before: float
    not_after: float

    def __post_init__(self) -> None:
        if not self.not_after > self.not_before:
            raise InvalidValueError("certificate.not_after", self.not_after, "a time after not_before")

    @property
    def issued(self) -> float:
        """When it was issued."""
        issued = self.not_before + BACKDATE
        return issued if issued < self.not_after else self.not_before

    @property
    def life(self) -> float:
        """Seconds from its issuance to its end."""
        return self.not_after - self.issued

    def expired(self, now: float) -> bool:
        """Whether it has ended."""
        return now >= self.not_after

    def age(self, now: float) -> float:
        """Share of its life that has passed: below 0 before it was issued, above 1 once it has ended."""
        return (now - self.issued) / self.life


class Renewal:
    """When one certificate is to be renewed: at `LATEST` of its life, a little earlier at random.

    Args:
        validity: the certificate's.
        tick: when it came.
        fresh: whether it was issued just then. Its age is then measured by the monotonic clock as well, so that it is
            renewed in time on a host whose clock is wrong.
        rng: draws the jitter.
    """

    def __init__(self, validity: Validity, tick: float, rng: Random, *, fresh: bool) -> None:
        share = LATEST - JITTER * rng.random()
        self._validity = validity
        self._rng = rng
        self._due_now = validity.issued + share * validity.life
        self._due_tick = tick + share * validity.life if fresh else math.inf

    def hasten(self, tick: float) -> None:
        """The root that signs is another one than the certificate leads up to: renew soon, at a random time."""
        spread = min(ROTATION_SPREAD, ROTATION_SHARE * self._validity.life)
        self._due_tick = min(self._due_tick, tick + self._rng.random() * spread)

    def wait(self, now: float, tick: float) -> float:
        """Seconds until it is due; 0 when it is."""
        return max(0.0, min(self._due_now - now, self._due_tick - tick))


def retry_delay(failures: int, rng: Random, *, refused: bool) -> float:
    """Seconds to wait after so many failures in a row: growing twofold, the upper half of it random.

    From 0.5 s to 15 s while nobody can be reached; from 5 s to 300 s after a refusal, which trying again soon cannot
    change. Unlike full jitter it never comes close to 0: a refusal must not become a busy loop.

    Raises:
        InvalidValueError: ``failures`` is below 1.
    """
    if failures < 1:
        raise InvalidValueError("failures", failures, "1 or more")
    least, most = _REFUSED if refused else _RETRY
    bound = min(most, least * 2.0 ** min(failures - 1, 32))
    return bound * (0.5 + 0.5 * rng.random())


class RetryDelay(Protocol):
    """Seconds to wait after failures, as `retry_delay`."""

    def __call__(self, failures: int, rng: Random, *, refused: bool) -> float:
        """After so many failures in a row."""


class Level(enum.IntEnum):
    """How urgent it is that a certificate is not renewed."""

    FINE = 0
    """It is not, or renewal works."""
    EARLY = 1
    """Half of its life is over, and whoever could renew it cannot be reached."""
    DUE = 2
    """Its renewal is due and does not work."""
    LATE = 3
    """Five sixths of its life are over: half of the time that was left for trying."""
    LAST = 4
    """A twentieth of its life is left."""
    NOT_YET = 5
    """It is not valid yet: a clock is wrong, most likely this host's."""
    EXPIRED = 6
    """It is over: nobody accepts it any more."""


_LEVELS = ((19 / 20, Level.LAST), (5 / 6, Level.LATE), (LATEST, Level.DUE), (1 / 2, Level.EARLY))


def level(validity: Validity, now: float, *, failing: bool) -> Level:
    """How urgent it is.

    Args:
        validity: the certificate's.
        now: the time of day.
        failing: whether the control plane cannot be reached, or refuses to renew.
    """
    if validity.expired(now):
        return Level.EXPIRED
    if now < validity.not_before:
        return Level.NOT_YET
    age = validity.age(now)
    if failing:
        for share, reached in _LEVELS:
            if age >= share:
                return reached
    return Level.FINE


def in_words(seconds: float) -> str:
    """A span of time for people, such as ``23 h``: in the largest unit of which it has two, rounded down."""
    for size, unit in ((86_400.0, "days"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds / size)} {unit}"
    return f"{max(0, int(seconds))} s"


def warning(validity: Validity, reached: Level, now: float, why: str) -> str:
    """What to tell an operator of a certificate; empty when there is nothing.

    Args:
        validity: the certificate's.
        reached: how urgent it is.
        now: the time of day.
        why: why it is not renewed.
    """
    if reached is Level.FINE:
        return ""
    if reached is Level.EXPIRED:
        ago = in_words(now - validity.not_after)
        return f"the certificate expired {ago} ago and nobody accepts it; it is not renewed: {why}"
    if reached is Level.NOT_YET:
        wait = in_words(validity.not_before - now)
        return f"the certificate is valid in {wait} by this host's clock, which is probably behind"
    left = in_words(validity.not_after - now)
    return f"the certificate expires in {left} and cannot be renewed: {why}"
