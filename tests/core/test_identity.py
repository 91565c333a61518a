"""Names of who is who: what is written can be read back, and nothing else is taken for a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.identity import (
    DEFAULT_TRUST_DOMAIN,
    Kind,
    Principal,
    check_operator_name,
    check_trust_domain,
)

LABELS = st.from_regex(r"[a-z][a-z0-9-]{0,20}[a-z0-9]", fullmatch=True)
DOMAINS = st.lists(LABELS, min_size=1, max_size=4).map(".".join)


@given(DOMAINS, LABELS)
def test_what_is_written_is_read_back(domain: str, name: str) -> None:
    for principal in (
        Principal.service(domain, name),
        Principal.operator(domain, name),
        Principal.control_plane(domain),
    ):
        assert Principal.parse(principal.spiffe_id) == principal
        assert str(principal) == principal.spiffe_id


@given(st.text(max_size=80))
def test_what_is_read_is_what_would_be_written(text: str) -> None:
    for prefix in ("", "spiffe://", "spiffe://mesh.internal/", "spiffe://mesh.internal/service/"):
        try:
            principal = Principal.parse(prefix + text)
        except InvalidValueError:
            continue
        assert principal.spiffe_id == prefix + text


def test_names_as_they_stand_in_certificates_and_rules() -> None:
    orders = Principal.service(DEFAULT_TRUST_DOMAIN, "orders")
    assert (orders.spiffe_id, orders.dns_name, orders.caller) == (
        "spiffe://mesh.internal/service/orders",
        "orders.mesh.internal",
        "orders",
    )
    alice = Principal.operator(DEFAULT_TRUST_DOMAIN, "alice")
    assert (alice.spiffe_id, alice.dns_name, alice.caller) == (
        "spiffe://mesh.internal/operator/alice",
        "",
        "operator:alice",
    )
    plane = Principal.control_plane(DEFAULT_TRUST_DOMAIN)
    assert (plane.spiffe_id, plane.dns_name, plane.caller) == (
        "spiffe://mesh.internal/mesh/control-plane",
        "control-plane.mesh.mesh.internal",
        "mesh:control-plane",
    )
    names = [each.workload_name("0123456789abcdef") for each in (orders, alice, plane)]
    assert names == ["0123456789abcdef.workload.mesh.internal", "", ""]


@given(LABELS)
def test_no_service_has_the_control_planes_dns_name(name: str) -> None:
    plane = Principal.control_plane("mesh.internal")
    assert Principal.service("mesh.internal", name).dns_name != plane.dns_name
    assert Principal.service("mesh.internal", "control-plane").dns_name != plane.dns_name
    with pytest.raises(InvalidValueError):
        Principal.service("mesh.internal", "control-plane.mesh")


@pytest.mark.parametrize(
    "spiffe_id",
    [
        "",
        "spiffe://",
        "spiffe://mesh.internal",
        "spiffe://mesh.internal/",
        "spiffe://mesh.internal/service",
        "spiffe://mesh.internal/service/",
        "spiffe://mesh.internal/service/orders/",
        "spiffe://mesh.internal/service/orders/admin",
        "spiffe://mesh.internal/service/../operator/alice",
        "spiffe://mesh.internal/service/Orders",
        "spiffe://mesh.internal/service/orders?x=1",
        "spiffe://mesh.internal/service/orders#x",
        "spiffe://mesh.internal/service/orders\n",
        "spiffe://mesh.internal/service/%6frders",
        "spiffe://mesh.internal:443/service/orders",
        "spiffe://user@mesh.internal/service/orders",
        "spiffe://MESH.internal/service/orders",
        "spiffe:///service/orders",
        "SPIFFE://mesh.internal/service/orders",
        "https://mesh.internal/service/orders",
        "spiffe://mesh.internal/mesh/control-plane/x",
        "spiffe://mesh.internal/mesh/other",
        "spiffe://mesh.internal/operator/",
        "spiffe://mesh.internal/operator/a/b",
        f"spiffe://mesh.internal/service/{'o' * 3000}",
    ],
)
def test_other_names_are_refused(spiffe_id: str) -> None:
    with pytest.raises(InvalidValueError):
        Principal.parse(spiffe_id)


@pytest.mark.parametrize("name", ["", ".", "a..b", "-a", "a-", "a_b", "A", "a.", "x" * 64, ".".join(["a" * 60] * 4)])
def test_a_trust_domain_is_a_dns_name(name: str) -> None:
    with pytest.raises(InvalidValueError):
        check_trust_domain(name)


@pytest.mark.parametrize("name", ["", "a.b", "a:b", "A", "-", "a" * 64])
def test_an_operators_name_is_a_dns_label(name: str) -> None:
    with pytest.raises(InvalidValueError):
        check_operator_name(name)


def test_the_kinds_are_told_apart() -> None:
    assert {kind.value for kind in Kind} == {"service", "control-plane", "operator"}
