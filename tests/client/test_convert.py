"""What a client makes of messages, good and bad."""

from __future__ import annotations

import pytest
from mesh.v1 import discovery_pb2, endpoint_pb2, policy_pb2, resource_pb2

from mesh_client.convert import (
    acknowledge_to_proto,
    endpoint_from_proto,
    endpoint_to_proto,
    policy_from_proto,
    policy_to_proto,
    resource_from_proto,
    resource_to_proto,
    subscribe_to_proto,
    update_from_proto,
)
from mesh_client.core.errors import InvalidPolicyError, InvalidValueError
from mesh_client.core.model import Endpoint, Health, Locality, ResourceKind
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.store import (
    Acknowledge,
    EndpointsDelta,
    EndpointsResource,
    PolicyResource,
    Subscribe,
)

POLICIES = resource_pb2.RESOURCE_TYPE_SERVICE_POLICY
ENDPOINTS = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS
A = Endpoint("a", "10.0.0.1", 80, 5, Health.UNHEALTHY, Locality("eu", "eu-1"), {"version": "v1"})


def test_endpoints_and_policies_survive_the_way() -> None:
    assert endpoint_from_proto(endpoint_to_proto(A)) == A
    policy = ServicePolicy(service="orders", timeout=0.25)
    assert policy_from_proto(policy_to_proto(policy)) == policy
    for resource in (
        PolicyResource("orders", "p", policy),
        PolicyResource("orders", "p", policy, provisional=True),
        EndpointsResource("orders", "e", (A,)),
    ):
        assert resource_from_proto(resource_to_proto(resource)) == resource


def test_an_unset_weight_is_one_and_unset_health_is_healthy() -> None:
    endpoint = endpoint_from_proto(endpoint_pb2.Endpoint(id="a", address="10.0.0.1", port=1))
    assert (endpoint.weight, endpoint.health) == (1, Health.HEALTHY)


def test_a_delta_is_taken_over() -> None:
    message = resource_pb2.Resource(name="orders", version="e2")
    message.endpoints_delta.base_version = "e1"
    message.endpoints_delta.upserts.append(endpoint_to_proto(A))
    message.endpoints_delta.removed_ids.append("b")
    assert resource_from_proto(message) == EndpointsDelta("orders", "e2", "e1", (A,), ("b",))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (resource_pb2.Resource(name="Orders"), "DNS label"),
        (resource_pb2.Resource(name="orders"), "resource.body"),
        (
            resource_pb2.Resource(name="orders", policy=policy_pb2.ServicePolicy(service="other")),
            "policy.service: 'other'",
        ),
        (
            resource_pb2.Resource(
                name="orders",
                endpoints=resource_pb2.ServiceEndpoints(endpoints=[endpoint_pb2.Endpoint(id="a", address="0.0.0.0")]),
            ),
            "endpoint.address",
        ),
        (
            resource_pb2.Resource(
                name="orders",
                endpoints=resource_pb2.ServiceEndpoints(endpoints=[endpoint_to_proto(A), endpoint_to_proto(A)]),
            ),
            "unique",
        ),
    ],
)
def test_a_bad_resource_says_what_is_wrong(message: resource_pb2.Resource, expected: str) -> None:
    with pytest.raises(InvalidValueError, match=expected):
        resource_from_proto(message)


def test_a_bad_policy_says_where() -> None:
    message = policy_pb2.ServicePolicy(service="orders")
    message.retry.max_attempts = 99
    with pytest.raises(InvalidPolicyError, match="retry.max_attempts"):
        policy_from_proto(message)


def test_an_unheard_of_health_is_refused() -> None:
    message = endpoint_to_proto(A)
    message.ParseFromString(message.SerializeToString() + b"\x28\x63")
    with pytest.raises(InvalidValueError, match="endpoint.health"):
        endpoint_from_proto(message)


def test_of_a_response_the_good_is_taken_and_the_bad_is_named() -> None:
    update = update_from_proto(
        discovery_pb2.DeltaResourcesResponse(
            type=ENDPOINTS,
            nonce="7",
            removed=["gone"],
            resources=[
                resource_to_proto(EndpointsResource("orders", "e", (A,))),
                resource_to_proto(PolicyResource("misplaced", "p", ServicePolicy(service="misplaced"))),
                resource_pb2.Resource(name="empty"),
            ],
        )
    )
    assert update.kind is ResourceKind.ENDPOINTS
    assert update.resources == (EndpointsResource("orders", "e", (A,)),)
    assert update.removed == ("gone",)
    assert set(update.invalid) == {"misplaced", "empty"}
    assert "type endpoints" in update.invalid["misplaced"]


def test_a_type_of_another_protocol_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="response.type"):
        update_from_proto(discovery_pb2.DeltaResourcesResponse())


def test_requests_say_what_the_store_decided() -> None:
    node = discovery_pb2.Node(id="n")
    request = subscribe_to_proto(Subscribe(ResourceKind.POLICY, ("a",), ("b",), {"a": "p1"}), node)
    assert request == discovery_pb2.DeltaResourcesRequest(
        node=node, type=POLICIES, subscribe=["a"], unsubscribe=["b"], held_versions={"a": "p1"}
    )
    assert acknowledge_to_proto(Acknowledge(ResourceKind.ENDPOINTS, "7", {}, ("a",))) == (
        discovery_pb2.DeltaResourcesRequest(type=ENDPOINTS, response_nonce="7", resync=["a"])
    )
    rejection = acknowledge_to_proto(Acknowledge(ResourceKind.ENDPOINTS, "7", {"a": "bad"}, ()))
    assert rejection.error.message == "1 resources are invalid"
    assert rejection.error.resources == {"a": "bad"}
