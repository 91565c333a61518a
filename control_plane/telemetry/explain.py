"""Why calls fail, and what to do about it: of a group of failed calls, and of a service as a whole. Pure."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from control_plane.catalog_service import EndpointRecord
from control_plane.telemetry.recorder import CalledState, Reporter
from control_plane.telemetry.stats import Stats
from control_plane.telemetry.traffic import Failures
from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import HINTS, FieldError, Reason
from mesh_client.core.model import Health, ResourceKind
from mesh_client.core.renewal import in_words
from mesh_client.core.tally import ANSWERS

SHOWN = 5
"""Names in one sentence."""
GOOD, POOR = 0.999, 0.95
"""Success rates below which calls are said to go less than well, and badly."""
CERTIFICATE_SOON = 3600.0
"""Seconds before the end of a certificate from which that is said. Most are renewed long before."""


class Severity(enum.IntEnum):
    """How bad something is; the numbers are those of ``mesh.v1.Severity``."""

    OK = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is or may be why calls fail, or that was looked at and is well.

    Attributes:
        severity: how bad it is.
        subject: what it is about, in a word.
        message: what was found.
        remedy: what to do about it; empty when there is nothing to do.
    """

    severity: Severity
    subject: str
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Lagging:
    """A client that does not hold what is published, by what it acknowledged.

    Attributes:
        node_id: which client.
        kind: of what.
        version: that it holds; empty for none.
        rejection: why it rejected what is published; empty when it did not.
    """

    node_id: str
    kind: ResourceKind
    version: str
    rejection: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Calls that the instances of a service refused within the window, because of who called and for load.

    Attributes:
        unauthorized: how many because of who called.
        rate_limited: how many by rate limits.
        shed: how many because too many were in flight.
        callers: those whose calls ended with PERMISSION_DENIED, with how many did.
    """

    unauthorized: int = 0
    rate_limited: int = 0
    shed: int = 0
    callers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a service.

    Attributes:
        service: its name.
        records: its endpoints; None when no registry lists it.
        policy_errors: what is wrong with the policy that is stored for it.
        policy_obeyed: version of the policy that is obeyed in place of that; empty for the defaults.
        policy_provisional: whether its policy cannot be read.
        lagging: clients that do not hold what is published.
        calls: how its calls went within the last minute.
        received: how many of them its instances received of callers that do not report themselves, by caller.
        callers: processes that call it, with what they say of it.
        instances: processes that serve it.
        refused: what its instances refused.
        now: seconds on the clock of ``callers``.
        wall: seconds since the epoch, for certificates.
    """

    service: str
    records: Sequence[EndpointRecord] | None
    policy_errors: Sequence[FieldError] = ()
    policy_obeyed: str = ""
    policy_provisional: bool = False
    lagging: Sequence[Lagging] = ()
    calls: Stats = field(default_factory=Stats)
    received: Mapping[str, int] = field(default_factory=dict)
    callers: Sequence[tuple[Reporter, CalledState]] = ()
    instances: Sequence[Reporter] = ()
    refused: Refused = field(default_factory=Refused)
    now: float = 0.0
    wall: float = 0.0


def findings(facts: Facts) -> list[Finding]:
    """What was found, the worst first."""
    found = [finding for look in _LOOKS for finding in look(facts)]
    return sorted(found, key=lambda finding: -finding.severity)


def _calls(facts: Facts) -> Iterator[Finding]:
    calls = facts.calls
    if calls.success_rate is None:
        yield Finding(Severity.OK, "calls", "nobody has called it within the last minute")
        return
    percent = _percent(calls.success_rate)
    message = f"{percent} of {calls.count} calls within the last minute were answered well{_received(facts)}"
    if calls.success_rate >= GOOD:
        yield Finding(Severity.OK, "calls", message)
        return
    codes = ", ".join(
        f"{count} {code}" for code, count in sorted(calls.codes.items(), key=_second) if code not in ANSWERS
    )
    severity = Severity.WARNING if calls.success_rate >= POOR else Severity.ERROR
    yield Finding(severity, "calls", f"only {message}; {codes}", "see why in the failures below")


def _received(facts: Facts) -> str:
    """Whose calls are counted in another way than the others'."""
    if not facts.received:
        return ""
    callers = [f"{caller or 'callers without identity'} ({count})" for caller, count in sorted(facts.received.items())]
    return f", counted as received those of {_some(callers)}: no load reports of their calls come"


