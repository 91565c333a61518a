from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import (
    MAX_METADATA_LENGTH,
    MAX_METADATA_PAIRS,
    MAX_WEIGHT,
    Endpoint,
    Health,
    Locality,
    StatusCode,
    check_address,
    check_endpoint_id,
    check_service_name,
    sorted_endpoints,
)


def endpoint(**fields: Any) -> Endpoint:
    return Endpoint(**{"id": "orders-1", "address": "10.0.0.1", "port": 50051, **fields})


def test_an_endpoint_is_healthy_and_of_weight_one_unless_said_otherwise() -> None:
    made = endpoint()
    assert (made.weight, made.health, made.locality, dict(made.metadata)) == (1, Health.HEALTHY, Locality(), {})


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"id": ""}, "endpoint.id"),
        ({"id": "x" * 129}, "endpoint.id"),
        ({"id": "a b"}, "endpoint.id"),
        ({"id": "a\n"}, "endpoint.id"),
        ({"address": "0.0.0.0"}, "endpoint.address"),
        ({"port": 0}, "endpoint.port"),
        ({"port": 65536}, "endpoint.port"),
        ({"weight": 0}, "endpoint.weight"),
        ({"weight": MAX_WEIGHT + 1}, "endpoint.weight"),
        ({"metadata": {str(number): "" for number in range(MAX_METADATA_PAIRS + 1)}}, "endpoint.metadata"),
        ({"metadata": {"": "x"}}, "endpoint.metadata['']"),
        ({"metadata": {"\udfff": "x"}}, "endpoint.metadata['\\udfff']"),
        ({"metadata": {"k": "\ud800"}}, "endpoint.metadata['k']"),
        ({"metadata": {"k": "x" * (MAX_METADATA_LENGTH + 1)}}, "endpoint.metadata['k']"),
        ({"metadata": {"k" * (MAX_METADATA_LENGTH + 1): "x"}}, f"endpoint.metadata['{'k' * 32}']"),
    ],
)
def test_an_endpoint_outside_its_ranges_is_refused_with_the_field_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        endpoint(**fields)
    assert caught.value.path == path


def test_metadata_cannot_change_after_the_endpoint_is_made() -> None:
    metadata = {"version": "1"}
    made = endpoint(metadata=metadata)
    metadata["version"] = "2"
    assert made.metadata == {"version": "1"}
    assert isinstance(made.metadata, MappingProxyType)


def test_equal_endpoints_hash_alike_and_changed_ones_differ() -> None:
    assert hash(endpoint(metadata={"a": "b"})) == hash(endpoint(metadata={"a": "b"}))
    assert endpoint(metadata={"a": "b"}) == endpoint(metadata={"a": "b"})
    assert endpoint(metadata={"a": "b"}) != endpoint(metadata={"a": "c"})


def test_an_ipv6_target_is_in_brackets() -> None:
    assert endpoint(address="2001:db8::1").target == "[2001:db8::1]:50051"
    assert endpoint().target == "10.0.0.1:50051"


@pytest.mark.parametrize(("region", "zone", "path"), [("a b", "", "locality.region"), ("", "x" * 65, "locality.zone")])
def test_a_bad_place_is_refused(region: str, zone: str, path: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Locality(region, zone)
    assert caught.value.path == path


def test_endpoints_are_ordered_by_id() -> None:
    assert [made.id for made in sorted_endpoints([endpoint(id="b"), endpoint(id="a"), endpoint(id="c")])] == [
        "a",
        "b",
        "c",
    ]


def test_two_endpoints_with_one_id_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="unique within its service"):
        sorted_endpoints([endpoint(), endpoint(port=2)])


@pytest.mark.parametrize("name", ["a", "orders", "orders-v2", "0", "x" * 63])
def test_dns_labels_are_service_names(name: str) -> None:
    assert check_service_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a_b", "x" * 64, "a\n", "é"])
def test_other_names_are_no_service_names(name: str) -> None:
    with pytest.raises(InvalidValueError, match="a DNS label"):
        check_service_name(name)


def test_an_endpoint_id_is_checked_on_its_own_too() -> None:
    assert check_endpoint_id("orders:1") == "orders:1"
    with pytest.raises(InvalidValueError) as caught:
        check_endpoint_id("a/b")
    assert caught.value.path == "endpoint_id"


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "localhost", "orders.internal", "a.b.", "xn--bcher-kva.example"]
)
def test_addresses_and_host_names_are_addresses(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    "address",
    [
        *["", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "1.2.3", "1.2.3.4.5", "999.1.1.1", "[::1]", "-a", "a-", "a..b"],
        *["a b", "x" * 64, ".".join(["x" * 60] * 5), "host:80", "http://a", "a\n"],
    ],
)
def test_what_nobody_can_call_is_no_address(address: str) -> None:
    with pytest.raises(InvalidValueError):
        check_address(address)


def test_status_codes_have_their_numbers_on_the_wire() -> None:
    assert [code.value for code in StatusCode] == list(range(17))
