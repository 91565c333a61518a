"""One call: the decisions between what the application asked for and what it gets.

The shell drives a `Call` with events and obeys the action that each returns::

    begin ──> Attempt ──succeeded──> Succeeded
      │          │ ^
      │        failed  resumed (after Pause, or when endpoints came)
      │          v │
      └──────> Pause / AwaitEndpoints / Failed

Order of decisions: deadline, route, fault, concurrency limit, service breaker, pick, attempt; then classification,
accounting to breaker, outlier detection, load and budget, and retry or the end. Retries follow gRFC A6.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from mesh_client.core.balancer import Node
from mesh_client.core.breaker import ServiceBreaker
from mesh_client.core.errors import HINTS, AttemptDetail, InvalidTransitionError, MeshErrorDetail, Reason
from mesh_client.core.handshake import explain
from mesh_client.core.model import Outcome, StatusCode
from mesh_client.core.policy import FaultAbort
from mesh_client.core.retry import Pushback, backoff_delay
from mesh_client.core.service import MethodSettings, Service
from mesh_client.core.store import Resolution
from mesh_client.core.tally import GIVEN_UP
from mesh_client.core.tap import TappedCall

DEADLINE_TOLERANCE = 0.010
"""Seconds before an attempt's deadline from which DEADLINE_EXCEEDED is taken for ours, not for the server's answer."""

_FAILURES = frozenset({StatusCode.UNAVAILABLE, StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.DATA_LOSS})


class Attempt:
    """Send the call to this node, with this deadline.

    Attributes:
        node: where to.
        number: from 1.
        deadline: absolute seconds, or None.
        started_at: seconds; the latency counts from here.
    """

    __slots__ = ("deadline", "node", "number", "started_at")

    def __init__(self, node: Node, number: int, started_at: float, deadline: float | None) -> None:
        self.node = node
        self.number = number
        self.started_at = started_at
        self.deadline = deadline


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this many seconds, then `Call.resumed`."""

    delay: float


