"""The short way of a call that nothing stands in the way of: one step from the application to its first attempt.

Most calls meet no fault, no split, no open breaker and no full limit, and succeed at once. For them `begin` does what
`Call` does from deadline to pick, and `succeeded` what it does at the end; a call machine is made, by `machine`, only
when something else happens. What is decided and accounted is the same, which a test holds for random calls.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh_client.core.breaker import ServiceBreaker
from mesh_client.core.call import Attempt, Call
from mesh_client.core.model import Outcome
from mesh_client.core.node import Node
from mesh_client.core.service import MethodSettings, Service

_SUCCESS = Outcome.SUCCESS


class FirstAttempt(Attempt):
    """The first attempt of a call that has no machine yet.

    Attributes:
        settings: of the method.
        breaker: that admitted the call.
        token: for its `settle`.
    """

    __slots__ = ("breaker", "settings", "token")

    def __init__(
        self,
        node: Node,
        started_at: float,
        deadline: float | None,
        settings: MethodSettings,
        breaker: ServiceBreaker,
    ) -> None:
        self.node = node
        self.number = 1
        self.started_at = started_at
        self.deadline = deadline
        self.settings = settings
        self.breaker = breaker
        self.token = breaker.generation


def begin(service: Service, method: str, deadline: float | None, now: float) -> FirstAttempt | None:
    """The application made a call: its first attempt, or None when a `Call` has to decide. Then nothing has changed.

    Args:
        service: what all calls to the service share.
        method: full method name with leading slash.
        deadline: absolute seconds, or None.
        now: seconds.
    """
    settings = service.plain_settings.get(method)
    if settings is None or now >= service.next_tick:
        return None
    breaker, gate, budget = service.breaker, service.gate, service.budget
    if not breaker.closed or now >= budget.bucket_end or (gate.limit is not None and gate.in_flight >= gate.limit):
        return None
    if deadline is not None:
        if now >= deadline:
            return None
    elif settings.timeout is not None:
        deadline = now + settings.timeout
    node = service.picker.pick(None, (), now)
    if node is None:
        return None
    per_try = settings.retry.per_try_timeout
    if per_try is not None and (deadline is None or now + per_try < deadline):
        deadline = now + per_try
    gate.in_flight += 1
    budget.calls_now += 1
    node.load.outstanding += 1
    return FirstAttempt(node, now, deadline, settings, breaker)


def succeeded(service: Service, attempt: FirstAttempt, method: str, now: float) -> None:
    """The attempt ended with OK, and so did the call."""
    node = attempt.node
    node.load.finish(attempt.started_at, now, _SUCCESS)
    tally = node.tallies.get(method) or service.tally(node, method)
    tally.succeeded(now - attempt.started_at)
    record = node.record
    record.successes += 1
    if record.consecutive:
        record.consecutive = 0
    service.gate.in_flight -= 1  # `leave` without its check: `begin` has entered
    breaker = attempt.breaker
    if breaker is service.breaker:
        service.blamed = None
        if not breaker.quiet:
            breaker.settle(attempt.token, _SUCCESS, now)


def machine(
    service: Service,
    attempt: FirstAttempt,
    method: str,
    deadline: float | None,
    wait_for_ready: bool,
    metadata: Iterable[tuple[str, str | bytes]],
) -> Call:
    """The machine of the call, as if it had made the attempt, which is still running; arguments as for `Call`."""
    if deadline is None and attempt.settings.timeout is not None:
        deadline = attempt.started_at + attempt.settings.timeout
    call = Call(service, method, deadline, wait_for_ready, None, metadata)
    call.take_over(attempt, attempt.settings, attempt.breaker, attempt.token)
    return call
