"""What the four kinds of mesh calls share: they drive the call machine with events and obey its actions.

Everything is driven by callbacks; a call costs no task of its own beyond those of grpc.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, cast

import grpc
from grpc.aio import AioRpcError, Metadata

from mesh_client.at_once import at_once
from mesh_client.context import PREVIOUS_ATTEMPTS_KEY, inbound
from mesh_client.core import shortcut
from mesh_client.core.call import Action, Attempt, AttemptFailure, AwaitEndpoints, Call, Failed, Pause
from mesh_client.core.errors import MeshErrorDetail
from mesh_client.core.model import StatusCode
from mesh_client.core.retry import parse_pushback
from mesh_client.errors import MeshRpcError
from mesh_client.multicallable import MultiCallable, Request, Response

if TYPE_CHECKING:
    from mesh_client.tracing import CallTrace

GrpcCall = Any
"""The grpc.aio call of one attempt. Its classes are private to grpc; what is used here is the public interface."""

LOCALLY_CANCELLED = "Locally cancelled by application!"
_DROPS = ("CANCELLED", "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))")
"""What grpc says, with CANCELLED, of a call that a server ends before a handler has seen it, as grpc servers do that
begin to stop or have more calls waiting than they take: by trailers from the C core, by a reset from others."""
_DROPPED = "the server dropped the call: it is stopping, or has too many calls waiting"
_OK = grpc.StatusCode.OK
_UNANSWERED = ("Deadline Exceeded", _DROPPED)
"""Details of a call that ended without an answer while its connection stayed. Otherwise the server has answered when
the connection is still there: grpc does not say who made a status."""
_READY = grpc.ChannelConnectivity.READY


class MeshCall(Generic[Request, Response]):
    """One call through the mesh, from the first pick to the last attempt's end.

    Args:
        method: the multicallable that makes it.
        payload: what is sent: the serialised request, or a `RequestLog`.
        timeout: seconds, or None; an inbound call's deadline and the policy's timeout apply as well.
        metadata: what the application sends.
        credentials: per-call credentials.
        wait_for_ready: wait for an endpoint that can be reached instead of failing.
        compression: of the request.
    """

    # Most calls never set these.
    _call: GrpcCall = None
    _first: shortcut.FirstAttempt | None = None
    """The first attempt of a call that was begun without a machine."""
    _machine: Call | None = None
    _connection: Any = None
    _trace: CallTrace | None = None
    _code: grpc.StatusCode | None = None
    _error: BaseException | None = None
    _streams_requests = False
    _attended = False
    """Whether whoever awaits the running attempt sees its end at once, who need not ask grpc for the status."""
    _waiting = False
    """Whether a timer or the target will resume the call."""
    _timer: asyncio.TimerHandle | None = None
    _change: asyncio.Future[None] | None = None
    _done_callbacks: list[Callable[[Any], None]] | None = None

    def __init__(
        self,
        method: MultiCallable[Request, Response],
        payload: Any,
        timeout: float | None,
        metadata: Any,
        credentials: grpc.CallCredentials | None,
        wait_for_ready: bool | None,
        compression: grpc.Compression | None,
    ) -> None:
        target = method.target
        service = target.service
        clock = self._clock = target.clock
        now = clock()
        deadline = None if timeout is None else now + timeout
        self._method = method
        self._payload = payload
        self._credentials = credentials
        self._compression = compression
        scope = self._scope = inbound.get()
        if scope is not None:
            if scope.deadline is not None:
                inherited = now + scope.deadline - target.loop.time()
                if deadline is None or inherited < deadline:
                    deadline = inherited
            scope.scope.add(self)
        metadata = self._metadata = (*metadata, *target.metadata) if metadata else target.metadata
        if target.tracing is not None:
            self._trace = target.tracing.call(service.name, method.name)
        self._deadline = deadline
        self._wait_for_ready = wait_for_ready
        first = self._first = shortcut.begin(service, method.name, deadline, now)
        if first is None:
            key = None if service.hash_source is None else target.hash_key(metadata)
            self._machine = Call(service, method.name, deadline, wait_for_ready is True, key, metadata)
            if self._trace is not None:
                self._machine.trace_id = self._trace.trace_id
        try:
            if first is None:
                self._obey(self._decider().begin(now))
            else:
                self._start(first)
        except BaseException:
            self._decider().cancelled(now)
            self._release()
            raise

    # -- driving the machine

    def _decider(self) -> Call:
        """The machine, made when it is first needed."""
        machine = self._machine
        if machine is None:
            method, first = self._method, cast("shortcut.FirstAttempt", self._first)
            machine = self._machine = shortcut.machine(
                method.target.service, first, method.name, self._deadline, self._wait_for_ready is True, self._metadata
            )
            if self._trace is not None:
                machine.trace_id = self._trace.trace_id
        return machine

    def endpoints_changed(self) -> None:
        """Something about the service changed while the call waited for it."""
        self._resume()

    def attempt_done(self, call: GrpcCall) -> None:
        """Grpc has the status of an attempt."""
        if self._attended or call is not self._call or self._code is not None:
            return
        code = at_once(call.code())
        if code is _OK:
            self._succeeded()
            return
        details = at_once(call.details())
        if code is grpc.StatusCode.CANCELLED and details == LOCALLY_CANCELLED:
            # Not by `cancel`, which sets the code first: the request iterator raised, or the channel was closed.
            self._decider().cancelled(self._clock())
            self._finish(grpc.StatusCode.CANCELLED, asyncio.CancelledError())
            return
        if code is grpc.StatusCode.CANCELLED and details in _DROPS:
            code, details = grpc.StatusCode.UNAVAILABLE, _DROPPED
        self._attempt_failed(call, code, details)

    def _succeeded(self) -> None:
        """The running attempt ended with OK, and the call with it."""
        if self._machine is None:
            first = cast("shortcut.FirstAttempt", self._first)
            method = self._method
            shortcut.succeeded(method.target.service, first, method.name, self._clock())
        else:
            self._machine.succeeded(self._clock())
        self._finish(_OK, None)

    def _attempt_failed(self, call: GrpcCall, code: grpc.StatusCode, details: str | None) -> None:
        debug = at_once(call.debug_error_string()) or ""
        initial: Metadata = at_once(call.initial_metadata())
        trailing: Metadata = at_once(call.trailing_metadata())
        pushback = trailing.get("grpc-retry-pushback-ms")
        received = details not in _UNANSWERED and (len(initial) > 0 or self._connection.channel.get_state() is _READY)
        failure = AttemptFailure(
            StatusCode(code.value[0]),
            details or "",
            committed=self._committed() or len(initial) > 0,
            received=received,
            pushback=None if pushback is None else parse_pushback(str(pushback)),
        )
        if self._trace is None:
            action = self._decider().failed(failure, self._clock())
        else:
            self._trace.attempt_ended(code, details)
            action = self._decide_traced(failure, self._trace)
        if not isinstance(action, Failed):
            self._call = None
            self._obey(action)
            return
        if code is grpc.StatusCode.UNAVAILABLE and not received:
            details = f"{details}; mesh: {action.detail}"
        self._finish(code, MeshRpcError(code, initial, trailing, details, debug, action.detail))

    def _decide_traced(self, failure: AttemptFailure, trace: CallTrace) -> Action:
        """What to do after a failure; what it leads to besides becomes events of the call's span."""
        service = self._method.target.service
        breaker, generation, ejected = service.breaker, service.breaker.generation, service.outliers.ejected
        now = self._clock()
        action = self._decider().failed(failure, now)
        for endpoint in service.outliers.ejected - ejected:
            trace.event("mesh.endpoint.ejected", endpoint=endpoint)
        if service.breaker is breaker and breaker.generation != generation:
            trace.event("mesh.breaker", state=breaker.state(now).value)
        if isinstance(action, Pause):
            trace.event("mesh.retry", delay=action.delay)
        return action

    def _obey(self, action: Action) -> None:
        if isinstance(action, Attempt):
            self._start(action)
        elif isinstance(action, Pause):
            self._waiting = True
            self._timer = self._method.target.loop.call_later(action.delay, self._resume)
        elif isinstance(action, AwaitEndpoints):
            self._waiting = True
            target = self._method.target
            target.waiters.add(self)
            if action.deadline is not None:
                self._timer = target.loop.call_later(max(action.deadline - self._clock(), 0.0), self._resume)
        else:
            error = MeshRpcError.decided(action.code, action.detail)
            self._finish(error.code(), error)

    def _resume(self) -> None:
        self._stop_waiting()
        if self._code is not None:
            return
        try:
            self._obey(self._decider().resumed(self._clock()))
        except Exception as error:
            # What grpc refuses to send (such as bad metadata) it refuses at the first attempt, inside `begin`;
            # a later attempt can only meet a channel closed under it.
            self._decider().cancelled(self._clock())
            self._finish(grpc.StatusCode.INTERNAL, error)

    def _start(self, attempt: Attempt) -> None:
        method = self._method
        node = attempt.node
        connection: Any = node.connection
        if connection is None:
            connection = method.target.connect(node)
        self._connection = connection
        multicallable = connection.multicallables.get(method.key)
        if multicallable is None:
            multicallable = connection.multicallable(method)
        deadline = attempt.deadline
        metadata = self._metadata
        if attempt.number > 1:
            metadata = (*metadata, (PREVIOUS_ATTEMPTS_KEY, str(attempt.number - 1)))
        if self._trace is not None:
            metadata = (*metadata, *self._trace.attempt(node, attempt.number))
        call = self._call = multicallable(
            self._payload.read(keep=self._decider().may_retry) if self._streams_requests else self._payload,
            timeout=None if deadline is None else deadline - attempt.started_at,
            metadata=metadata,
            credentials=self._credentials,
            compression=self._compression,
        )
        call.add_done_callback(self.attempt_done)
        if self._change is not None:
            self._wake(self._change)

    def _committed(self) -> bool:
        """Whether a response byte of the running attempt has reached the application."""
        return False

    def _finish(self, code: grpc.StatusCode, error: BaseException | None) -> None:
        self._code = code
        if error is not None:
            self._error = error
        if self._trace is not None:
            self._trace.ended(code, *_explained(error))
        if self._waiting or self._scope is not None:
            self._release()
        if self._change is not None:
            self._wake(self._change)
        if self._done_callbacks is not None:
            callbacks, self._done_callbacks = self._done_callbacks, None
            for callback in callbacks:
                callback(self)

    def _release(self) -> None:
        if self._waiting:
            self._stop_waiting()
        scope, self._scope = self._scope, None
        if scope is not None:
            scope.scope.discard(self)

    def _stop_waiting(self) -> None:
        self._waiting = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._method.target.waiters.discard(self)

    # -- waiting for it

    def _wake(self, change: asyncio.Future[None]) -> None:
        self._change = None
        change.set_result(None)

    async def _next_change(self) -> None:
        """Returns when the next attempt has started or the call is over."""
        if self._change is None:
            self._change = self._method.target.loop.create_future()
        await asyncio.shield(self._change)

    async def _attempt_after(self, call: GrpcCall) -> GrpcCall:
        """The running or final attempt that is not ``call``.

        Raises:
            MeshRpcError, asyncio.CancelledError: the call is over and has no such attempt.
        """
        while self._call is call or self._call is None:
            if self._code is not None:
                raise self._error or asyncio.InvalidStateError("the call is over")
            await self._next_change()
        return self._call

    async def _ended_well(self, call: GrpcCall) -> bool:
        """Whether the call is a success, though grpc says that an attempt failed: see `StreamingRequests`."""
        self.attempt_done(call)
        while self._call is call and self._code is None:
            await self._next_change()
        return self._code is _OK

    async def _until_over(self) -> grpc.StatusCode:
        while (code := self._code) is None:
            await self._next_change()
        return code

    # -- grpc.aio.Call

    def cancelled(self) -> bool:
        """Whether the call ended by being cancelled."""
        return self._code is grpc.StatusCode.CANCELLED and isinstance(self._error, asyncio.CancelledError)

    def done(self) -> bool:
        """Whether the call is over, all its attempts included."""
        return self._code is not None

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, or None without one."""
        deadline = self._decider().deadline
        return None if deadline is None else max(deadline - self._clock(), 0.0)

    def cancel(self) -> bool:
        """Cancels the call; False when it is over already."""
        if self._code is not None:
            return False
        self._decider().cancelled(self._clock())
        call = self._call
        self._finish(grpc.StatusCode.CANCELLED, asyncio.CancelledError())
        if call is not None:
            call.cancel()
        return True

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Calls ``callback(call)`` when the call is over; at once when it is."""
        if self._code is not None:
            callback(self)
        elif self._done_callbacks is None:
            self._done_callbacks = [callback]
        else:
            self._done_callbacks.append(callback)

    async def initial_metadata(self) -> Metadata:
        """The server's initial metadata: of the first attempt that answered, or of the last one."""
        while True:
            while self._call is None and self._code is None:
                await self._next_change()
            call = self._call
            if call is None:
                return self._error.initial_metadata() if isinstance(self._error, AioRpcError) else Metadata()
            metadata: Metadata = await call.initial_metadata()
            if call is self._call:
                return metadata

    async def trailing_metadata(self) -> Metadata:
        """The trailing metadata of the call's end."""
        await self._until_over()
        if isinstance(self._error, AioRpcError):
            return self._error.trailing_metadata()
        if self._call is None or self.cancelled():
            return Metadata()
        metadata: Metadata = await self._call.trailing_metadata()
        return metadata

    async def code(self) -> grpc.StatusCode:
        """The call's status, when it is over."""
        return await self._until_over()

    async def details(self) -> str:
        """The call's message, when it is over."""
        await self._until_over()
        if isinstance(self._error, AioRpcError):
            return self._error.details() or ""
        if self.cancelled():
            return LOCALLY_CANCELLED
        details: str = await self._call.details()
        return details

    async def debug_error_string(self) -> str:
        """Grpc's own account of the failure."""
        await self._until_over()
        if isinstance(self._error, AioRpcError):
            return self._error.debug_error_string() or ""
        return ""

    async def wait_for_connection(self) -> None:
        """Returns when an attempt is connected.

        Raises:
            MeshRpcError: the call failed.
        """
        call = None
        while True:
            call = await self._attempt_after(call)
            try:
                await call.wait_for_connection()
            except AioRpcError:
                if await self._ended_well(call):
                    return
                if self._error is not None:
                    raise self._error from None
            else:
                return

    def __repr__(self) -> str:
        state = "in flight" if self._code is None else self._code.name
        return f"<{type(self).__name__} {self._method.target.service.name}{self._method.name} {state}>"


def _explained(error: BaseException | None) -> tuple[str | None, MeshErrorDetail | None]:
    if not isinstance(error, AioRpcError):
        return None if error is None else str(error), None
    return error.details(), error.mesh if isinstance(error, MeshRpcError) else None