@dataclass(frozen=True, slots=True)
class AwaitEndpoints:
    """Wait until something about the service changes or the deadline passes, then `Call.resumed`."""

    deadline: float | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The call is over.

    Attributes:
        code: status to give to the application.
        detail: the explanation.
        from_attempt: True when the last attempt's own error is what the application gets; False when the mesh decided.
    """

    code: StatusCode
    detail: MeshErrorDetail
    from_attempt: bool


Action = Attempt | Pause | AwaitEndpoints | Failed


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """How an attempt ended that did not end with OK.

    Attributes:
        code: its status.
        details: its message.
        committed: a response byte has arrived, so it must not be repeated.
        received: the status came from the server, as opposed to the transport.
        pushback: what the server says of retries.
    """

    code: StatusCode
    details: str = ""
    committed: bool = False
    received: bool = False
    pushback: Pushback | None = None


class _State(enum.Enum):
    NEW = enum.auto()
    WAITING = enum.auto()
    ATTEMPTING = enum.auto()
    OVER = enum.auto()


_NEW, _WAITING, _ATTEMPTING, _OVER = _State
_ACTIVE = Resolution.ACTIVE
_SUCCESS = Outcome.SUCCESS

_CONNECTION_AGED = "max connection age"
"""How gRPC says that a server closed a connection for its age, and that the grace for calls on it was over."""


class Call:
    """The machine of one call.

    An event that does not fit its state raises `InvalidTransitionError` and changes nothing.

    Args:
        service: the shared state of the service called.
        method: full method name with leading slash.
        deadline: absolute seconds, or None; the policy's timeout applies where it is None.
        wait_for_ready: wait for endpoints, and for one that can be reached, instead of failing.
        key: for RING_HASH.
        metadata: the call's metadata pairs, read only where a route matches on them.

    Attributes:
        trace_id: of the trace that is kept of the call, for explanations; set by the shell, else empty.
    """

    __slots__ = (
        "_admitted",
        "_attempt",
        "_attempts",
        "_begun_at",
        "_breaker",
        "_faulted",
        "_history",
        "_key",
        "_metadata",
        "_method",
        "_retries",
        "_service",
        "_settings",
        "_state",
        "_token",
        "_tried",
        "_wait_for_ready",
        "deadline",
        "trace_id",
    )
    _breaker: ServiceBreaker
    _token: int
    """With ``_breaker`` set when the call is admitted."""

    def __init__(
        self,
        service: Service,
        method: str,
        deadline: float | None = None,
        wait_for_ready: bool = False,
        key: str | None = None,
        metadata: Iterable[tuple[str, str | bytes]] = (),
    ) -> None:
        self.deadline = deadline
        self.trace_id = ""
        self._service = service
        self._method = method
        self._wait_for_ready = wait_for_ready
        self._key = key
        self._metadata = metadata
        self._state = _NEW
        self._settings: MethodSettings | None = None
        self._faulted = False
        self._admitted = False
        self._attempts = 0
        self._begun_at = 0.0
        self._retries = 0
        self._attempt: Attempt | None = None
        self._tried: tuple[Node, ...] = ()
        self._history: tuple[AttemptDetail, ...] = ()

    @property
    def over(self) -> bool:
        """Whether the call has ended."""
        return self._state is _OVER

    @property
    def may_retry(self) -> bool:
        """Whether a failed attempt may be repeated at all."""
        return self._wait_for_ready or self._settings is None or self._settings.retry.max_attempts > 1

    def take_over(self, attempt: Attempt, settings: MethodSettings, breaker: ServiceBreaker, token: int) -> None:
        """The call was begun without this machine: it was admitted by ``breaker``, and makes this attempt."""
        if self._state is not _NEW:
            raise InvalidTransitionError(f"take_over: the call is {self._state.name.lower()}")
        self._state = _ATTEMPTING
        self._settings = settings
        self._breaker, self._token = breaker, token
        self._admitted = True
        self._attempts = 1
        self._begun_at = attempt.started_at
        self._attempt = attempt
        self._tried = (attempt.node,)

    def begin(self, now: float) -> Action:
        """The application made the call."""
        if self._state is not _NEW:
            raise InvalidTransitionError(f"begin: the call is {self._state.name.lower()}")
        self._begun_at = now
        return self._proceed(now)

    def resumed(self, now: float) -> Action:
        """The pause is over, or something about the service changed."""
        if self._state is not _WAITING:
            raise InvalidTransitionError(f"resumed: the call is {self._state.name.lower()}")
        return self._proceed(now)

    def succeeded(self, now: float) -> None:
        """The attempt ended with OK."""
        attempt, service = self._attempt, self._service
        if attempt is None or self._state is not _ATTEMPTING:
            raise InvalidTransitionError(f"succeeded: the call is {self._state.name.lower()}")
        self._state = _OVER
        node = attempt.node
        node.load.finish(attempt.started_at, now, _SUCCESS)
        service.tally(node, self._method).succeeded(now - attempt.started_at)
        self._note_end(StatusCode.OK, now)
        service.record(node, _SUCCESS, now)
        service.settle(self._breaker, self._token, _SUCCESS, self._tried, now)
        service.gate.leave()

    def failed(self, failure: AttemptFailure, now: float) -> Action:
        """The attempt ended with another status."""
        attempt = self._attempt
        if attempt is None or self._state is not _ATTEMPTING:
            raise InvalidTransitionError(f"failed: the call is {self._state.name.lower()}")
        node, service = attempt.node, self._service
        expired = failure.code is StatusCode.DEADLINE_EXCEEDED and _is_due(attempt.deadline, now)
        per_try = expired and not _is_due(self.deadline, now)
        outcome = _classify(failure, expired, per_try)
        self._history += (
            AttemptDetail(
                node.endpoint.id, node.endpoint.target, failure.code.name, failure.details, now - attempt.started_at
            ),
        )
        node.load.finish(attempt.started_at, now, outcome)
        service.tally(node, self._method).failed(failure.code.name, now - attempt.started_at)
        service.record(node, outcome, now)
        if failure.code is StatusCode.UNAVAILABLE and not failure.received:
            service.on_unreached(node, failure.details)
        delay = self._retry_delay(failure, per_try, now)
        if delay is not None:
            self._state = _WAITING
            self._attempt = None
            service.call_goes_on(self._method, failure.code, now - attempt.started_at)
            return Pause(delay)
        return self._end(failure.code, self._reason(failure, expired), outcome, now, from_attempt=True)

    def cancelled(self, now: float) -> None:
        """The application gave up. Harmless when the call is over."""
        if self._state is _OVER:
            return
        attempt = self._attempt
        if self._state is _ATTEMPTING and attempt is not None:
            attempt.node.load.finish(attempt.started_at, now, Outcome.NEUTRAL)
            self._service.tally(attempt.node, self._method).failed(GIVEN_UP, now - attempt.started_at)
            self._service.record(attempt.node, Outcome.NEUTRAL, now)
        self._note_end(StatusCode.CANCELLED, now)
        self._finish(Outcome.NEUTRAL, now)

    def _proceed(self, now: float) -> Action:
        service = self._service
        deadline = self.deadline
        if deadline is not None and now >= deadline:
            return self._fail(StatusCode.DEADLINE_EXCEEDED, self._why_late(), now)
        if service.resolution is not _ACTIVE and (unresolved := self._unresolved(now)) is not None:
            return unresolved
        settings = self._settings
        if settings is None:
            settings = self._settings = service.settings(self._method, self._metadata)
            if deadline is None and settings.timeout is not None:
                deadline = self.deadline = now + settings.timeout
        if settings.fault is not None and not self._faulted:
            self._faulted = True
            fault = settings.fault
            if fault.delay is not None and service.rng.random() * 100 < fault.delay.percent:
                self._state = _WAITING
                return Pause(fault.delay.duration)
        if not self._admitted and (refused := self._admit(settings, now)) is not None:
            return refused
        node = service.picker_for(settings, now).pick(self._key, self._tried, now)
        if node is None:
            if self._wait_for_ready:
                self._state = _WAITING
                return AwaitEndpoints(deadline)
            return self._fail(StatusCode.UNAVAILABLE, service.why_no_pick(settings), now)
        self._state = _ATTEMPTING
        self._attempts += 1
        if not self._tried:
            self._tried = (node,)
        elif node not in self._tried:
            self._tried += (node,)
        per_try = settings.retry.per_try_timeout
        if per_try is not None and (deadline is None or now + per_try < deadline):
            deadline = now + per_try
        node.load.start(now)
        attempt = self._attempt = Attempt(node, self._attempts, now, deadline)
        return attempt

    def _unresolved(self, now: float) -> Action | None:
        service = self._service
        if not self._wait_for_ready:
            if service.resolution is Resolution.UNKNOWN:
                return self._fail(StatusCode.UNAVAILABLE, Reason.UNKNOWN_SERVICE, now)
            if service.unreached:
                return self._fail(StatusCode.UNAVAILABLE, service.unreached_reason, now)
        self._state = _WAITING
        return AwaitEndpoints(self.deadline)

    def _admit(self, settings: MethodSettings, now: float) -> Failed | None:
        service = self._service
        fault = settings.fault
        if fault is not None and fault.abort is not None and self._drawn(fault.abort):
            return self._fail(fault.abort.code, Reason.FAULT_INJECTED, now)
        if not service.gate.enter():
            return self._fail(StatusCode.RESOURCE_EXHAUSTED, Reason.CONCURRENCY_LIMIT, now)
        breaker = self._breaker = service.breaker
        token = breaker.admit(now)
        if token < 0:
            service.gate.leave()
            return self._fail(StatusCode.UNAVAILABLE, Reason.BREAKER_OPEN, now)
        self._admitted = True
        self._token = token
        service.budget.deposit(now)
        return None

    def _drawn(self, abort: FaultAbort) -> bool:
        return self._service.rng.random() * 100 < abort.percent

    def _retry_delay(self, failure: AttemptFailure, per_try: bool, now: float) -> float | None:
        """Seconds until the next attempt; None when there is to be none."""
        settings, service = self._settings, self._service
        if failure.committed or settings is None or _is_due(self.deadline, now):
            return None
        pushback = failure.pushback
        if pushback is not None and not pushback.allowed:
            return None
        unreached = self._wait_for_ready and failure.code is StatusCode.UNAVAILABLE and not failure.received
        if not unreached:
            if failure.code not in settings.retried_codes and not per_try:
                return None
            if self._attempts >= settings.retry.max_attempts or service.breaker.retry_after(now) > 0:
                return None
        delay = None if pushback is None else pushback.delay
        if delay is None:
            self._retries += 1
            delay = backoff_delay(settings.retry.backoff, min(self._retries, 32), service.rng)
        if self.deadline is not None and now + delay >= self.deadline:
            return None
        if not unreached and not service.budget.withdraw(now):
            return None
        return delay

    def _why_late(self) -> Reason:
        return Reason.ATTEMPTS_FAILED if self._history else Reason.DEADLINE_EXCEEDED

    @staticmethod
    def _reason(failure: AttemptFailure, expired: bool) -> Reason:
        return Reason.DEADLINE_EXCEEDED if expired and not failure.received else Reason.ATTEMPTS_FAILED

    def _fail(self, code: StatusCode, reason: Reason, now: float) -> Failed:
        outcome = Outcome.FAILURE if self._history else Outcome.NEUTRAL
        return self._end(code, reason, outcome, now, from_attempt=False)

    def _end(self, code: StatusCode, reason: Reason, outcome: Outcome, now: float, *, from_attempt: bool) -> Failed:
        self._finish(outcome, now)
        self._note_end(code, now)
        detail = self._detail(reason, now)
        self._service.call_failed(code, detail, None if self._attempts else now - self._begun_at, now)
        return Failed(code, detail, from_attempt)

    def _note_end(self, code: StatusCode, now: float) -> None:
        """Counts the whole call, unless its only attempt says as much, and shows it to those who look."""
        service, attempt, took = self._service, self._attempt, now - self._begun_at
        if self._attempts > (attempt is not None):
            service.call_repeated(self._method, code, took, None if attempt is None else now - attempt.started_at)
        if service.tap is not None:
            service.tap.ended(self._tapped(code, took, now))

    def _tapped(self, code: StatusCode, took: float, now: float) -> TappedCall:
        last = self._history[-1] if self._history else None
        endpoint_id = "" if last is None else last.endpoint_id
        if self._attempt is not None:
            endpoint_id = self._attempt.node.endpoint.id
        details = "" if last is None else last.details
        return TappedCall(self._method, code.name, took, self._attempts, endpoint_id, details, self.trace_id, now)

    def _finish(self, outcome: Outcome, now: float) -> None:
        self._state = _OVER
        if self._admitted:
            self._service.settle(self._breaker, self._token, outcome, self._tried, now)
            self._service.gate.leave()

    def _detail(self, reason: Reason, now: float) -> MeshErrorDetail:
        service = self._service
        identity = service.identity()
        hint = HINTS.get(reason, "")
        if not hint and self._history:
            hint = explain(self._history[-1].details, service.name, secure=identity != "")
        return MeshErrorDetail(
            service=service.name,
            method=self._method,
            reason=reason,
            attempts=self._history,
            breaker=service.breaker.state(now).value,
            snapshot_version=service.endpoints_version,
            snapshot_age=service.snapshot_age(now),
            control_plane=service.unreached or service.control_plane(),
            hint=hint,
            identity=identity,
            trace_id=self.trace_id,
        )


def _is_due(deadline: float | None, now: float) -> bool:
    return deadline is not None and now >= deadline - DEADLINE_TOLERANCE


def _classify(failure: AttemptFailure, expired: bool, per_try: bool) -> Outcome:
    if expired:
        return Outcome.FAILURE if per_try else Outcome.NEUTRAL
    if failure.code is StatusCode.RESOURCE_EXHAUSTED:
        return Outcome.OVERLOAD
    if failure.details == _CONNECTION_AGED and failure.code is StatusCode.UNAVAILABLE:
        # All long streams of a connection end so at once; to count them would eject an endpoint that is well.
        return Outcome.NEUTRAL
    return Outcome.FAILURE if failure.code in _FAILURES else Outcome.SUCCESS
