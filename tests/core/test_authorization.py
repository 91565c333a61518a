from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.authorization import Authorizer
from mesh_client.core.policy import AuthorizationRule, method_matches

CALLERS = ["orders", "gateway", "a", "operator:anna", "operator:orders", "mesh:control-plane", ""]
METHODS = [
    "shop.v1.Orders/Place",
    "shop.v1.Orders/Get",
    "shop.v1.OrdersAdmin/Get",
    "shop.v1/Orders",
    "b.C/Place",
    "b/C",
]
PATTERNS = [*METHODS, "shop.v1.Orders/*", "shop.v1/*", "b.C/*", "b/*", "*"]

rules = st.lists(
    st.builds(
        AuthorizationRule,
        callers=st.lists(
            st.sampled_from(["orders", "gateway", "a", "operator:anna", "operator:orders", "*"]), min_size=1, max_size=3
        ).map(tuple),
        methods=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3).map(tuple),
    ),
    max_size=4,
)


def rule(callers: str, methods: str) -> AuthorizationRule:
    return AuthorizationRule(callers=tuple(callers.split()), methods=tuple(methods.split()))


def allowed_naively(of: list[AuthorizationRule], caller: str, method: str) -> bool:
    """The rules as they are written down, without anything prepared or remembered."""
    if not of:
        return True
    return caller != "" and any(
        any(name in ("*", caller) for name in each.callers)
        and any(method_matches(pattern, method) for pattern in each.methods)
        for each in of
    )


@given(rules, st.lists(st.tuples(st.sampled_from(CALLERS), st.sampled_from(METHODS), st.booleans()), max_size=30))
def test_the_compiled_rules_agree_with_the_written_ones_whatever_was_asked_before(
    given_rules: list[AuthorizationRule], calls: list[tuple[str, str, bool]]
) -> None:
    authorizer = Authorizer(given_rules, "v1", max_decisions=3)
    for caller, method, slash in calls:
        reason = authorizer.check(caller, f"/{method}" if slash else method)
        assert (reason is None) == allowed_naively(given_rules, caller, method)


@given(rules, st.sampled_from(CALLERS), st.sampled_from(METHODS))
def test_the_rule_that_allows_is_the_first_that_would_alone(
    given_rules: list[AuthorizationRule], caller: str, method: str
) -> None:
    number = Authorizer(given_rules, "v1").allowing(caller, method)
    alone = [index for index, each in enumerate(given_rules) if allowed_naively([each], caller, method)]
    assert number == (alone[0] if alone else None)


def test_without_rules_everybody_may_call_everything_even_without_an_identity() -> None:
    authorizer = Authorizer((), "v1")
    assert not authorizer
    assert authorizer.check("", "/a.B/C") is None


def test_nobody_without_an_identity_is_anybody() -> None:
    authorizer = Authorizer([rule("*", "*")], "v1")
    assert authorizer
    assert authorizer.check("orders", "/a.B/C") is None
    assert authorizer.check("", "/a.B/C") == (
        "a caller without an identity may not call a.B/C: "
        "it is not allowed by the authorization rule of policy version v1"
    )


def test_a_refusal_names_caller_method_and_version_of_the_rules() -> None:
    authorizer = Authorizer([rule("orders", "a.B/*"), rule("gateway", "a.B/D")], "77ab04c1d9e2f358")
    assert authorizer.version == "77ab04c1d9e2f358"
    assert authorizer.check("gateway", "/a.B/C") == (
        "gateway may not call a.B/C: it is not allowed by any of the 2 rules of policy version 77ab04c1d9e2f358"
    )


@pytest.mark.parametrize("caller", ["operator:orders", "Orders", "orders ", "orders.mesh.internal", "*", "spiffe://x"])
def test_a_name_that_only_looks_like_the_callers_is_another_one(caller: str) -> None:
    assert Authorizer([rule("orders", "*")], "v1").check(caller, "/a.B/C") is not None


@pytest.mark.parametrize("method", ["/a.B/c", "/a.B/C/D", "//a.B/C", "/a.B/C ", "/x/a.B/C", "", "/", "a.B"])
def test_a_method_that_only_looks_like_the_rules_is_another_one(method: str) -> None:
    assert Authorizer([rule("orders", "a.B/C")], "v1").check("orders", method) is not None


def test_what_is_remembered_is_bounded() -> None:
    authorizer = Authorizer([rule("orders", "a.B/*")], "v1", max_decisions=10)
    for number in range(100):
        assert authorizer.check("orders", f"/a.B/M{number}") is None
        assert authorizer.check("orders", f"/a.C/M{number}") is not None
    assert len(authorizer._decisions) <= 10


def test_the_health_service_is_open_and_what_looks_like_it_is_not() -> None:
    authorizer = Authorizer([rule("orders", "a.B/*")], "v1")
    assert authorizer.check("gateway", "/grpc.health.v1.Health/Check") is None
    assert authorizer.check("gateway", "grpc.health.v1.Health/Watch") is None
    for other in ("/grpc.health.v1.Healthy/Check", "/grpc.health.v1.Health/Charge", "//grpc.health.v1.Health/Check"):
        assert authorizer.check("gateway", other) is not None
