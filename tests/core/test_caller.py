from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.caller import Caller, CallerCache, caller_from
from mesh_client.core.identity import Principal

ORDERS = b"spiffe://mesh.internal/service/orders"
WORKLOAD = b"0123456789abcdef"


def test_a_certificate_names_one_workload_of_one_principal() -> None:
    caller = caller_from([ORDERS], [WORKLOAD])
    assert caller == Caller(Principal.service("mesh.internal", "orders"), "0123456789abcdef")
    assert (caller.spiffe_id, caller.name, caller.service) == (ORDERS.decode(), "orders", "orders")
    assert (caller.is_operator, caller.is_control_plane) == (False, False)
    assert str(caller) == "spiffe://mesh.internal/service/orders (workload 0123456789abcdef)"


def test_operators_and_control_planes_are_no_service() -> None:
    operator = Caller(Principal.operator("mesh.internal", "orders"), "0" * 16)
    plane = Caller(Principal.control_plane("mesh.internal"), "0" * 16)
    assert (operator.name, operator.service, operator.is_operator) == ("operator:orders", None, True)
    assert (plane.name, plane.service, plane.is_control_plane) == ("mesh:control-plane", None, True)


@pytest.mark.parametrize(
    ("spiffe_ids", "common_names"),
    [
        ([], [WORKLOAD]),
        ([ORDERS], []),
        ([ORDERS, ORDERS], [WORKLOAD]),
        ([ORDERS], [WORKLOAD, WORKLOAD]),
        ([b"spiffe://mesh.internal/orders"], [WORKLOAD]),
        ([ORDERS + b"\0"], [WORKLOAD]),
        ([ORDERS.upper()], [WORKLOAD]),
        (["spiffe://mesh.internal/service/\u00f6".encode()], [WORKLOAD]),
        ([ORDERS], [b"0123456789ABCDEF"]),
        ([ORDERS], [b"0123456789abcde"]),
        ([ORDERS], [WORKLOAD + b"\n"]),
        ([ORDERS], [b"orders"]),
    ],
)
def test_what_is_not_exactly_a_certificate_of_the_mesh_names_nobody(
    spiffe_ids: list[bytes], common_names: list[bytes]
) -> None:
    assert caller_from(spiffe_ids, common_names) is None


def read(certificate: bytes) -> Caller | None:
    return caller_from([ORDERS], [certificate])


@given(
    st.lists(
        st.fixed_dictionaries(
            {"x509_common_name": st.just([WORKLOAD])},
            optional={"x509_pem_cert": st.lists(st.sampled_from([WORKLOAD, *(b"%x" % n * 16 for n in range(4))]))},
        ),
        max_size=20,
    )
)
def test_what_is_remembered_is_what_would_be_read(connections: list[dict[str, list[bytes]]]) -> None:
    cache = CallerCache(read, most=3)
    for properties in connections:
        shown = properties.get("x509_pem_cert", [])
        assert cache.caller(properties) == (read(shown[0]) if len(shown) == 1 else None)
    assert len(cache._known) <= 3


def test_what_is_remembered_is_bounded() -> None:
    asked: list[bytes] = []

    def reading(certificate: bytes) -> Caller | None:
        asked.append(certificate)
        return read(certificate)

    cache = CallerCache(reading, most=2)
    for certificate in (b"a", b"a", b"b", b"c", b"a"):
        assert cache.caller({"x509_pem_cert": [certificate]}) == read(certificate)
    assert asked == [b"a", b"b", b"c", b"a"]
