"""Requests of a streaming call: sent to the running attempt, and kept for the next one until the call is committed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Generic

import grpc
import grpc.aio
from grpc.aio import Metadata, UsageError

from mesh_client.at_once import at_once
from mesh_client.calls.base import GrpcCall, MeshCall
from mesh_client.multicallable import Request, Response

REPLAY_BYTES = 256 * 1024
"""Serialised requests kept for a retry. A call that has sent more is not retried any more (gRFC A6, per-RPC buffer)."""

MIXED_STYLES = "The iterator and read/write APIs may not be mixed on a single RPC."
WRITE_FAILED = "Internal error from Core"
"""What grpc says, with INTERNAL, of a call whose end a write has crossed, until it has read what the server said."""
_FIRST_LOOK, _LAST_LOOK = 0.001, 5.0
"""Seconds after which it is asked again: at first, and at most before that is given up; each time twice as many."""

_FINISHED = "RPC already finished."
_HALF_CLOSED = 'RPC is half closed after calling "done_writing".'

_END = object()

RequestSource = AsyncIterable[Request] | Iterable[Request] | None


class RequestLog(Generic[Request]):
    """The serialised requests of one call, in order, from an iterator or from `append`.

    Each attempt reads them from the beginning by `read`. After `commit`, and past `REPLAY_BYTES`, what was sent is
    dropped and `replayable` is False.
    """

    def __init__(self, source: RequestSource[Request], serializer: Callable[[Request], bytes] | None) -> None:
        self.written_by_calls = source is None
        self._source: AsyncIterator[Request] | Iterator[Request] | None = None
        if isinstance(source, AsyncIterable):
            self._source = aiter(source)
        elif source is not None:
            self._source = iter(source)
        self._serializer = serializer
        self._messages: deque[Any] = deque()
        self._first = 0
        """Number of the oldest message kept."""
        self.sent = 0
        """Messages that some attempt has handed to grpc."""
        self._kept_bytes = 0
        self._keep = True
        self._ended = False
        self._pulling = False
        self._change: asyncio.Future[None] | None = None

    @property
    def replayable(self) -> bool:
        """Whether a new attempt could send everything again."""
        return self._first == 0

    @property
    def ended(self) -> bool:
        """Whether no further request will come."""
        return self._ended

    def serialise(self, request: Request) -> Any:
        """The request as it is sent."""
        return request if self._serializer is None else self._serializer(request)

    def append(self, message: Any) -> int:
        """Adds a serialised request; its number, from 1."""
        self._messages.append(message)
        self._kept_bytes += len(message) if isinstance(message, bytes) else 0
        if self._kept_bytes > REPLAY_BYTES:
            self.commit()
        self.notify()
        return self._first + len(self._messages)

    def end(self) -> None:
        """No further request will come."""
        self._ended = True
        self.notify()

    def close(self) -> None:
        """The call is over: whoever reads or waits stops."""
        self._messages.clear()
        self.end()

    def commit(self) -> None:
        """The call will not be retried: what was sent need not be kept."""
        self._keep = False
        while self._first < self.sent and self._messages:
            self._messages.popleft()
            self._first += 1

    def notify(self) -> None:
        """Wakes whoever waits for a change."""
        change, self._change = self._change, None
        if change is not None and not change.done():
            change.set_result(None)

    async def changed(self) -> None:
        """Returns at the next change."""
        if self._change is None:
            self._change = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._change)

    async def read(self, *, keep: bool) -> AsyncIterator[Any]:
        """All requests from the first, for one attempt; unless they are to be kept, for the last one."""
        if not keep:
            self.commit()
        number = self._first
        while True:
            while number >= self._first + len(self._messages):
                if self._ended:
                    return
                if self._source is None or self._pulling:
                    await self.changed()
                else:
                    await self._pull()
            yield self._messages[number - self._first]
            number += 1
            if number > self.sent:
                self.sent = number
                if not self._keep:
                    self.commit()
                self.notify()

    async def _pull(self) -> None:
        # An attempt that has died while it pulls still delivers: its successor waits for the message here.
        source = self._source
        self._pulling = True
        try:
            request: Any
            if isinstance(source, AsyncIterator):
                request = await anext(source, _END)
            else:
                request = _END if source is None else next(source, _END)
            if request is _END:
                self.end()
            else:
                self.append(self.serialise(request))
        finally:
            self._pulling = False
            self.notify()


class StreamingRequests(MeshCall[Request, Response]):
    """The request side of calls that stream requests."""

    _payload: RequestLog[Request]
    _streams_requests = True
    _look: asyncio.TimerHandle | None = None
    """When grpc is asked again how the attempt ended; nobody takes requests then."""
    _wait = _FIRST_LOOK
    _said = (Metadata(), "")
    """Trailing metadata and message of the last attempt."""

    @property
    def _done_writing_flag(self) -> bool:
        # Read by grpc's own interceptor machinery.
        return self._payload.ended

    def attempt_done(self, call: GrpcCall) -> None:
        """Grpc has the status of an attempt.

        It ends a call as INTERNAL when it cannot write a request, though the server has ended the call, perhaps well.
        What the server said it knows a moment later, and tells nobody: it has to be asked. Or it knew that before, has
        said so, and forgets it.
        """
        if call is self._call and self._code is None:
            if at_once(call.details()) == WRITE_FAILED and self._wait < _LAST_LOOK:
                if self._look is None:
                    self._look = self._method.target.loop.call_later(self._wait, self._look_again, call)
                    self._wait *= 2.0
                    self._payload.notify()
                return
            self._stop_looking()
            self._wait = _FIRST_LOOK
            self._said = at_once(call.trailing_metadata()), at_once(call.details())
        super().attempt_done(call)

    async def trailing_metadata(self) -> Metadata:
        """The trailing metadata of the call's end."""
        return self._said[0] if await self._until_over() is grpc.StatusCode.OK else await super().trailing_metadata()

    async def details(self) -> str:
        """The call's message, when it is over."""
        return self._said[1] if await self._until_over() is grpc.StatusCode.OK else await super().details()

    def _look_again(self, call: GrpcCall) -> None:
        self._look = None
        self.attempt_done(call)

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _committed(self) -> bool:
        return super()._committed() or not self._payload.replayable

    def _finish(self, code: grpc.StatusCode, error: BaseException | None) -> None:
        super()._finish(code, error)
        self._stop_looking()
        self._payload.close()

    async def write(self, request: Request) -> None:
        """Sends one request; returns when grpc has taken it.

        Raises:
            UsageError: the call was given an iterator.
            asyncio.InvalidStateError: the call is over or half-closed.
            MeshRpcError: the call failed meanwhile.
        """
        self._check_style()
        if self.done():
            raise asyncio.InvalidStateError(_FINISHED)
        if self._payload.ended:
            raise asyncio.InvalidStateError(_HALF_CLOSED)
        number = self._payload.append(self._payload.serialise(request))
        try:
            while self._look is None and not self.done() and self._payload.sent < number:
                await self._payload.changed()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._error is not None and self._payload.sent < number:
            raise self._error

    async def done_writing(self) -> None:
        """Half-closes the call. Idempotent.

        Raises:
            UsageError: the call was given an iterator.
        """
        self._check_style()
        if self._code is None:
            self._payload.end()

    def _check_style(self) -> None:
        if not self._payload.written_by_calls:
            raise UsageError(MIXED_STYLES)
