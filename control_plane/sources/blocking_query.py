"""One Consul blocking query: which index to ask for next, when, and what an answer or a failure means. Pure.

The rules are those of https://developer.hashicorp.com/consul/api-docs/features/blocking:
an index that goes backwards or is not above 0 is forgotten, and an answer that comes early without news is not followed
by the next question at once. Beyond them, an index is forgotten after every failure: an agent that lost its state while
it was away counts from 1 again, and asking it for more than the old index would wait for the whole ``wait`` and miss
every change in between.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from random import Random

from mesh_client.core.errors import InvalidTransitionError

QUICK_RETRIES = 10
"""Failures in a row that pass by themselves are this often followed by a quick retry."""


class Failure(enum.Enum):
    """Why a question got no usable answer."""

    UNREACHABLE = "unreachable"
    """No connection, or it broke: the agent may have been restarted."""
    UNAVAILABLE = "unavailable"
    """The agent answers that it cannot say, such as without a leader."""
    FORBIDDEN = "forbidden"
    """The token is not known, or not yet: a fresh one takes about 0.1 s to reach every server."""
    MALFORMED = "malformed"
    """The answer cannot be understood."""
    DOUBTFUL = "doubtful"
    """The answer contradicts another one, as answers do that are given in the middle of a change."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask for."""

    index: int
    """Answer once the index is above this one; 0: at once."""
    wait: float
    """Longest time to wait for that, seconds; 0 when the index is 0."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer means."""

    changed: bool
    """False when it is certain that it says what the answer before said."""
    restarted: bool
    """The agent, or what it knows, may have been lost and begun anew since the answer before."""


@dataclass(frozen=True, slots=True)
class _Answer:
    index: int
    backwards: bool
    spacing: float


class BlockingQuery:
    """Drives one watch: `ask`, then `answered` and `accept`, or `failed` at any point after `ask`.

    Args:
        rng: for jitter.
        wait: longest blocking time of a question, seconds; Consul takes at most 600.
        spacing: seconds between an answer with news and the next question, so that bursts conflate.
        idle_spacing: seconds between an early answer without news and the next question.
        min_backoff: bound of the first wait after a failure, seconds.
        max_backoff: largest bound.
    """

    def __init__(
        self,
        rng: Random,
        *,
        wait: float = 55.0,
        spacing: float = 0.01,
        idle_spacing: float = 1.0,
        min_backoff: float = 0.1,
        max_backoff: float = 3.0,
    ) -> None:
        self._rng = rng
        self._wait = wait
        self._spacing = spacing
        self._idle_spacing = idle_spacing
        self._min_backoff = min_backoff
        self._max_backoff = max_backoff
        self._index = 0
        self._last_index = 0
        self._question: Question | None = None
        self._asked_at = 0.0
        self._answer: _Answer | None = None
        self._ever_accepted = False
        self._cut_off = False
        self.failures = 0
        """Failures since an answer was accepted."""
        self.ready_at = float("-inf")
        """When the next question may be asked, monotonic seconds."""

    def ask(self, now: float) -> Question:
        """The next question.

        Raises:
            InvalidTransitionError: one is open already, or it is too early.
        """
        if self._question is not None:
            raise InvalidTransitionError("a question is open already")
        if now < self.ready_at:
            raise InvalidTransitionError(f"too early by {self.ready_at - now:.3f} s")
        self._question = Question(self._index, self._wait if self._index else 0.0)
        self._asked_at = now
        return self._question

    def answered(self, index: int | None, now: float) -> Verdict:
        """An answer came; `accept` it, or say that it `failed`.

        Args:
            index: as its header states; None without one.
            now: monotonic seconds.

        Raises:
            InvalidTransitionError: no question is open, or it has its answer.
        """
        question = self._question
        if question is None or self._answer is not None:
            raise InvalidTransitionError("no question is open")
        usable = max(index or 0, 0)
        backwards = 0 < usable < self._last_index
        news = question.index == 0 or usable != question.index
        early = now - self._asked_at < question.wait / 2
        # Without an index it is polling; an early answer without news was woken by something else.
        spacing = self._idle_spacing if usable == 0 or (early and not news) else self._spacing
        self._answer = _Answer(usable, backwards, spacing)
        return Verdict(changed=news, restarted=self._ever_accepted and (backwards or self._cut_off))

    def accept(self, now: float) -> None:
        """The answer was of use.

        Raises:
            InvalidTransitionError: there is none.
        """
        if self._answer is None:
            raise InvalidTransitionError("there is no answer")
        self._index = 0 if self._answer.backwards else self._answer.index
        self._last_index = self._answer.index or self._last_index
        self._ever_accepted = True
        self._cut_off = False
        self.failures = 0
        self.ready_at = now + self._answer.spacing
        self._question = self._answer = None

    def failed(self, failure: Failure, now: float) -> None:
        """No usable answer came.

        Raises:
            InvalidTransitionError: no question is open.
        """
        if self._question is None:
            raise InvalidTransitionError("no question is open")
        self._question = self._answer = None
        self._index = 0
        self._cut_off = self._cut_off or failure is Failure.UNREACHABLE
        self.failures += 1
        if failure in (Failure.FORBIDDEN, Failure.DOUBTFUL) and self.failures <= QUICK_RETRIES:
            self.ready_at = now + self._min_backoff * (1.0 + self._rng.random())
        else:
            bound = min(self._max_backoff, self._min_backoff * 2.0 ** min(self.failures, 30))
            self.ready_at = now + bound * (0.5 + 0.5 * self._rng.random())
