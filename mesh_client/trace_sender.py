"""Sends spans to the control plane from within an event loop, over the mesh client's own transport."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, set_value
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from mesh_client.core.handshake import explain
from mesh_client.core.model import StatusCode
from mesh_client.core.trace_delivery import Delivery
from mesh_client.otlp_encoding import encode_request
from mesh_client.tasks import end_tasks
from mesh_client.transport import CONTROL_PLANE, Transport

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
SEND_TIMEOUT = 5.0
"""Seconds within which a control plane has to take spans."""
FLUSH_TIMEOUT = 0.5
"""Seconds for which the end of a client, or of the process, is held up to send what is left."""
MAX_REQUEST = 3 * 1024 * 1024
"""Bytes of a request; control planes take 4 MiB."""
AT_ONCE = 32
"""Spans that are encoded before everything else in the event loop has its turn: about half a millisecond."""

_NOTHING = math.inf
"""Spans that wait for whoever is not to be woken."""
_TELL_EVERY = 60.0
"""Seconds between warnings."""

log = logging.getLogger(__name__)


class Outbox(Protocol):
    """Where spans wait to be sent."""

    waiting: deque[ReadableSpan]
    batch: int
    delay: float

    def count(self, *, sent: int = 0, rejected: int = 0, dropped: int = 0) -> None:
        """What became of so many."""


class TraceSender:
    """Sends an exporter's spans in one event loop. Made by `MeshSpanExporter.attach`."""

    def __init__(
        self,
        outbox: Outbox,
        transport: Transport,
        addresses: Sequence[str],
        rng: Random,
        on_stop: Callable[[TraceSender], None],
    ) -> None:
        self._outbox = outbox
        self._transport = transport
        self._addresses = tuple(addresses)
        self._on_stop = on_stop
        self._delivery = Delivery(len(self._addresses), rng)
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._woken = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._channel: grpc.aio.Channel | None = None
        self._channel_is = ("", -1)
        self._flushing = 0
        self._stopped = False
        self._reachable = True
        self._told: dict[str, float] = {}
        self.wants: float = _NOTHING
        """It is to be woken once so many spans wait."""
        self.in_hand = 0
        """Spans that were taken from the queue and are on their way."""

    # -- from any thread

    def activate(self) -> None:
        """Begins to send."""
        self._call(self._begin)

    def wake(self) -> None:
        """Enough spans wait."""
        self.wants = _NOTHING
        self._call(self._woken.set)

    def flush_from_elsewhere(self, timeout: float) -> bool:
        """Waits for `flush`; in the event loop's own thread, which cannot wait, it says at once that it did not."""
        if threading.get_ident() == self._thread or not self._loop.is_running():
            return False
        flushing = asyncio.run_coroutine_threadsafe(self.flush(timeout), self._loop)
        try:
            return flushing.result(timeout)
        except (TimeoutError, concurrent.futures.CancelledError):
            return False

    def _call(self, work: Callable[[], None]) -> None:
        if threading.get_ident() == self._thread:
            work()
        else:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(work)

    # -- in the event loop

    def _begin(self) -> None:
        if self._task is None and not self._stopped:
            self._task = self._loop.create_task(self._run(), name="traces to the control plane")

    async def flush(self, timeout: float) -> bool:
        """Sends what waits, for so many seconds at most; whether all was sent. Gives up where nobody is reached."""
        self._flushing += 1
        self._woken.set()
        try:
            async with asyncio.timeout(timeout):
                while (self._outbox.waiting or self.in_hand) and self._reachable and not self._transport.problem:
                    self._settled.clear()
                    await self._settled.wait()
        except TimeoutError:
            pass
        finally:
            self._flushing -= 1
        return not (self._outbox.waiting or self.in_hand)

    async def stop(self) -> None:
        """Sends what it can within `FLUSH_TIMEOUT`, then ends. What is queued then waits for the next mesh client."""
        if self._task is not None:
            await self.flush(FLUSH_TIMEOUT)
        self._stopped = True
        self._on_stop(self)
        await end_tasks(self._task)
        if self._channel is not None:
            await self._channel.close()

    async def _run(self) -> None:
        attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))  # what sends spans makes none
        waiting = self._outbox.waiting
        while True:
            await self._gathered()
            batch = [waiting.popleft() for _ in range(min(len(waiting), self._outbox.batch))]
            self.in_hand = len(batch)
            try:
                for body, count in await self._encoded(batch):
                    await self._deliver(body, count)
            except Exception:  # a defect of ours, or a span's; others may go well
                log.exception("%d spans are lost", self.in_hand)
            finally:
                self._outbox.count(dropped=self.in_hand)
                self.in_hand = 0
                self._settled.set()

    async def _gathered(self) -> None:
        """Returns when there is a batch, or some spans have waited for long enough."""
        outbox = self._outbox
        while not outbox.waiting:
            self._settled.set()
            await self._woken_by(1, None)
        if not self._flushing:
            await self._woken_by(outbox.batch, outbox.delay)

    async def _woken_by(self, spans: int, timeout: float | None) -> None:
        """Returns when so many spans wait, when somebody flushes, or after so many seconds."""
        self._woken.clear()
        # In this order: whoever puts a span in the queue looks at it afterwards.
        self.wants = spans
        try:
            if len(self._outbox.waiting) < spans:
                async with asyncio.timeout(timeout):
                    await self._woken.wait()
        except TimeoutError:
            pass
        finally:
            self.wants = _NOTHING

    async def _encoded(self, batch: Sequence[ReadableSpan]) -> list[tuple[bytes, int]]:
        """Requests with the number of their spans. Two of them, one after the other, are one: so it goes in parts."""
        made: list[tuple[bytes, int]] = []
        for start in range(0, len(batch), AT_ONCE):
            part = batch[start : start + AT_ONCE]
            body = encode_request(part)
            if made and len(made[-1][0]) + len(body) <= MAX_REQUEST:
                made[-1] = (made[-1][0] + body, made[-1][1] + len(part))
            else:
                made.append((body, len(part)))
            await asyncio.sleep(0)
        return made

    async def _deliver(self, body: bytes, count: int) -> None:
        """Sends a request until it is answered, or is not worth it."""
        while True:
            await self._credentials()
            address = self._addresses[self._delivery.whom(self._loop.time())]
            try:
                answer = await (await self._method(address))(body, timeout=SEND_TIMEOUT)
            except grpc.aio.AioRpcError as error:
                step = self._delivery.failed(StatusCode(error.code().value[0]), self._loop.time())
                self._failed(address, error, kept=step.keep)
                if not step.keep:
                    self._settle(count, dropped=count)
                await asyncio.sleep(step.wait)
                if not step.keep:
                    return
            else:
                self._delivery.answered()
                self._answered(address, answer, count)
                return

    async def _credentials(self) -> None:
        """Returns when channels can be opened."""
        changed = asyncio.Event()
        unsubscribe = self._transport.on_change(changed.set)
        try:
            while self._transport.problem:
                self._settled.set()
                changed.clear()
                await changed.wait()
        finally:
            unsubscribe()

    async def _method(self, address: str) -> Any:
        """Grpc's multicallable on a channel with the credentials of now."""
        wanted = (address, self._transport.generation)
        if self._channel is None or self._channel_is != wanted:
            if self._channel is not None:
                await self._channel.close()
            self._channel, self._channel_is = self._transport.open_channel(address, CONTROL_PLANE), wanted
        return self._channel.unary_unary(METHOD, response_deserializer=ExportTraceServiceResponse.FromString)

    def _answered(self, address: str, answer: ExportTraceServiceResponse, count: int) -> None:
        said = answer.partial_success
        rejected = min(max(said.rejected_spans, 0), count)
        self._settle(count, sent=count - rejected, rejected=rejected)
        if not self._reachable:
            self._reachable = True
            log.info("spans are sent to %s again", address)
        if said.error_message:
            self._tell("control plane %s says of spans: %s", address, said.error_message)

    def _settle(self, count: int, **outcome: int) -> None:
        self.in_hand -= count
        self._outbox.count(**outcome)

    def _failed(self, address: str, error: grpc.aio.AioRpcError, *, kept: bool) -> None:
        details = error.details() or ""
        why = explain(details, "the control plane", secure=self._transport.secure) or f"{error.code().name}: {details}"
        if not kept:
            self._tell("control plane %s does not take spans, which are dropped: %s", address, why)
        elif self._reachable:
            log.warning("spans cannot be sent to %s, they wait or are dropped, and calls go on: %s", address, why)
        self._reachable = not kept
        self._settled.set()

    def _tell(self, message: str, *arguments: object) -> None:
        """Each message once a minute at most: what goes on for long must not fill the log."""
        now = self._loop.time()
        if now >= self._told.get(message, -math.inf) + _TELL_EVERY:
            self._told[message] = now
            log.warning(message, *arguments)