def _endpoints(facts: Facts) -> Iterator[Finding]:
    service = facts.service
    if facts.records is None:
        yield Finding(
            Severity.ERROR,
            "endpoints",
            f"no registry lists {service}",
            "check the name, and that an instance of it runs and registers",
        )
        return
    health = Counter(record.endpoint.health for record in facts.records)
    healthy, unhealthy, draining = (health[each] for each in (Health.HEALTHY, Health.UNHEALTHY, Health.DRAINING))
    rest = "".join(f", {count} {what}" for count, what in ((unhealthy, "unhealthy"), (draining, "draining")) if count)
    if not healthy:
        what = f"none of its endpoints is healthy{rest}" if facts.records else "it has no endpoints"
        yield Finding(Severity.ERROR, "endpoints", what, "start an instance, or see why those there fail their checks")
    elif unhealthy:
        ids = [each.endpoint.id for each in facts.records if each.endpoint.health is Health.UNHEALTHY]
        yield Finding(
            Severity.WARNING,
            "endpoints",
            f"{healthy} healthy{rest}: {_some(ids)}",
            "see why they fail their checks; clients avoid them meanwhile",
        )
    else:
        yield Finding(Severity.OK, "endpoints", f"{healthy} healthy{rest}")
    if held := [record.endpoint.id for record in facts.records if record.held]:
        yield Finding(
            Severity.WARNING,
            "endpoints",
            f"{_some(held)} have vanished from their registry and are held by the mass removal guard",
            "if they are really gone, run `mesh removals confirm`",
        )


def _breakers(facts: Facts) -> Iterator[Finding]:
    by_caller: dict[str, list[CalledState]] = {}
    for reporter, state in facts.callers:
        by_caller.setdefault(reporter.service, []).append(state)
    for caller, states in sorted(by_caller.items()):
        tripped = [each for each in states if each.state is not None and each.state.breaker is not BreakerState.CLOSED]
        if tripped:
            last = max((each.transitions[-1].at for each in tripped if each.transitions), default=facts.now)
            yield Finding(
                Severity.ERROR,
                "breaker",
                f"the breaker is open in {len(tripped)} of {len(states)} processes of {caller or 'no service'}, "
                f"since {in_words(facts.now - last)}: they fail its calls at once",
                "it opened because calls failed in a row; it closes by itself when a probe succeeds",
            )
    if by_caller and not any(
        each.state is not None and each.state.breaker is not BreakerState.CLOSED
        for states in by_caller.values()
        for each in states
    ):
        count = len(facts.callers)
        yield Finding(Severity.OK, "breaker", f"closed in all {count} processes that call it")


def _ejections(facts: Facts) -> Iterator[Finding]:
    by: Counter[str] = Counter()
    why: dict[str, str] = {}
    for _, state in facts.callers:
        by.update(state.state.ejected if state.state is not None else ())
        why |= {each.endpoint_id: each.reason.value for each in state.ejections}
    for endpoint_id, count in sorted(by.items()):
        reason = f" ({why[endpoint_id]})" if endpoint_id in why else ""
        yield Finding(
            Severity.WARNING,
            "ejection",
            f"{count} of {len(facts.callers)} processes have ejected {endpoint_id}{reason}",
            f"look at that instance: it fails where others do not; `mesh endpoints {facts.service}` says where it runs",
        )


def _policy(facts: Facts) -> Iterator[Finding]:
    if facts.policy_errors:
        wrong = "; ".join(map(str, facts.policy_errors[:SHOWN]))
        obeyed = f"version {facts.policy_obeyed} is" if facts.policy_obeyed else "the defaults are"
        yield Finding(
            Severity.WARNING,
            "policy",
            f"the stored policy is invalid, and {obeyed} obeyed in its place: {wrong}",
            f"correct it: `mesh policy get {facts.service}`, then `mesh policy apply`",
        )
    elif facts.policy_provisional:
        yield Finding(
            Severity.WARNING,
            "policy",
            "its policy cannot be read; clients call by the defaults, and servers serve by what they had",
            "see the sources in `mesh status`",
        )


def _versions(facts: Facts) -> Iterator[Finding]:
    for each in facts.lagging:
        if each.rejection:
            yield Finding(
                Severity.WARNING,
                "versions",
                f"{each.node_id} rejects its {each.kind.value} and keeps {each.version or 'nothing'}: {each.rejection}",
                "mend what it says, or update that process",
            )
    waiting = [each.node_id for each in facts.lagging if not each.rejection]
    if waiting:
        yield Finding(
            Severity.WARNING,
            "versions",
            f"{_some(waiting)} have not acknowledged what is published",
            "if that lasts, see whether they hang; calls go on with what they hold",
        )


def _identities(facts: Facts) -> Iterator[Finding]:
    processes = {id(reporter): reporter for reporter in (*(each for each, _ in facts.callers), *facts.instances)}
    for reporter in processes.values():
        who, process = f"{reporter.node.id} of {reporter.service or 'no service'}", reporter.process
        expires = process.certificate_expires
        left = None if expires is None else expires - facts.wall
        if left is not None and left <= 0:
            yield Finding(
                Severity.ERROR,
                "identity",
                f"the certificate of {who} has expired: nobody accepts it",
                process.identity_warning or "see whether it reaches the control plane's enrolment port",
            )
        elif process.identity_warning or (left is not None and left < CERTIFICATE_SOON):
            ends = "" if left is None else f"the certificate of {who} ends in {in_words(left)}"
            yield Finding(Severity.WARNING, "identity", ends or who, process.identity_warning)


