"""The client's discovery stream: keeps one open to some control plane, feeds the store, sends its answers.

What to ask and what to answer is decided by `mesh_client.core.store`; this shell moves bytes and reconnects.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from random import Random

import grpc
from grpc.aio import AioRpcError
from mesh.v1 import discovery_pb2, discovery_pb2_grpc

from mesh_client.convert import acknowledge_to_proto, subscribe_to_proto, update_from_proto
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.handshake import explain
from mesh_client.core.model import ResourceKind
from mesh_client.core.policy import Backoff
from mesh_client.core.retry import backoff_delay
from mesh_client.core.store import Acknowledge, Store, Subscribe
from mesh_client.stream_end import StreamEnd
from mesh_client.tasks import end_tasks, obey_cancellation
from mesh_client.transport import CONTROL_PLANE, STREAM_OPTIONS, Transport

Stream = grpc.aio.StreamStreamCall[discovery_pb2.DeltaResourcesRequest, discovery_pb2.DeltaResourcesResponse]
Applied = Callable[[frozenset[str]], Awaitable[None]]
"""Returns when the endpoints that are held of these services are in force, and no others."""

log = logging.getLogger(__name__)

RECONNECT = Backoff(initial=0.2, max=10.0, multiplier=2.0)
AGED = "max connection age"
"""How grpc says that a server has ended a connection for its age."""
FIRST_RESPONSE_TIMEOUT = 5.0
"""Seconds that a control plane has to answer on a new stream before the next one is tried."""


class Discovery:
    """Keeps a discovery stream open until it is cancelled.

    Args:
        addresses: control planes, tried in turn from a random one.
        node: how this client names itself.
        store: decides.
        rng: draws the waits and the first address.
        clock: seconds, monotonic.
        on_change: told which services changed, before they are acknowledged.
        on_state: told when the stream has opened, synced or broken.
        transport: opens its channels.
        applied: awaited before endpoints are acknowledged, for a store that holds what is applied elsewhere. It may
            take as long as it does: meanwhile the control plane joins further changes into one, and drains wait, until
            their deadline, for this client. Cancelled when the stream ends.
        beside: what else there is to do on the channel of a stream that is answered; cancelled when that ends. Must not
            raise.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        node: discovery_pb2.Node,
        store: Store,
        rng: Random,
        clock: Callable[[], float],
        on_change: Callable[[Iterable[str]], None],
        on_state: Callable[[], None],
        *,
        transport: Transport,
        applied: Applied | None = None,
        beside: Sequence[Callable[[grpc.aio.Channel], Coroutine[object, object, None]]] = (),
    ) -> None:
        self._beside = tuple(beside)
        self._addresses = tuple(addresses)
        self._node = node
        self._store = store
        self._rng = rng
        self._clock = clock
        self._on_change = on_change
        self._on_state = on_state
        self._transport = transport
        self._applied = applied
        self._applying: asyncio.Task[None] | None = None
        self._requests: asyncio.Queue[discovery_pb2.DeltaResourcesRequest] | None = None
        self._confirmed_at: float | None = None
        self.failures = 0
        """Streams in a row that ended before their first response."""
        self.detail = "not tried yet"
        """State of the stream, in words."""

    @property
    def rounds(self) -> int:
        """How often every address has failed since the last response."""
        return self.failures // len(self._addresses)

    def age(self, now: float) -> float | None:
        """Seconds since a control plane last confirmed what the store holds: 0 while in sync, None if it never did."""
        if self._store.in_sync:
            return 0.0
        return None if self._confirmed_at is None else now - self._confirmed_at

    def send(self, requests: Iterable[Subscribe]) -> None:
        """Sends changes of subscriptions on the open stream."""
        if self._requests is not None:
            for request in requests:
                self._requests.put_nowait(subscribe_to_proto(request))

    async def run(self) -> None:
        """Connects, follows the stream, reconnects; for ever."""
        index = self._rng.randrange(len(self._addresses))
        while True:
            await self._credentials()
            address = self._addresses[index % len(self._addresses)]
            answered = await self._follow(address)
            obey_cancellation()
            self.failures = 0 if answered else self.failures + 1
            self._on_state()
            index += 1
            # Another address may be fine: wait only after each has had its turn.
            if answered or self.failures % len(self._addresses) == 0:
                await asyncio.sleep(backoff_delay(RECONNECT, min(self.rounds + 1, 32), self._rng))

    async def _credentials(self) -> None:
        """Returns when channels can be opened."""
        changed = asyncio.Event()
        unsubscribe = self._transport.on_change(changed.set)
        try:
            while self._transport.problem:
                self.detail = "not tried, for want of a certificate"
                self._on_state()
                changed.clear()
                await changed.wait()
        finally:
            unsubscribe()

    async def _follow(self, address: str) -> bool:
        """Follows one stream to its end; whether it brought a response."""
        answered = False
        beside: list[asyncio.Task[None]] = []
        channel = self._transport.open_channel(address, CONTROL_PLANE, STREAM_OPTIONS)
        try:
            async for update in self._updates(channel):
                if not answered:
                    answered = True
                    beside = [asyncio.create_task(each(channel)) for each in self._beside]
                    self.failures = 0
                    self.detail = f"{address} connected"
                    log.info("discovery stream to %s is open", address)
                acknowledge, changed = self._store.apply(update_from_proto(update))
                for service, reason in acknowledge.rejected.items():
                    log.warning("rejected what %s sent for %s: %s", address, service, reason)
                self._on_change(changed)
                if self._applied is not None and acknowledge.kind is ResourceKind.ENDPOINTS and changed:
                    # There is one at a time: no further endpoints come before these are acknowledged.
                    self._applying = asyncio.create_task(self._apply(self._applied, acknowledge, changed))
                else:
                    self._answer(acknowledge)
                self._on_state()
            self._lost(address, "it ended the stream", answered)
        except AioRpcError as error:
            details = error.details() or ""
            why = explain(details, "the control plane", secure=self._transport.secure)
            self._lost(address, why or f"{error.code().name}: {details}", answered)
        except TimeoutError:
            self._lost(address, f"no response within {FIRST_RESPONSE_TIMEOUT:.0f} s", answered)
        except InvalidValueError as error:
            self._lost(address, f"it speaks another protocol: {error}", answered)
        except Exception as error:
            # A defect of ours. Calls go on with what is held; to stop following would be worse than to try again.
            log.exception("following %s failed", address)
            self._lost(address, f"{type(error).__name__}: {error}", answered)
        finally:
            self._close_stream()
            await end_tasks(*beside)
            await channel.close()
        return answered

    async def _apply(self, applied: Applied, acknowledge: Acknowledge, changed: frozenset[str]) -> None:
        try:
            await applied(changed)
        except Exception:
            # A defect of whoever applies. Without an answer the control plane goes on to count the old endpoints.
            log.exception("applying the endpoints of %s failed; they are not acknowledged", ", ".join(sorted(changed)))
            return
        self._store.applied(changed)
        self._answer(acknowledge)

    def _answer(self, acknowledge: Acknowledge) -> None:
        if self._requests is not None:
            self._requests.put_nowait(acknowledge_to_proto(acknowledge))

    async def _updates(self, channel: grpc.aio.Channel) -> AsyncIterator[discovery_pb2.DeltaResourcesResponse]:
        stub = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        requests = self._requests = asyncio.Queue()
        first, *others = self._store.opened()
        requests.put_nowait(subscribe_to_proto(first, self._node))
        for request in others:
            requests.put_nowait(subscribe_to_proto(request))

        # Not by an iterator: grpc does not end the task that reads it when the stream fails.
        call = stub.DeltaResources()
        end = StreamEnd(call)
        sender = asyncio.create_task(self._send_all(call, requests))
        try:
            responses = aiter(call)
            async with asyncio.timeout(FIRST_RESPONSE_TIMEOUT):
                response = await anext(responses, None)
            while response is not None:
                yield response
                response = await anext(responses, None)
        except AioRpcError as error:
            raise await end.instead_of(error) from None
        finally:
            await end_tasks(sender)
            call.cancel()

    @staticmethod
    async def _send_all(call: Stream, requests: asyncio.Queue[discovery_pb2.DeltaResourcesRequest]) -> None:
        # What a broken stream raises here, reading it raises as well.
        with contextlib.suppress(AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await requests.get())

    def _close_stream(self) -> None:
        if self._applying is not None:
            self._applying.cancel()
            self._applying = None
        if self._store.in_sync:
            self._confirmed_at = self._clock()
        if self._requests is not None:
            self._requests = None
            self._store.closed()

    def _lost(self, address: str, why: str, answered: bool) -> None:
        self.detail = f"{address} unreachable: {why}"
        if answered and AGED in why:
            # Connections are made anew now and then, so that both sides look at the other's certificate again.
            self.detail = f"{address} reconnecting: {why}"
            log.info("discovery stream to %s has reached its age; reconnecting", address)
        elif answered:
            log.warning("discovery stream to %s is lost, calls go on with what is held: %s", address, why)
        else:
            log.warning("control plane %s cannot be reached: %s", address, why)
