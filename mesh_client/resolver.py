"""From the discovery stream to services that calls can be balanced over: joins store, disk cache and core services."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from mesh.v1 import discovery_pb2

from mesh_client.attendance import Attendance
from mesh_client.context import CALLER_METADATA_KEY
from mesh_client.core.balancer import Node
from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import ConfigError, Reason
from mesh_client.core.model import Locality, check_service_name
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.service import Service
from mesh_client.core.store import EndpointsResource, Resolution, Store
from mesh_client.discovery import Applied, Discovery
from mesh_client.disk_cache import DiskCache
from mesh_client.target import Target
from mesh_client.tasks import end_tasks, in_thread
from mesh_client.telemetry import LoadReporter, ProcessView
from mesh_client.tracing_choice import choose_tracing, send_traces
from mesh_client.transport import Transport

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.trace_sender import TraceSender
    from mesh_client.tracing import Tracing

log = logging.getLogger(__name__)

T = TypeVar("T")

RESOLUTION_TIMEOUT = 5.0
"""Seconds that calls wait for the first word of a service before they fail, unless they wait for ready."""
NOT_ASKED = "not asked, for want of a certificate"
CACHE_DELAY = 0.2
"""Seconds from a change to its being on disk; changes meanwhile are written together."""


class Resolver:
    """Follows services and keeps their targets current.

    What is on disk counts only once every control plane has failed, or has not answered for `RESOLUTION_TIMEOUT`: old
    endpoints must not be called while newer ones can be had.

    Args:
        addresses: control planes.
        node: how this client names itself.
        locality: where it runs.
        cache: the last snapshot on disk, or None.
        rng: drives every random choice.
        clock: seconds, monotonic.
        transport: opens every channel; started and stopped with this.
        applied: awaited before endpoints are acknowledged, if they are for something that has to be told of them.
        tracer_provider: makes spans; by default the process's.
        attendance: keeps the process at hand for operators; None for not at all.
        report_interval: seconds between load reports; 0 for none.

    Attributes:
        reports: reports the load of this process; None when nobody wants that.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        node: discovery_pb2.Node,
        locality: Locality,
        cache: DiskCache | None,
        rng: Random,
        clock: Callable[[], float],
        transport: Transport,
        *,
        applied: Applied | None = None,
        tracer_provider: TracerProvider | None = None,
        attendance: Attendance | None = None,
        report_interval: float = 0.0,
    ) -> None:
        self.transport = transport
        self.addresses = tuple(addresses)
        self.attendance = attendance
        self._tracer_provider = tracer_provider
        self._clock = clock
        self._node = node
        self._zone = locality.zone
        self._cache = cache
        self._rng = rng
        self._store = Store(applied_elsewhere=applied is not None)
        self._targets: dict[str, Target] = {}
        self._policy_watchers: dict[str, list[Callable[[ServicePolicy], None]]] = {}
        self._endpoint_watchers: dict[str, list[Callable[[EndpointsResource | None], None]]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._save_timer: asyncio.TimerHandle | None = None
        self._saving = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changes: set[asyncio.Future[None]] = set()
        self._generation = 0
        self._tracing: Tracing | None = None
        self._sender: TraceSender | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self.reports: LoadReporter | None = None
        if report_interval > 0:
            # A generator of its own: what time passes must not change what a seed repeats.
            self.reports = LoadReporter(node, self._services, self._process, Random(), clock, report_interval)
        self.discovery = Discovery(
            addresses,
            node,
            self._store,
            rng,
            clock,
            self._services_changed,
            self._stream_changed,
            transport=transport,
            applied=applied,
            beside=[each for each in (attendance and attendance.attend, self.reports and self.reports.run) if each],
        )

    @property
    def tracer_provider(self) -> TracerProvider | None:
        """What it was given to make spans with."""
        return self._tracer_provider

    @property
    def targets(self) -> Collection[Target]:
        """The services followed."""
        return self._targets.values()

    @property
    def in_sync(self) -> bool:
        """Whether the open stream has confirmed what is held."""
        return self._store.in_sync

    async def start(self) -> None:
        """Loads the cache and opens the stream.

        Raises:
            ConfigError: it was started before, the files of its identity are not as they must be, or the environment
                asks for tracing wrongly.
        """
        if self._loop is not None:
            raise ConfigError("this mesh client has been entered already; make another with mesh_client.connect()")
        self._tracing = choose_tracing(self._node.service, self._tracer_provider, self._node.id)
        self._loop = asyncio.get_running_loop()
        await self.transport.start()
        self._unsubscribe = self.transport.on_change(self._identity_changed)
        self._generation = self.transport.generation
        if self._cache is not None:
            try:
                self._store.restore(*await asyncio.to_thread(self._cache.load))
            except BaseException:
                self._unsubscribe()
                await self.transport.stop()
                raise
        self._sender = send_traces(self._tracer_provider, self.transport, self.addresses, self._rng)
        self._spawn(self.discovery.run())

    async def stop(self) -> None:
        """Closes the stream and every connection, and writes what is not on disk yet."""
        for timer in self._timers.values():
            timer.cancel()
        if self._save_timer is not None:
            self._save_timer.cancel()
            await self._save()
        if self.reports is not None:
            await self.reports.finish()
        await end_tasks(*self._tasks)
        for target in self._targets.values():
            await target.close()
        if self._sender is not None:
            await self._sender.stop()  # last: the spans of calls that were cancelled are among those that it sends
        if self.attendance is not None:
            self.attendance.close()
        self._unsubscribe()
        await self.transport.stop()

    def target(self, name: str) -> Target:
        """The target of a service, followed from now on.

        Raises:
            ConfigError: the mesh client is not entered.
            InvalidValueError: the name is not a DNS label.
        """
        if self._loop is None:
            raise ConfigError("enter the mesh client first: async with mesh_client.connect() as mesh")
        target = self._targets.get(name)
        if target is None:
            target = self._targets[name] = Target(
                self._service(check_service_name(name)),
                self._claim(),
                self._loop,
                self._spawn,
                self._clock,
                self.transport,
                self._tracing,
            )
            self.discovery.send(self._store.subscribe(name))
            self._await_word_of(name)
            self._stream_changed()
        return target

    def _claim(self) -> tuple[tuple[str, str], ...]:
        """What servers are told of who calls. With identity they know, and each header of a call costs CPU time."""
        return () if self.transport.secure or not self._node.service else ((CALLER_METADATA_KEY, self._node.service),)

    def watch_policy(self, service: str, callback: Callable[[ServicePolicy], None]) -> Callable[[], None]:
        """Calls back with the policy of a service, now if it is known, and at each change. Returns what ends that.

        Not with defaults in place of a policy that may exist, but cannot be read.
        """
        target = self.target(service)
        watchers = self._policy_watchers.setdefault(service, [])
        watchers.append(callback)
        if target.service.policy_version and not target.service.policy_provisional:
            callback(target.service.policy)
        return lambda: watchers.remove(callback)

    def follow_policy(self, service: str, callback: Callable[[ServicePolicy], None]) -> Callable[[], None]:
        """As `watch_policy`, but with the defaults when the mesh does not know the service. It may repeat itself."""
        known = self.target(service).service

        def heard(_: object) -> None:
            if known.resolution is Resolution.UNKNOWN:
                callback(ServicePolicy(service=service))
            elif known.resolution is Resolution.ACTIVE and not known.policy_provisional:
                callback(known.policy)

        ends = self.watch_policy(service, heard), self.watch_endpoints(service, heard)

        def stop() -> None:
            for end in ends:
                end()

        return stop

    def watch_endpoints(self, service: str, callback: Callable[[EndpointsResource | None], None]) -> Callable[[], None]:
        """Calls back with the endpoints of a service, now if it is known, and at each change; None when it is unknown.

        Returns what ends that.
        """
        target = self.target(service)
        watchers = self._endpoint_watchers.setdefault(service, [])
        watchers.append(callback)
        if target.service.resolution is not Resolution.PENDING:
            callback(self._active_endpoints(target))
        return lambda: watchers.remove(callback)

    def _active_endpoints(self, target: Target) -> EndpointsResource | None:
        service = target.service
        return self._store.endpoints(service.name) if service.resolution is Resolution.ACTIVE else None

    async def changed(self) -> None:
        """Returns at the next change of the stream or of a service."""
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changes.add(change)
        try:
            await change
        finally:
            self._changes.discard(change)

    def _service(self, name: str) -> Service:
        def transition(old: BreakerState, new: BreakerState) -> None:
            log.warning("breaker of %s: %s -> %s", name, old.value, new.value)

        def unreached(node: Node, details: str) -> None:
            self._targets[name].unreached(node, details)

        return Service(
            name,
            zone=self._zone,
            rng=self._rng,
            now=self._clock(),
            on_transition=transition,
            snapshot_age=self.discovery.age,
            control_plane=lambda: self.discovery.detail,
            identity=self._describe_identity,
            on_unreached=unreached,
        )

    def _services(self) -> list[Service]:
        return [target.service for target in self._targets.values()]

    def _process(self) -> ProcessView:
        identity = self.transport.identity
        return ProcessView(self.discovery.detail, None if identity is None else identity.state(time.time()))

    def _describe_identity(self) -> str:
        identity = self.transport.identity
        return "" if identity is None else identity.describe(time.time())

    def _services_changed(self, names: Iterable[str]) -> None:
        now = self._clock()
        for name in names:
            target = self._targets[name]
            service = target.service
            resolution = self._store.resolution(name)
            policy, endpoints = self._store.policy(name), self._store.endpoints(name)
            old_policy = service.policy_version
            old_endpoints = service.resolution, service.endpoints_version
            if policy is not None and endpoints is not None:
                gone = service.activate(policy, endpoints, now)
            elif resolution is Resolution.UNKNOWN or service.resolution is not Resolution.PENDING:
                gone = service.deactivate(resolution, now)
            else:
                continue
            service.unreached = ""
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()
            target.changed(gone)
            if service.policy_version != old_policy and not service.policy_provisional:
                self._tell(self._policy_watchers, service.name, service.policy)
            if (service.resolution, service.endpoints_version) != old_endpoints:
                self._tell(self._endpoint_watchers, service.name, self._active_endpoints(target))
            self._save_soon()
        self._notify()

    @staticmethod
    def _tell(watchers: Mapping[str, Sequence[Callable[[T], None]]], name: str, value: T) -> None:
        for watcher in tuple(watchers.get(name, ())):
            try:
                watcher(value)
            except Exception:
                log.exception("what follows %s failed", name)

    def _stream_changed(self) -> None:
        if self.discovery.rounds > 0:
            self._services_changed(self._store.use_cache())
            for name in self._pending():
                self._give_up(name)
        elif self._store.in_sync:
            self._hope_again()
        self._notify()

    def _hope_again(self) -> None:
        for name in self._pending():
            if self._targets[name].service.unreached:
                self._targets[name].service.unreached = ""
                self._await_word_of(name)

    def _identity_changed(self) -> None:
        transport = self.transport
        if transport.generation != self._generation:
            self._generation = transport.generation
            for target in self._targets.values():
                target.reconnect()
        if transport.failing:
            for name in self._pending():
                self._give_up(name)
        elif not transport.problem:
            self._hope_again()
        self._notify()

    def _pending(self) -> list[str]:
        return [name for name, target in self._targets.items() if target.service.resolution is Resolution.PENDING]

    def _await_word_of(self, name: str) -> None:
        if self._loop is not None:
            if (timer := self._timers.pop(name, None)) is not None:
                timer.cancel()
            self._timers[name] = self._loop.call_later(RESOLUTION_TIMEOUT, self._word_is_late, name)

    def _word_is_late(self, name: str) -> None:
        if not self.transport.problem:  # Without an identity nobody can be called, known or not.
            self._services_changed(self._store.use_cache())
        if name in self._pending():
            self._give_up(name)

    def _give_up(self, name: str) -> None:
        target = self._targets[name]
        service, problem = target.service, self.transport.problem
        service.unreached = NOT_ASKED if problem else self.discovery.detail
        service.unreached_reason = Reason.NO_IDENTITY if problem else Reason.CONTROL_PLANE_NEVER_REACHED
        target.changed(())

    def _notify(self) -> None:
        changes, self._changes = self._changes, set()
        for change in changes:
            if not change.done():
                change.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _save_soon(self) -> None:
        if self._cache is not None and self._save_timer is None and self._loop is not None:
            self._save_timer = self._loop.call_later(CACHE_DELAY, lambda: self._spawn(self._save()))

    async def _save(self) -> None:
        self._save_timer = None
        if self._cache is not None:
            async with self._saving:  # An older snapshot must not overtake a newer one.
                await in_thread(self._cache.save, self._store.active())
