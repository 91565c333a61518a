"""What a guard remembers of callers whom it let through, and when it must not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from cryptography import x509

from mesh_client.core.authorization import MAX_DECISIONS
from mesh_client.core.caller import Caller
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from mesh_client.core.policy import ServicePolicy
from mesh_client.guard import Guard, Refusal
from tests.certificates import Certificate, TestAuthority

METHOD = "/shop.v1.PaymentService/Charge"
AUTHORITY = TestAuthority()
ORDERS, REVIEWS = AUTHORITY.service("orders"), AUTHORITY.service("reviews")


class Connection:
    """What gRPC says of a connection whose other side showed these certificates: of names what is before a NUL byte."""

    def __init__(self, *shown: Certificate, port: int = 5001) -> None:
        self._shown = [each.chain for each in shown]
        self._port = port
        self.read = 0
        """How often the certificate was asked for."""

    def peer(self) -> str:
        return f"ipv4:127.0.0.1:{self._port}"

    def peer_identities(self) -> list[bytes] | None:
        found = []
        for each in self._shown:
            certificate = x509.load_pem_x509_certificate(each)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            found += [name.value.encode().split(b"\0")[0] for name in names]
        return found or None

    def auth_context(self) -> Mapping[str, Any]:
        self.read += 1
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


def test_the_certificate_is_read_once_for_each_connection_and_method() -> None:
    guard = guarded("orders")
    connection, another = Connection(ORDERS), Connection(ORDERS, port=5002)
    for _ in range(3):
        assert name(guard.admit(connection, METHOD)) == "orders"
        assert name(guard.admit(another, METHOD)) == "orders"
    assert (connection.read, another.read) == (1, 1)
    assert name(guard.admit(connection, f"{METHOD}Again")) == "orders"
    assert connection.read == 2


def test_an_address_that_another_workload_has_now_says_nothing() -> None:
    guard = guarded("orders")
    for certificate in (ORDERS, AUTHORITY.service("orders"), ORDERS):
        caller = guard.admit(Connection(certificate), METHOD)
        assert isinstance(caller, Caller)
        assert caller.workload_id == certificate.workload_id
    assert name(guard.admit(Connection(REVIEWS), METHOD)) == "PERMISSION_DENIED"


def test_a_certificate_whose_names_do_not_say_which_workload_it_is_is_read_each_time() -> None:
    """Such as those of operators, and of older control planes."""
    principal = Principal.service(DEFAULT_TRUST_DOMAIN, "orders")
    guard = guarded("orders", "operator:alice")
    older = AUTHORITY.issue(principal, dns_names=[principal.dns_name])
    somebody_elses = AUTHORITY.issue(principal, dns_names=[principal.workload_name("0" * 16)])
    for certificate, who in (
        (older, "orders"),
        (somebody_elses, "orders"),
        (AUTHORITY.operator(), "operator:alice"),
        (AUTHORITY.issue(Principal.operator(DEFAULT_TRUST_DOMAIN, "alice"), dns_names=["\0"]), "operator:alice"),
    ):
        connection = Connection(certificate)
        for calls in (1, 2, 3):
            assert name(guard.admit(connection, METHOD)) == who
            assert connection.read == calls


def test_names_that_grpc_cuts_short_are_not_mistaken_for_those_of_somebody_who_was_let_through() -> None:
    guard = guarded("orders")
    assert name(guard.admit(Connection(ORDERS), METHOD)) == "orders"
    principal = Principal.service(DEFAULT_TRUST_DOMAIN, "orders")
    smuggled = AUTHORITY.issue(
        principal,
        uris=[f"{principal.spiffe_id}\0.example.org"],
        dns_names=[principal.dns_name, principal.workload_name(ORDERS.workload_id)],
    )
    connection = Connection(smuggled, port=5002)
    assert connection.peer_identities() == Connection(ORDERS).peer_identities()
    for _ in range(2):
        assert name(guard.admit(connection, METHOD)) == "PERMISSION_DENIED"
