"""Load reports: what this process counts of its calls, streamed to the control plane every few seconds.

What there is to report is found by `mesh_client.core.load_report`; this shell reads the counters now and then, sends
what changed, and shows single calls while somebody looks at them. Calls themselves do nothing for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random
from typing import Protocol

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import discovery_pb2, telemetry_pb2, telemetry_pb2_grpc

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.state import EventsState
from mesh_client.core.load_report import Consumer, ReportBuilder, Server
from mesh_client.core.policy import Backoff
from mesh_client.core.policy_base import parse_duration
from mesh_client.core.retry import backoff_delay
from mesh_client.core.service import Service
from mesh_client.core.tap import ServiceTap, TapOrder
from mesh_client.identity import IdentityState
from mesh_client.stream_end import StreamEnd
from mesh_client.tasks import end_tasks, obey_cancellation
from mesh_client.telemetry_convert import duration, orders_from_proto, outbox_to_proto, requests_of, tapped_to_proto

log = logging.getLogger(__name__)

INTERVAL = 5.0
"""Seconds between reports; each is up to a fifth earlier or later, so that processes do not report all at once."""
JITTER = 0.2
TAP_INTERVAL = 0.2
"""Seconds between looks for calls that somebody taps, while somebody does."""
LAST_WORDS = 0.5
"""Seconds that the last report of a process that ends may take."""
RETRY = Backoff(initial=1.0, max=60.0, multiplier=2.0)

VARIABLE = "MESH_LOAD_REPORTS"
LEAST, MOST = 0.1, 60.0

_Stream = grpc.aio.StreamStreamCall[telemetry_pb2.ReportRequest, telemetry_pb2.ReportResponse]


def report_interval(given: float | None) -> float:
    """Seconds between load reports, 0 for none: as given, else by MESH_LOAD_REPORTS, else `INTERVAL`.

    Raises:
        ConfigError: it is something else than 0, or `LEAST` to `MOST` seconds.
    """
    name, value = "load_reports", given
    if value is None:
        name, text = VARIABLE, os.environ.get(VARIABLE, "")
        if text in ("", "on"):
            return INTERVAL
        try:
            value = 0.0 if text == "off" else float(str(parse_duration(text)))
        except ValueError:
            value = math.nan
    if value != 0.0 and not LEAST <= value <= MOST:
        raise ConfigError(f"{name}: expected how often, {LEAST:g}s to {MOST:g}s, or off")
    return value


class ReportedServer(Protocol):
    """A server of this process, as far as its load is reported."""

    def load(self) -> AbstractContextManager[Server]:
        """What it has counted; nothing of it changes within the block."""


class ReportedEvents(Protocol):
    """The event bus of this process, as far as its load is reported."""

    def consumers(self) -> Iterable[Consumer]:
        """Groups that handle events."""

    def state(self) -> EventsState:
        """What the bus knows of itself."""


@dataclass(frozen=True, slots=True)
class ProcessView:
    """What is reported of this process as a whole."""

    control_plane: str
    identity: IdentityState | None


class LoadReporter:
    """Reports the load of one process, as long as there is a channel to a control plane.

    Args:
        node: how the process names itself.
        services: the services that it calls.
        process: it as a whole.
        rng: draws jitter and waits.
        clock: seconds, monotonic; the one that services are driven by.
        interval: seconds between reports.

    Attributes:
        accepted: whether a control plane takes reports now.
        sent: reports that were sent.
        events: the process's bus, once it has one.
    """

    def __init__(
        self,
        node: discovery_pb2.Node,
        services: Callable[[], Iterable[Service]],
        process: Callable[[], ProcessView],
        rng: Random,
        clock: Callable[[], float],
        interval: float = INTERVAL,
    ) -> None:
        self.accepted = False
        self.sent = 0
        self.events: ReportedEvents | None = None
        self._node = node
        self._services = services
        self._process = process
        self._rng = rng
        self._clock = clock
        self._interval = interval
        self._epoch = secrets.token_hex(8)
        self._began_at = clock()
        self._builder = ReportBuilder(self._began_at)
        self._process_sent: telemetry_pb2.ProcessState | None = None
        self._servers: list[ReportedServer] = []
        self._leaving: list[ReportedServer] = []
        """Those that are reported once more."""
        self._orders: dict[str, list[TapOrder]] = {}
        self._taps: dict[str, ServiceTap] = {}
        self._dropped = 0
        self._wake = asyncio.Event()
        """Set when the stream has ended, what is tapped has changed, or the process ends."""
        self._ending = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._told: set[str] = set()

    def add_server(self, server: ReportedServer) -> Callable[[], None]:
        """Reports the load of a server of this process too. Returns what ends that, with one more report."""
        self._servers.append(server)
        return lambda: self._leaving.append(server)

    async def run(self, channel: grpc.aio.Channel) -> None:
        """Reports on a channel to a control plane, until that does not take reports, or this is cancelled."""
        failures = 0
        while not self._ending.is_set():
            began = self.sent
            try:
                await self._follow(channel)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self._tell(logging.INFO, "this control plane takes no load reports")
                    return
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self._tell(
                        logging.WARNING, f"load reports are not taken: {error.code().name}: {error.details() or ''}"
                    )
            except Exception as error:
                # A defect of ours. Calls must not suffer from it; whoever misses the reports finds it in the log.
                self._tell(logging.ERROR, f"load reports failed: {error!r}")
            finally:
                self._untap()
                self._ended.set()
            obey_cancellation()
            failures = 1 if self.sent > began + 1 else failures + 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_delay(RETRY, min(failures, 16), self._rng)):
                    await self._ending.wait()

    async def finish(self) -> None:
        """Sends what has not been reported yet, if it goes quickly: the process ends."""
        self._ending.set()
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self._ended.wait()

    def _tell(self, level: int, message: str) -> None:
        """Logs each thing once: it comes back every minute."""
        if message not in self._told and len(self._told) < 100:
            self._told.add(message)
            log.log(level, "%s", message)

    async def _follow(self, channel: grpc.aio.Channel) -> None:
        self._ended.clear()
        self._builder.reset()
        self._process_sent = None
        call = telemetry_pb2_grpc.TelemetryServiceStub(channel).Report()
        end = StreamEnd(call)
        reader = asyncio.ensure_future(self._read(call))
        reader.add_done_callback(lambda done: self._wake.set())
        try:
            await self._report(call, first=True)
            due = self._next_due()
            while not self._ending.is_set():
                wait = max(0.0, due - time.monotonic())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait, TAP_INTERVAL) if self._taps else wait):
                        await self._wake.wait()
                self._wake.clear()
                if reader.done():
                    await reader
                    return
                self._look_at_taps()
                if time.monotonic() >= due or self._ending.is_set():
                    await self._report(call)
                    due = self._next_due()
                elif tapped := self._tapped():
                    await self._write(call, tapped)
            await self._write(call, None)
            await reader
        except grpc.aio.AioRpcError as error:
            raise await end.instead_of(error) from None
        finally:
            self.accepted = False
            await end_tasks(reader)
            call.cancel()

    def _next_due(self) -> float:
        return time.monotonic() + self._interval * self._rng.uniform(1.0 - JITTER, 1.0 + JITTER)

    async def _report(self, call: _Stream, *, first: bool = False) -> None:
        now = self._clock()
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(server.load()) for server in self._servers]
            own = [server for server in servers if server.service == self._node.service]
            consumers = () if self.events is None else self.events.consumers()
            report = self._builder.look(self._services(), own, now, consumers)
        self._servers = [server for server in self._servers if server not in self._leaving]
        self._leaving = []
        requests = list(requests_of(report, now))
        if first:
            requests[0].node.CopyFrom(self._node)
            requests[0].epoch = self._epoch
            requests[0].uptime.CopyFrom(duration(now - self._began_at))
        state = self._process_state()
        if state != self._process_sent:
            requests[0].process.CopyFrom(state)
            self._process_sent = state
        for request in requests:
            await self._write(call, request)
        self.sent += 1

    @staticmethod
    async def _write(call: _Stream, request: telemetry_pb2.ReportRequest | None) -> None:
        """Sends a request; None says that there are no more."""
        # What a broken stream raises here, reading it raises as well.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await (call.done_writing() if request is None else call.write(request))

    def _process_state(self) -> telemetry_pb2.ProcessState:
        view = self._process()
        message = telemetry_pb2.ProcessState(control_plane=view.control_plane)
        if view.identity is not None:
            message.identity_warning = view.identity.warning
            if view.identity.expires is not None:
                message.certificate_expires.CopyFrom(Timestamp(seconds=int(view.identity.expires)))
        outbox = None if self.events is None else self.events.state().outbox
        if outbox is not None:
            message.outbox.CopyFrom(outbox_to_proto(outbox, time.time()))
        return message

    # -- taps

    async def _read(self, call: _Stream) -> None:
        async for response in call:
            self.accepted = True
            self._orders = orders_from_proto(response.taps, self._clock())
            self._look_at_taps()
            self._wake.set()

    def _look_at_taps(self) -> None:
        """Taps the services that somebody looks at, and no others."""
        now = self._clock()
        for service in self._services():
            tap, orders = self._taps.get(service.name), self._orders.get(service.name)
            if orders is not None and tap is None:
                tap = self._taps[service.name] = ServiceTap()
                tap.order(orders, now)
                service.tapped(tap)
            elif tap is not None:
                tap.order(orders or (), now)
                if not tap:
                    self._dropped += tap.dropped
                    service.tapped(None)
                    del self._taps[service.name]
                    self._orders.pop(service.name, None)

    def _untap(self) -> None:
        self._orders = {}
        self._look_at_taps()

    def _tapped(self) -> telemetry_pb2.ReportRequest | None:
        """The calls that were tapped since the last time; None when there were none."""
        now = self._clock()
        calls = [
            tapped_to_proto(tap_id, name, call, now) for name, tap in self._taps.items() for tap_id, call in tap.take()
        ]
        dropped = sum(tap.dropped for tap in self._taps.values()) + self._dropped
        self._dropped = 0
        for tap in self._taps.values():
            tap.dropped = 0
        if not calls and not dropped:
            return None
        return telemetry_pb2.ReportRequest(tapped=calls, tapped_dropped=dropped)
