"""What a guard remembers of callers whom it let through, and when it must not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

from mesh_client.core.authorization import MAX_DECISIONS
from mesh_client.core.caller import Caller
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN
from mesh_client.core.policy import ServicePolicy
from mesh_client.guard import Guard, Refusal
from tests.certificates import Certificate, TestAuthority

METHOD = "/shop.v1.PaymentService/Charge"
AUTHORITY = TestAuthority()
ORDERS, REVIEWS = AUTHORITY.service("orders"), AUTHORITY.service("reviews")


class Connection:
    """What gRPC says of a connection whose other side showed these certificates."""

    def __init__(self, *shown: Certificate) -> None:
        self._shown = [each.chain for each in shown]

    def peer(self) -> str:
        return "ipv4:127.0.0.1:5001"

    def auth_context(self) -> Mapping[str, Any]:
        return {"x509_pem_cert": self._shown} if self._shown else {}


def policy(*callers: str) -> ServicePolicy:
    return ServicePolicy.parse(
        {"service": "payments", "authorization": [{"callers": list(callers), "methods": ["shop.v1.PaymentService/*"]}]}
    )


def guarded(*callers: str) -> Guard:
    guard = Guard("payments", secure=True)
    guard.trust_domain = DEFAULT_TRUST_DOMAIN
    guard.apply(policy(*callers))
    return guard


def name(admitted: Caller | Refusal | None) -> str:
    """Who was let through; else the status."""
    if isinstance(admitted, Refusal):
        return admitted.code.name
    return "" if admitted is None else admitted.name


def test_the_same_caller_is_the_same_each_time_and_others_are_not() -> None:
    guard = guarded("orders")
    for _ in range(3):
        assert name(guard.admit(Connection(ORDERS), METHOD)) == "orders"
        assert name(guard.admit(Connection(REVIEWS), METHOD)) == "PERMISSION_DENIED"
        assert name(guard.admit(Connection(), METHOD)) == "PERMISSION_DENIED"
        assert name(guard.admit(Connection(ORDERS, REVIEWS), METHOD)) == "PERMISSION_DENIED"
        assert name(guard.admit(Connection(ORDERS), "/shop.v1.OrderService/GetOrder")) == "PERMISSION_DENIED"
    assert guard.denied == 12


def test_a_new_policy_holds_from_the_next_call_on() -> None:
    guard = guarded("orders")
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "orders"
    guard.apply(policy("reviews"))
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "PERMISSION_DENIED"
    assert name(guard.admit(Connection(REVIEWS), METHOD)) == "reviews"


def test_who_was_let_through_and_is_revoked_is_let_through_no_more() -> None:
    guard = guarded("orders")
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "orders"
    guard.revoked = frozenset({ORDERS.workload_id})
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "PERMISSION_DENIED"
    assert name(guard.admit(Connection(AUTHORITY.service("orders")), METHOD)) == "orders"


def test_another_trust_domain_lets_through_whom_it_has() -> None:
    guard = guarded("orders")
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "orders"
    guard.trust_domain = "elsewhere.internal"
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "PERMISSION_DENIED"


def test_nobody_is_let_through_before_the_policy_is_known() -> None:
    guard = Guard("payments", secure=True)
    guard.trust_domain = DEFAULT_TRUST_DOMAIN
    assert guard.waits
    refusal = guard.admit(Connection(ORDERS), METHOD)
    assert isinstance(refusal, Refusal)
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    guard.apply(policy("orders"))
    assert not guard.waits
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "orders"


def test_more_methods_than_are_remembered_are_decided_all_the_same() -> None:
    guard = guarded("orders")
    for number in range(MAX_DECISIONS + 10):
        assert name(guard.admit(Connection(ORDERS), f"/shop.v1.PaymentService/Charge{number}")) == "orders"
    assert name(guard.admit(Connection(REVIEWS), METHOD)) == "PERMISSION_DENIED"
