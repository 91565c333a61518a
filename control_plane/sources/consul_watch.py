"""A watch on one path of Consul's API: a `BlockingQuery` with its questions asked, for ever."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from control_plane.sources.blocking_query import BlockingQuery, Failure
from control_plane.sources.consul_answers import MalformedAnswerError
from control_plane.sources.consul_http import ConsulAnswer, ConsulError, ConsulReader

PASSING = frozenset({Failure.FORBIDDEN, Failure.DOUBTFUL})
"""Failures that usually pass by themselves within a second."""

Handle = Callable[[ConsulAnswer, bool], Awaitable[None]]
"""Takes an answer with news, and whether Consul may have lost its state since the one before.

Raises `MalformedAnswerError` or `ConsulError` when it cannot be used.
"""


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