def _refusals(facts: Facts) -> Iterator[Finding]:
    refused = facts.refused
    if refused.unauthorized:
        callers = [f"{caller or 'nobody of the mesh'} ({count})" for caller, count in sorted(refused.callers.items())]
        yield Finding(
            Severity.WARNING,
            "authorization",
            f"its instances refused {refused.unauthorized} calls because of who called: {_some(callers)}",
            f"if they should be allowed, add them to `authorization` in the policy of {facts.service}; "
            "`mesh policy check CALLER METHOD` says by which rule one is",
        )
    for count, what, where in (
        (refused.rate_limited, "by a rate limit", "rate_limits"),
        (refused.shed, "because too many were in flight", "server_concurrency_limit"),
    ):
        if count:
            yield Finding(
                Severity.WARNING,
                "limits",
                f"its instances refused {count} calls {what}",
                f"call less, start more instances, or raise {where} in the policy of {facts.service}",
            )


def _budgets(facts: Facts) -> Iterator[Finding]:
    spent = [
        reporter.node.id for reporter, state in facts.callers if state.state is not None and state.state.budget < 1
    ]
    if spent:
        yield Finding(
            Severity.WARNING,
            "retries",
            f"the retry budget of {_some(spent)} is spent: failed attempts are not repeated there",
            "too many attempts fail for retries to help; see the failures",
        )


_LOOKS = (_calls, _endpoints, _breakers, _ejections, _policy, _versions, _identities, _refusals, _budgets)


def explain_failures(failures: Failures) -> tuple[str, str]:
    """What a group of failed calls means, and what to do about it; the latter empty when there is nothing to do."""
    example = failures.example
    detail = None if example is None else example.example.detail
    hint = "" if detail is None else detail.hint
    reason = failures.reason
    if failures.received:
        reason = Reason.ATTEMPTS_FAILED  # instances answered so, which is all that is known
    if reason is None:
        return f"the call failed with {failures.code}", hint
    if reason is not Reason.ATTEMPTS_FAILED:
        if reason is Reason.DEADLINE_EXCEEDED:
            return (
                "the deadline of the call passed before it was answered",
                hint or "give it more time, or see in `mesh top` how long calls of this method take",
            )
        return reason.value, hint or HINTS.get(reason, "")
    last = detail.attempts[-1].details if detail is not None and detail.attempts else ""
    unreached = "failed to connect" in last or "Connection refused" in last
    meaning, remedy = (
        _UNREACHED if unreached and failures.code == "UNAVAILABLE" else _ANSWERED.get(failures.code, _ANSWER)
    )
    names = {
        "caller": failures.caller or "CALLER",
        "method": failures.method.removeprefix("/"),
        "service": failures.service,
    }
    return meaning.format(**names), hint or remedy.format(**names)


_UNREACHED = (
    "no connection to an instance could be made",
    "see in `mesh endpoints {service}` where they should run, whether they do, and whether {caller} can reach that",
)
_ANSWER = ("the application answered so", "")
_ANSWERED = {
    "UNAVAILABLE": (
        "instances answered that they are not available, or went away while they answered",
        "see their logs around that time",
    ),
    "PERMISSION_DENIED": (
        "instances refused the caller",
        "`mesh policy check {caller} {method}` says why; if it is meant to call, allow it in the policy of {service}",
    ),
    "UNAUTHENTICATED": ("the application did not accept the caller's credentials", "see what it asks of its callers"),
    "RESOURCE_EXHAUSTED": (
        "instances refused it for load: by a rate limit, or because too many calls were in flight",
        "call less, start more instances, or raise rate_limits or server_concurrency_limit in the policy of {service}",
    ),
    "DEADLINE_EXCEEDED": (
        "no attempt was answered in time",
        "give it more time, raise retry.per_try_timeout in the policy of {service}, or see what it is slow at",
    ),
    "UNIMPLEMENTED": (
        "instances do not have the method",
        "start a version of {service} that has it; while versions are mixed, split by labels",
    ),
    "INTERNAL": (
        "instances failed while they served it, or a proxy between broke the call",
        "see the logs of {service}",
    ),
    "UNKNOWN": ("a handler raised an exception that it does not handle", "see the logs of {service}"),
    "DATA_LOSS": ("instances said that data are lost", "see the logs of {service}"),
    "CANCELLED": ("the call was cancelled", ""),
}


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _percent(share: float) -> str:
    """Never 100 % unless it is."""
    percent = share * 100
    return f"{int(percent * 100) / 100:g}%" if percent < 100 else "100%"


def _second(entry: tuple[str, int]) -> int:
    return -entry[1]
