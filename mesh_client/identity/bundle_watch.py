"""Follows the trust bundle: keeps a stream open to some control plane, and acknowledges what is in force."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from random import Random

import grpc
import grpc.aio
from mesh.v1 import certificate_pb2, certificate_pb2_grpc

from mesh_client.core.errors import IdentityError
from mesh_client.core.policy import Backoff
from mesh_client.core.retry import backoff_delay
from mesh_client.identity.certificates import TrustBundle
from mesh_client.identity.enrolment import explained
from mesh_client.stream_end import StreamEnd
from mesh_client.tasks import end_tasks
from mesh_client.transport import CONTROL_PLANE, STREAM_OPTIONS, Transport

log = logging.getLogger(__name__)

FIRST_RESPONSE_TIMEOUT = 5.0
"""Seconds that a control plane has to answer on a new stream before the next one is tried."""
RECONNECT = Backoff(initial=0.2, max=10.0, multiplier=2.0)

_Call = grpc.aio.StreamStreamCall[certificate_pb2.WatchTrustBundleRequest, certificate_pb2.WatchTrustBundleResponse]


class BundleWatch:
    """Follows the trust bundle until it is cancelled.

    Args:
        addresses: control planes, tried in turn from a random one.
        transport: opens its channels; there must be an identity before `run`.
        request: makes the request that states what is in force now.
        apply: puts a bundle in force. It is acknowledged once ``request`` states it: now, or at `restate`.
        on_state: told when the control plane has answered (with an empty text), or could not be followed, and why.
        rng: draws the waits and the first address.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        transport: Transport,
        request: Callable[[], certificate_pb2.WatchTrustBundleRequest],
        apply: Callable[[TrustBundle], Awaitable[None]],
        on_state: Callable[[str], None],
        rng: Random,
    ) -> None:
        self._addresses = tuple(addresses)
        self._transport = transport
        self._request = request
        self._apply = apply
        self._on_state = on_state
        self._rng = rng
        self._reopen = asyncio.Event()
        self._restate = asyncio.Event()

    def restate(self) -> None:
        """Something else is in force now: the control plane is told."""
        self._restate.set()

    def reopen(self) -> None:
        """Opens the stream anew, so that the control plane sees the new certificate."""
        self._reopen.set()

    async def run(self) -> None:
        """Follows, reconnects; for ever."""
        index = self._rng.randrange(len(self._addresses))
        failures = 0
        while True:
            self._reopen.clear()
            answered = await self._follow(self._addresses[index % len(self._addresses)])
            if self._reopen.is_set():
                continue
            failures = 0 if answered else failures + 1
            index += 1
            # Another address may be fine: wait only after each has had its turn.
            if failures % len(self._addresses) == 0:
                await asyncio.sleep(backoff_delay(RECONNECT, min(failures // len(self._addresses) + 1, 32), self._rng))

    async def _follow(self, address: str) -> bool:
        """Follows one stream to its end; whether it brought a response."""
        answered = False
        try:
            async with self._transport.open_channel(address, CONTROL_PLANE, STREAM_OPTIONS) as channel:
                call = certificate_pb2_grpc.CertificateServiceStub(channel).WatchTrustBundle()
                end = StreamEnd(call)
                try:
                    await self._state(call)
                    timeout: float | None = FIRST_RESPONSE_TIMEOUT
                    while (response := await self._next(call, timeout)) is not None:
                        timeout = None
                        await self._apply(TrustBundle.from_proto(response.trust_bundle))
                        answered = True
                        self._on_state("")
                        if self._request().version == response.trust_bundle.version:
                            await self._state(call)
                except grpc.aio.AioRpcError as error:
                    raise await end.instead_of(error) from None
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            self._lost(str(explained(address, error)), answered)
        except TimeoutError:
            self._lost(f"{address}: no trust bundle within {FIRST_RESPONSE_TIMEOUT:g} s", answered)
        except IdentityError as error:
            self._lost(f"{address}: {error}", answered)
        except Exception as error:
            # A defect of ours. To stop following would be worse than to try again.
            log.exception("following the trust bundle of %s failed", address)
            self._lost(f"{address}: {type(error).__name__}", answered)
        return answered

    async def _state(self, call: _Call) -> None:
        self._restate.clear()
        # What a broken stream raises here, reading it raises as well.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(self._request())

    async def _next(self, call: _Call, timeout: float | None) -> certificate_pb2.WatchTrustBundleResponse | None:
        """The next response; None when the stream has ended or is to be opened anew."""
        read = asyncio.ensure_future(call.read())
        reopen = asyncio.ensure_future(self._reopen.wait())
        try:
            while not read.done():
                restate = asyncio.ensure_future(self._restate.wait())
                try:
                    await asyncio.wait({read, reopen, restate}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    restate.cancel()
                if reopen.done():
                    return None
                if not read.done() and not self._restate.is_set():
                    raise TimeoutError
                if self._restate.is_set():
                    await self._state(call)
            response = read.result()
            return response if isinstance(response, certificate_pb2.WatchTrustBundleResponse) else None  # else: EOF
        finally:
            await end_tasks(read, reopen)

    def _lost(self, why: str, answered: bool) -> None:
        # A stream that has answered ends by the age of its connection too. Whether that is trouble, the next one tells.
        if answered:
            log.info("trust bundle: %s; reconnecting", why)
        else:
            self._on_state(why)
