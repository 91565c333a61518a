"""Why calls fail, in words, and what to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from control_plane.catalog_service import EndpointRecord
from control_plane.subscription import ClientNode
from control_plane.telemetry.explain import (
    Facts,
    Lagging,
    Refused,
    Severity,
    explain_failures,
    findings,
)
from control_plane.telemetry.recorder import CalledState, ProcessState, Reporter
from control_plane.telemetry.stats import Stats
from control_plane.telemetry.traffic import Failures
from control_plane.telemetry.window import FailureExample
from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import HINTS, AttemptDetail, FieldError, MeshErrorDetail, Reason
from mesh_client.core.incidents import Example, Transition
from mesh_client.core.load_report import ServiceState
from mesh_client.core.model import Endpoint, Health, ResourceKind, StatusCode
from mesh_client.core.outlier import Ejection, EjectionReason
from mesh_client.core.store import Resolution

PLACE = "/shop.v1.OrderService/PlaceOrder"
ERROR, WARNING, OK = Severity.ERROR, Severity.WARNING, Severity.OK


def record(name: str, health: Health = Health.HEALTHY, *, held: bool = False) -> EndpointRecord:
    return EndpointRecord(Endpoint(name, "127.0.0.1", 1, health=health), "embedded", 0.0, held)


def process(name: str, caller: str = "checkout", **state: Any) -> Reporter:
    made = Reporter(ClientNode(name, caller), "e", "", 0.0)
    made.process = ProcessState(**state)
    return made


def calling(name: str, breaker: BreakerState = BreakerState.CLOSED, budget: int = 100) -> tuple[Reporter, CalledState]:
    state = CalledState("orders")
    state.state = ServiceState(Resolution.ACTIVE, "p1", "e1", breaker, (), 2, 0, 0, budget)
    return process(name), state


def facts(**changed: Any) -> Facts:
    return replace(Facts("orders", [record("orders-1"), record("orders-2")], now=100.0, wall=1000.0), **changed)


def found(**changed: Any) -> list[tuple[Severity, str, str]]:
    return [(each.severity, each.subject, each.message) for each in findings(facts(**changed))]


def stats(**codes: int) -> Stats:
    return Stats.of({int(StatusCode[code]): count for code, count in codes.items()}, 60.0)


def test_calls_that_are_counted_as_received_are_said_to_be() -> None:
    assert found(calls=stats(OK=52), received={"edge": 40, "": 2})[0][2] == (
        "100% of 52 calls within the last minute were answered well, counted as received those of callers without "
        "identity (2), edge (40): no load reports of their calls come"
    )
    denied = Failures("edge", "orders", PLACE, "PERMISSION_DENIED", None, 3, None, received=True)
    meaning, remedy = explain_failures(denied)
    assert meaning == "instances refused the caller"
    assert "`mesh policy check edge" in remedy


def test_of_a_service_that_is_well_it_is_said_what_was_looked_at() -> None:
    well = found(calls=stats(OK=998, NOT_FOUND=2, CANCELLED=500), callers=[calling("checkout-1")])
    assert well == [
        (OK, "calls", "100% of 1500 calls within the last minute were answered well"),
        (OK, "endpoints", "2 healthy"),
        (OK, "breaker", "closed in all 1 processes that call it"),
    ]
    assert found()[0] == (OK, "calls", "nobody has called it within the last minute")


@pytest.mark.parametrize(
    ("codes", "severity", "message"),
    [
        (
            {"OK": 980, "UNAVAILABLE": 15, "INTERNAL": 5},
            WARNING,
            "only 98% of 1000 calls within the last minute were answered well; 15 UNAVAILABLE, 5 INTERNAL",
        ),
        (
            {"OK": 1, "UNAVAILABLE": 99_999},
            ERROR,
            "only 0% of 100000 calls within the last minute were answered well; 99999 UNAVAILABLE",
        ),
        (
            {"OK": 99_899, "UNAVAILABLE": 101},
            WARNING,
            "only 99.89% of 100000 calls within the last minute were answered well; 101 UNAVAILABLE",
        ),
    ],
)
def test_calls_that_go_badly_come_first(codes: dict[str, int], severity: Severity, message: str) -> None:
    assert found(calls=stats(**codes))[0] == (severity, "calls", message)


@pytest.mark.parametrize(
    ("records", "severity", "message"),
    [
        (None, ERROR, "no registry lists orders"),
        ([], ERROR, "it has no endpoints"),
        ([record("a", Health.UNHEALTHY)], ERROR, "none of its endpoints is healthy, 1 unhealthy"),
        ([record("a"), record("b", Health.UNHEALTHY)], WARNING, "1 healthy, 1 unhealthy: b"),
        ([record("a"), record("b", Health.DRAINING)], OK, "1 healthy, 1 draining"),
        (
            [record("a", held=True)],
            WARNING,
            "a have vanished from their registry and are held by the mass removal guard",
        ),
    ],
)
def test_endpoints(records: list[EndpointRecord] | None, severity: Severity, message: str) -> None:
    assert (severity, "endpoints", message) in found(records=records)


def test_long_lists_are_cut() -> None:
    records = [record("a"), *(record(f"b{number}", Health.UNHEALTHY) for number in range(7))]
    assert (WARNING, "endpoints", "1 healthy, 7 unhealthy: b0, b1, b2, b3, b4 and 2 more") in found(records=records)


def test_breakers_are_told_by_caller() -> None:
    open_one = calling("checkout-1", BreakerState.OPEN)
    open_one[1].transitions.append(Transition(88.0, BreakerState.CLOSED, BreakerState.OPEN))
    unsaid = process("jobs-1", ""), CalledState("orders")
    half_open = process("jobs-2", ""), calling("jobs-2", BreakerState.HALF_OPEN)[1]
    shown = found(callers=[open_one, calling("checkout-2"), unsaid, half_open])
    assert [each for each in shown if each[1] == "breaker"] == [
        (
            ERROR,
            "breaker",
            "the breaker is open in 1 of 2 processes of no service, since 0 s: they fail its calls at once",
        ),
        (
            ERROR,
            "breaker",
            "the breaker is open in 1 of 2 processes of checkout, since 12 s: they fail its calls at once",
        ),
    ]


def test_ejections_are_told_with_their_reason() -> None:
    one, two = calling("checkout-1"), calling("checkout-2")
    unsaid = process("jobs-1"), CalledState("orders")
    for _, state in (one, two):
        assert state.state is not None
        state.state = replace(state.state, ejected=("orders-1",))
    one[1].ejections.append(Ejection("orders-1", 1.0, 31.0, EjectionReason.SUCCESS_RATE))
    assert (
        WARNING,
        "ejection",
        "2 of 3 processes have ejected orders-1 (fewer successes than the others)",
    ) in found(callers=[one, two, unsaid])
    assert (WARNING, "ejection", "1 of 1 processes have ejected orders-1") in found(callers=[two])


def test_policies_that_are_not_obeyed() -> None:
    errors = [FieldError("timeout", "expected a duration")]
    assert (
        WARNING,
        "policy",
        "the stored policy is invalid, and the defaults are obeyed in its place: timeout: expected a duration",
    ) in found(policy_errors=errors, policy_provisional=True)
    assert "version 7ab is obeyed" in str(found(policy_errors=errors, policy_obeyed="7ab"))
    assert (
        WARNING,
        "policy",
        "its policy cannot be read; clients call by the defaults, and servers serve by what they had",
    ) in found(policy_provisional=True)


def test_clients_that_do_not_hold_what_is_published() -> None:
    lagging = [
        Lagging("checkout-1", ResourceKind.ENDPOINTS, "v1", ""),
        Lagging("checkout-2", ResourceKind.POLICY, "", "routes: unknown"),
    ]
    assert [each[2] for each in found(lagging=lagging) if each[1] == "versions"] == [
        "checkout-2 rejects its policy and keeps nothing: routes: unknown",
        "checkout-1 have not acknowledged what is published",
    ]


def test_certificates_that_end_or_have_ended() -> None:
    callers = [
        (process("checkout-1", certificate_expires=900.0), CalledState("orders")),
        (
            process("checkout-2", certificate_expires=1600.0, identity_warning="nothing renews it"),
            CalledState("orders"),
        ),
        (process("checkout-3", certificate_expires=90_000.0), CalledState("orders")),
    ]
    instances = [process("orders-1", "orders", identity_warning="it has no certificate"), callers[0][0]]
    shown = [
        (each.severity, each.message, each.remedy) for each in findings(facts(callers=callers, instances=instances))
    ]
    assert [each for each in shown if "certificate" in each[1] or each[1].startswith("orders-1")] == [
        (
            ERROR,
            "the certificate of checkout-1 of checkout has expired: nobody accepts it",
            "see whether it reaches the control plane's enrolment port",
        ),
        (WARNING, "the certificate of checkout-2 of checkout ends in 10 min", "nothing renews it"),
        (WARNING, "orders-1 of orders", "it has no certificate"),
    ]


def test_refusals_by_the_instances() -> None:
    refused = Refused(unauthorized=7, rate_limited=5, shed=2, callers={"jobs": 6, "": 1})
    messages = [each[2] for each in found(refused=refused)]
    assert "its instances refused 7 calls because of who called: nobody of the mesh (1), jobs (6)" in messages
    assert "its instances refused 5 calls by a rate limit" in messages
    assert "its instances refused 2 calls because too many were in flight" in messages


def test_retry_budgets_that_are_spent() -> None:
    assert (
        WARNING,
        "retries",
        "the retry budget of checkout-2 is spent: failed attempts are not repeated there",
    ) in found(callers=[calling("checkout-1"), calling("checkout-2", budget=0), (process("x"), CalledState("orders"))])


def failures(
    code: str, reason: Reason | None = Reason.ATTEMPTS_FAILED, details: str | None = None, hint: str = ""
) -> Failures:
    example = None
    if details is not None:
        attempts = (AttemptDetail("orders-1", "127.0.0.1:1", code, details, 0.1),) if details else ()
        detail = MeshErrorDetail("orders", PLACE, reason or Reason.ATTEMPTS_FAILED, attempts, hint=hint)
        example = FailureExample("checkout-1", Example(detail, 1.0))
    return Failures("checkout", "orders", PLACE, code, reason, 3, example)


@pytest.mark.parametrize("reason", [each for each in Reason if each is not Reason.ATTEMPTS_FAILED])
def test_every_reason_is_explained_with_something_to_do(reason: Reason) -> None:
    explanation, remedy = explain_failures(failures("UNAVAILABLE", reason))
    assert explanation
    assert remedy or reason not in HINTS
    assert remedy == HINTS.get(reason, remedy)


@pytest.mark.parametrize("code", [code.name for code in StatusCode if code is not StatusCode.OK])
def test_every_status_is_explained(code: str) -> None:
    explanation, remedy = explain_failures(failures(code, details="no"))
    assert explanation
    assert "{" not in explanation + remedy


def test_a_failure_is_explained_by_what_its_last_attempt_said() -> None:
    unreached, remedy = explain_failures(failures("UNAVAILABLE", details="failed to connect to all addresses"))
    assert unreached == "no connection to an instance could be made"
    assert "mesh endpoints orders" in remedy
    answered, _ = explain_failures(failures("UNAVAILABLE", details="I am busy"))
    assert answered.startswith("instances answered")
    assert explain_failures(failures("UNAVAILABLE", details="")) == explain_failures(failures("UNAVAILABLE"))
    denied, remedy = explain_failures(failures("PERMISSION_DENIED", details="no"))
    assert denied == "instances refused the caller"
    assert "mesh policy check checkout shop.v1.OrderService/PlaceOrder" in remedy
    assert explain_failures(failures("NOT_FOUND")) == ("the application answered so", "")


def test_the_hint_of_the_process_comes_before_that_of_the_table() -> None:
    assert explain_failures(failures("UNAVAILABLE", details="x", hint="look there"))[1] == "look there"
    assert explain_failures(failures("UNAVAILABLE", None, details="x", hint="look there")) == (
        "the call failed with UNAVAILABLE",
        "look there",
    )
    assert explain_failures(failures("UNAVAILABLE", None)) == ("the call failed with UNAVAILABLE", "")
