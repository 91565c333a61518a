"""The registry in Consul: blocking queries on the service list and on each service of the mesh.

Connections. Consul closes more than 200 connections from one client address by default, so at most ``max_watches``
services have a blocking query of their own. Services past that are read by a few pollers: at once when their checks
change, of which one more blocking query on ``/v1/health/state/any`` tells; soon after services were registered or
deregistered anywhere; and every 30 s to be sure. An instance registers with a check in all but odd cases, so those
services are as current as the others, at the price of an answer that holds every check of the mesh.

Everything that decides is elsewhere and pure: `BlockingQuery`, `ConsulView`, `PollQueue`, `consul_answers`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from random import Random

from control_plane.events import SourceConnected, SourceLost
from control_plane.sources import Emit
from control_plane.sources.blocking_query import Failure
from control_plane.sources.consul_answers import (
    MESH_TAG,
    MalformedAnswerError,
    parse_checks,
    parse_health,
    parse_services,
)
from control_plane.sources.consul_http import ConsulAddress, ConsulAnswer, ConsulError, ConsulReader, ConsulToken
from control_plane.sources.consul_view import SOURCE, ConsulView
from control_plane.sources.consul_watch import Handle, Watch
from control_plane.sources.poll_queue import PollQueue
from control_plane.sources.source_health import SourceHealth

_logger = logging.getLogger(__name__)

_SERVICES = "/v1/catalog/services"
_POLLERS = 16
_SWEEP_SPACING = 2.0
"""Seconds between two rounds over the polled services that a change of the list sets off."""


class ConsulSource:
    """A `Source` over Consul's catalog. Services take part in the mesh by the tag ``grpc-mesh``.

    Args:
        addresses: agents of one datacenter, tried in this order.
        token: needs ``service_prefix "" {policy = "read"}`` and ``node_prefix "" {policy = "read"}`` under ACLs.
        max_watches: services with a blocking query of their own, at least 1.
        restart_hold: seconds after a restart of Consul in which nothing is removed. More than the anti-entropy
            interval, which is a minute for up to 128 nodes.
        clock: monotonic seconds.
        rng: for jitter.
    """

    name = SOURCE

    def __init__(
        self,
        addresses: Sequence[ConsulAddress],
        token: ConsulToken,
        *,
        max_watches: int = 120,
        restart_hold: float = 90.0,
        clock: Callable[[], float] = time.monotonic,
        rng: Random | None = None,
    ) -> None:
        self._addresses = tuple(addresses)
        self._token = token
        self._max_watches = max_watches
        self._restart_hold = restart_hold
        self._clock = clock
        self._rng = rng or Random()

    async def run(self, emit: Emit) -> None:
        """Emits what the catalog holds and every change, until cancelled."""
        async with ConsulReader(self._addresses, self._token) as reader, asyncio.TaskGroup() as tasks:
            view = ConsulView(self._restart_hold)
            _Run(reader, view, tasks, emit, max_watches=self._max_watches, clock=self._clock, rng=self._rng).start()


class _Run:
    """One run of the source: its tasks and what they share."""

    def __init__(
        self,
        reader: ConsulReader,
        view: ConsulView,
        tasks: asyncio.TaskGroup,
        emit: Emit,
        *,
        max_watches: int,
        clock: Callable[[], float],
        rng: Random,
    ) -> None:
        self._reader = reader
        self._view = view
        self._tasks = tasks
        self._emit = emit
        self._max_watches = max_watches
        self._clock = clock
        self._rng = rng
        self._health = SourceHealth(SOURCE, f"reading the catalog of Consul at {reader.address}")
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._queue = PollQueue()
        self._pollers: list[asyncio.Task[None]] = []
        self._polled: dict[str, tuple[int, int]] = {}
        """Losses of the reader and index when a service was polled last."""
        self._swept_at = float("-inf")
        """When the last round over the polled services began, or the next one will."""
        self._checks: dict[tuple[str, str], tuple[str, str]] = {}
        self._list_index = 0
        self._awaited: set[str] | None = None
        """Services whose first answer is awaited before the source counts as connected; None before their list."""
        self._problems: dict[str, tuple[str, ...]] = {}
        self._wake_ticker = asyncio.Event()
        self._wake_pollers = asyncio.Event()

    def start(self) -> None:
        self._emit(self._health.begin())
        self._tasks.create_task(self._reader.probe())
        self._tasks.create_task(self._tick())
        self._tasks.create_task(self._watch("services", _SERVICES, self._on_services).run())

    def _watch(self, key: str, path: str, handle: Handle, **parameters: str) -> Watch:
        return Watch(
            self._reader,
            path,
            handle,
            on_trouble=lambda detail: self._trouble(key, detail),
            on_well=lambda: self._well(key),
            parameters=parameters,
            clock=self._clock,
            rng=self._rng,
        )

    # -- the list of services

    async def _on_services(self, answer: ConsulAnswer, restarted: bool) -> None:
        if not answer.found:
            raise MalformedAnswerError("there is no such path")
        services = parse_services(answer.body)
        index = answer.index or 0
        if index < self._list_index and not restarted:
            return  # overtaken by the answer to a question that was asked later
        events, doubt = self._view.services(services, restarted, self._clock())
        if doubt is not None:
            raise ConsulError(Failure.DOUBTFUL, doubt + await self._why())
        self._list_index = index
        self._report("services", services.problems)
        for event in events:
            self._emit(event)
        self._assign()
        self._sweep()
        self._wake_pollers.set()
        self._wake_ticker.set()
        if self._awaited is None:
            self._awaited = set(self._view.watched)
            self._end_start()

    async def _why(self) -> str:
        """What Consul says of the token, for the operator."""
        try:
            await self._reader.get("/v1/acl/token/self")
        except ConsulError as error:
            return f" ({error})"
        return ""

    def _assign(self) -> None:
        """Sees that each service is watched or polled, and no other."""
        wanted = self._view.watched
        for name in [name for name in self._watches if name not in wanted]:
            self._watches.pop(name).cancel()
            self._forget(name)
        for name in [name for name in self._queue.services if name not in wanted]:
            self._queue.discard(name)
            self._forget(name)
        for name in sorted(wanted - self._watches.keys()):
            if len(self._watches) < self._max_watches:
                self._queue.discard(name)
                watch = self._watch(name, f"/v1/health/service/{name}", partial(self._on_health, name))
                self._watches[name] = self._tasks.create_task(watch.run())
            else:
                self._queue.add(name, self._clock())
        if self._queue.services and not self._pollers:
            _logger.warning(
                "Consul lists more than %d services of the mesh; the others are polled when their checks change",
                self._max_watches,
            )
            checks = self._watch(
                "checks", "/v1/health/state/any", self._on_checks, filter=f'"{MESH_TAG}" in ServiceTags'
            )
            self._pollers = [self._tasks.create_task(checks.run())]
            self._pollers += [self._tasks.create_task(self._poll()) for _ in range(_POLLERS)]
        elif self._pollers and not self._queue.services:
            for task in self._pollers:
                task.cancel()
            self._pollers = []
            self._checks = {}
            self._well("checks")

    def _forget(self, name: str) -> None:
        self._problems.pop(name, None)
        self._polled.pop(name, None)
        self._well(name)
        self._answered(name)

    # -- the endpoints of one service

    async def _on_health(self, name: str, answer: ConsulAnswer, restarted: bool) -> None:
        if not answer.found:
            raise MalformedAnswerError("there is no such path")
        health = parse_health(answer.body)
        if not answer.body and self._view.is_listed(name):
            # Gone, or not to be seen with these rights: only a list that was made later can tell.
            await self._on_services(await self._reader.get(_SERVICES), False)
            if self._view.is_listed(name):
                raise ConsulError(
                    Failure.DOUBTFUL,
                    f"Consul lists service {name} but shows none of its instances: the token lacks "
                    'node_prefix "" {policy = "read"}',
                )
        self._report(name, health.problems)
        for event in self._view.endpoints(name, health.endpoints, restarted, self._clock(), health.registrations):
            self._emit(event)
        if restarted:
            self._wake_ticker.set()
        self._answered(name)

    def _answered(self, name: str) -> None:
        if self._awaited:
            self._awaited.discard(name)
            self._end_start()

    def _end_start(self) -> None:
        if self._awaited is not None and not self._awaited:
            self._say(self._health.started())

    # -- services without a watch of their own

    async def _on_checks(self, answer: ConsulAnswer, _restarted: bool) -> None:
        if not answer.found:
            raise MalformedAnswerError("there is no such path")
        checks = parse_checks(answer.body)
        changed = {name for name, _ in checks.items() ^ self._checks.items()}
        services = {(checks.get(key) or self._checks[key])[0] for key in changed}
        self._checks = checks
        self._queue.trigger(services, self._clock())
        self._wake_pollers.set()

    def _sweep(self) -> None:
        """Polls every service soon: the list changed, which does not say where."""
        now = self._clock()
        if self._swept_at <= now:  # otherwise a round is still to come, which will see this change too
            self._swept_at = max(now, self._swept_at + _SWEEP_SPACING)
        self._queue.trigger(self._queue.services, self._swept_at)

    async def _poll(self) -> None:
        while True:
            name = self._queue.take(self._clock())
            if name is None:
                self._wake_pollers.clear()
                due = self._queue.next_due()
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if due is None else max(0.0, due - self._clock())):
                        await self._wake_pollers.wait()
                continue
            delay = None
            losses, last_index = self._polled.get(name, (self._reader.losses, 0))
            try:
                answer = await self._reader.get(f"/v1/health/service/{name}")
                index = answer.index or 0
                # As for a blocking query: whoever was away, or counts from 1 again, may have lost what it knew.
                await self._on_health(name, answer, self._reader.losses > losses or index < last_index)
                self._polled[name] = (self._reader.losses, index)
            except (ConsulError, MalformedAnswerError) as error:
                self._trouble(name, str(error))
                delay = 1.0 + self._rng.random()
            else:
                self._well(name)
            self._queue.put_back(name, self._clock(), delay)

    # -- time, state and words

    async def _tick(self) -> None:
        while True:
            self._wake_ticker.clear()
            due = self._view.next_tick()
            try:
                async with asyncio.timeout(None if due is None else max(0.0, due - self._clock())):
                    await self._wake_ticker.wait()
            except TimeoutError:
                for event in self._view.tick(self._clock()):
                    self._emit(event)
                self._assign()

    def _trouble(self, key: str, detail: str) -> None:
        self._say(self._health.trouble(key, detail))

    def _well(self, key: str) -> None:
        self._say(self._health.well(key))

    def _say(self, event: SourceConnected | SourceLost | None) -> None:
        if isinstance(event, SourceLost):
            _logger.warning("Consul: %s", event.detail)
        elif event is not None:
            _logger.info("Consul at %s can be read", self._reader.address)
        if event is not None:
            self._emit(event)

    def _report(self, key: str, problems: tuple[str, ...]) -> None:
        """One warning per problem and change of it."""
        before = self._problems.get(key, ())
        self._problems[key] = problems
        for problem in problems:
            if problem not in before:
                _logger.warning("Consul, %s: %s", key, problem)
