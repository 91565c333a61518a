"""A watch on one path of Consul's API: a `BlockingQuery` with its questions asked, for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from control_plane.events import SourceConnected, SourceLost
from control_plane.sources.blocking_query import BlockingQuery, Failure
from control_plane.sources.consul_answers import MalformedAnswerError
from control_plane.sources.consul_http import ConsulAnswer, ConsulError, ConsulReader

PASSING = frozenset({Failure.FORBIDDEN, Failure.DOUBTFUL})
"""Failures that usually pass by themselves within a second."""

Handle = Callable[[ConsulAnswer, bool], Awaitable[None]]
"""Takes an answer with news, and whether Consul may have lost its state since the one before.

Raises `MalformedAnswerError` or `ConsulError` when it cannot be used.
"""


class SourceHealth:
    """Whether a source can be read, as the sum of what each of its watches meets. Pure.

    Args:
        source: its name.
        starting: what it does until `started`, in words.
    """

    def __init__(self, source: str, starting: str) -> None:
        self._source = source
        self._starting: str | None = starting
        self._troubles: dict[str, str] = {}
        self._said: str | None = None
        """Detail of the last `SourceLost`; empty after `SourceConnected`; None before any."""

    def started(self) -> SourceConnected | SourceLost | None:
        """Everything was read once; what to emit."""
        self._starting = None
        return self.now()

    def trouble(self, watch: str, detail: str) -> SourceConnected | SourceLost | None:
        """A watch cannot be read; what to emit."""
        self._troubles[watch] = detail
        return self.now()

    def well(self, watch: str) -> SourceConnected | SourceLost | None:
        """A watch was read, or is not needed any more; what to emit."""
        self._troubles.pop(watch, None)
        return self.now()

    def now(self) -> SourceConnected | SourceLost | None:
        """What to emit, if anything is to be said that was not said last."""
        # One trouble at a time, the oldest: it is usually the same for all watches.
        detail = next(iter(self._troubles.values()), self._starting or "")
        if detail == self._said:
            return None
        self._said = detail
        return SourceLost(self._source, detail) if detail else SourceConnected(self._source)


@dataclass(slots=True)
class Watch:
    """Reads a path again and again, and hands every change on.

    Attributes:
        reader: what asks.
        path: of the API.
        handle: takes answers.
        on_trouble: called with a detail when the path cannot be read.
        on_well: called when it was read.
        parameters: of the query.
        patience: failures in a row of kinds that pass by themselves before they count as trouble.
    """

    reader: ConsulReader
    path: str
    handle: Handle
    on_trouble: Callable[[str], None]
    on_well: Callable[[], None]
    parameters: Mapping[str, str] = field(default_factory=dict)
    patience: int = 3
    wait: float = 55.0
    clock: Callable[[], float] = time.monotonic
    rng: Random = field(default_factory=Random)

    async def run(self) -> None:
        """Watches until cancelled."""
        query = BlockingQuery(self.rng, wait=self.wait)
        while True:
            while (delay := query.ready_at - self.clock()) > 0:
                await asyncio.sleep(delay)
            await self.once(query)

    async def once(self, query: BlockingQuery) -> None:
        """Asks one question."""
        question = query.ask(self.clock())
        try:
            answer = await self.reader.get(self.path, self.parameters, index=question.index, wait=question.wait)
            verdict = query.answered(answer.index, self.clock())
            if verdict.changed:
                await self.handle(answer, verdict.restarted)
        except ConsulError as error:
            self._failed(query, error.failure, str(error))
        except MalformedAnswerError as error:
            self._failed(query, Failure.MALFORMED, f"Consul answered {self.path} in an unknown form: {error}")
        else:
            query.accept(self.clock())
            self.on_well()

    def _failed(self, query: BlockingQuery, failure: Failure, detail: str) -> None:
        query.failed(failure, self.clock())
        if failure not in PASSING or query.failures >= self.patience:
            self.on_trouble(detail)
