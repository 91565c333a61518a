"""Sends spans to the control plane, over the mesh client's own transport, from within its event loop.

Nothing here blocks, and there is no thread: spans are put in a bounded queue where they end, and a task of the event
loop encodes them, a few at a time, and sends them. While no control plane can be reached the queue fills, and further
spans are dropped and counted, before anything has been done with them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from mesh_client.trace_sender import FLUSH_TIMEOUT, TraceSender
from mesh_client.transport import Transport


@dataclass(frozen=True, slots=True)
class ExportCounts:
    """Spans since the start."""

    sent: int
    """The control plane has taken them."""
    rejected: int
    """It has read them and not taken them, as it said."""
    dropped: int
    """Lost otherwise: too many waited, the control plane refused the whole request, or the process ended."""
    queued: int
    """Waiting, or on their way."""


class MeshSpanExporter(SpanExporter):
    """An exporter of the OpenTelemetry SDK to the control plane.

    Spans may come before a mesh client is there (`attach`) and from any thread; `MeshSpanProcessor` puts them
    here directly.
    In a process that was forked it begins anew: what its parent had not sent yet its parent sends.

    Args:
        queue: spans that wait at most.
        batch: spans of one request at most.
        delay: seconds for which spans are gathered.
    """

    def __init__(self, queue: int = 2_048, batch: int = 256, delay: float = 1.0) -> None:
        self.batch = batch
        self.delay = delay
        self._limit = queue
        self._begin()
        me = weakref.ref(self)

        def after_fork() -> None:
            exporter = me()
            if exporter is not None:
                exporter._begin()

        os.register_at_fork(after_in_child=after_fork)

    def _begin(self) -> None:
        self.waiting: deque[ReadableSpan] = deque()
        self._senders: list[TraceSender] = []
        self._closed = False
        self._counting = threading.Lock()
        self._sent = self._rejected = self._dropped = 0

    @property
    def counts(self) -> ExportCounts:
        """What became of the spans so far."""
        queued = len(self.waiting) + sum(sender.in_hand for sender in self._senders)
        with self._counting:
            return ExportCounts(self._sent, self._rejected, self._dropped, queued)

    def count(self, *, sent: int = 0, rejected: int = 0, dropped: int = 0) -> None:
        """So many more."""
        with self._counting:
            self._sent += sent
            self._rejected += rejected
            self._dropped += dropped

    def offer(self, span: ReadableSpan) -> None:
        """Takes a span that has ended; drops it when there is no room."""
        waiting = self.waiting
        if len(waiting) >= self._limit or self._closed:
            self.count(dropped=1)
            return
        waiting.append(span)
        if self._senders and len(waiting) >= self._senders[0].wants:
            self._senders[0].wake()

    # -- SpanExporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Takes spans from a processor of the SDK. Never waits."""
        for span in spans:
            self.offer(span)
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: float = 30_000) -> bool:
        """Waits until what is queued has been sent; whether it has been.

        In the event loop that sends them nobody can wait: there, await `TraceSender.flush`.
        """
        senders = self._senders[:1]
        if not self.waiting and not (senders and senders[0].in_hand):
            return True
        return bool(senders) and senders[0].flush_from_elsewhere(timeout_millis / 1000)

    def shutdown(self, timeout_millis: float = 30_000) -> None:
        """Sends what it can within `FLUSH_TIMEOUT`, and takes nothing any more."""
        if not self._closed:
            self.force_flush(min(timeout_millis, FLUSH_TIMEOUT * 1000))
            self._closed = True
            self.count(dropped=len(self.waiting))
            self.waiting.clear()

    # -- mesh clients

    def attach(self, transport: Transport, addresses: Sequence[str], rng: Random) -> TraceSender:
        """Begins to send in the running event loop. Of several mesh clients of a process, the first sends.

        Args:
            transport: started.
            addresses: control planes, the preferred one first.
            rng: draws waits.
        """
        sender = TraceSender(self, transport, addresses, rng, self._detached)
        self._senders.append(sender)
        self._senders[0].activate()
        return sender

    def _detached(self, sender: TraceSender) -> None:
        if sender in self._senders:
            self._senders.remove(sender)
        if self._senders:
            self._senders[0].activate()


class MeshSpanProcessor(SpanProcessor):
    """Gives sampled spans to the exporter as they end: its queue is the batch processor's.

    Args:
        exporter: sends them.
    """

    def __init__(self, exporter: MeshSpanExporter) -> None:
        self._exporter = exporter

    def on_end(self, span: ReadableSpan) -> None:
        """Takes a span."""
        if span.context.trace_flags.sampled:
            self._exporter.offer(span)

    def shutdown(self) -> None:
        """Sends what it can within `FLUSH_TIMEOUT`."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """See `MeshSpanExporter.force_flush`."""
        return self._exporter.force_flush(timeout_millis)
