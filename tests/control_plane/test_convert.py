"""Between messages and values."""

from __future__ import annotations

import pytest
from mesh.v1 import admin_pb2, discovery_pb2, endpoint_pb2, policy_pb2, resource_pb2

from control_plane.convert import (
    ResponseEncoder,
    duration_to_proto,
    endpoint_from_proto,
    endpoint_to_proto,
    field_errors_to_proto,
    policy_from_proto,
    policy_to_proto,
    request_from_proto,
    resource_to_proto,
)
from control_plane.policies import PolicyBook
from control_plane.snapshot import EndpointsDelta, build_snapshot
from control_plane.subscription import Change, ClientNode, ProtocolError, Rejection, Request, Response
from mesh_client.core.errors import FieldError, InvalidPolicyError, InvalidValueError
from mesh_client.core.model import Endpoint, Health, Locality, ResourceKind
from mesh_client.core.policy import ServicePolicy

ENDPOINT = Endpoint(
    "1", "::1", 1000, weight=7, health=Health.UNHEALTHY, locality=Locality("region", "zone"), metadata={"version": "v2"}
)
SNAPSHOT = build_snapshot(
    {"orders": (Endpoint("0", "127.0.0.1", 1), ENDPOINT), "empty": ()}, PolicyBook(ServicePolicy).policy
)


@pytest.mark.parametrize("endpoint", [ENDPOINT, Endpoint("2", "host.example", 1, health=Health.DRAINING)])
def test_an_endpoint_survives_the_way_there_and_back(endpoint: Endpoint) -> None:
    assert endpoint_from_proto(endpoint_to_proto(endpoint)) == endpoint


def test_unset_health_is_healthy_and_unset_weight_is_one() -> None:
    endpoint = endpoint_from_proto(endpoint_pb2.Endpoint(id="1", address="127.0.0.1", port=1))
    assert (endpoint.health, endpoint.weight) == (Health.HEALTHY, 1)


@pytest.mark.parametrize(
    ("message", "path"),
    [
        (endpoint_pb2.Endpoint(id="1", address="127.0.0.1", port=70_000), "endpoint.port"),
        (endpoint_pb2.Endpoint.FromString(b"\x0a\x011\x12\x09127.0.0.1\x18\x01\x28\x09"), "endpoint.health"),
        (
            endpoint_pb2.Endpoint(id="1", address="::1", port=1, locality=endpoint_pb2.Locality(zone="a b")),
            "locality.zone",
        ),
    ],
)
def test_a_bad_endpoint_is_refused_by_the_path_of_its_field(message: endpoint_pb2.Endpoint, path: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        endpoint_from_proto(message)
    assert caught.value.path == path


def test_a_policy_survives_the_way_there_and_back() -> None:
    policy = ServicePolicy.parse(
        {
            "service": "orders",
            "timeout": "2.5s",
            "retry": {"retry_on": ["UNAVAILABLE", "ABORTED"], "per_try_timeout": "250ms"},
            "routes": [{"method": "a.B/C", "metadata": {"k": "v"}, "split": [{"labels": {"v": "2"}, "weight": 3}]}],
            "fault": {"abort": {"code": "INTERNAL", "percent": 1.5}},
            "rate_limits": [{"requests_per_second": 10}],
        }
    )
    assert policy_from_proto(policy_to_proto(policy)) == policy
    assert policy_from_proto(policy_pb2.ServicePolicy(service="orders")) == ServicePolicy(service="orders")


def test_a_bad_policy_is_refused_by_the_path_of_its_field() -> None:
    with pytest.raises(InvalidPolicyError, match=r"retry\.max_attempts"):
        policy_from_proto(policy_pb2.ServicePolicy(service="orders", retry=policy_pb2.RetryPolicy(max_attempts=99)))


@pytest.mark.parametrize(("seconds", "expected"), [(1.5, (1, 500_000_000)), (0.0, (0, 0)), (-3.0, (0, 0))])
def test_durations(seconds: float, expected: tuple[int, int]) -> None:
    duration = duration_to_proto(seconds)
    assert (duration.seconds, duration.nanos) == expected


def test_field_errors_keep_their_order() -> None:
    assert field_errors_to_proto([FieldError("a", "1"), FieldError("b", "2")]) == [
        admin_pb2.FieldError(path="a", message="1"),
        admin_pb2.FieldError(path="b", message="2"),
    ]


class TestRequests:
    def test_every_field_arrives(self) -> None:
        message = discovery_pb2.DeltaResourcesRequest(
            node=discovery_pb2.Node(
                id="id", service="web", locality=endpoint_pb2.Locality(region="r", zone="z"), user_agent="a/1"
            ),
            type=resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS,
            subscribe=["a", "b"],
            unsubscribe=["c"],
            held_versions={"a": "1"},
            resync=["d"],
            response_nonce="7",
            error=discovery_pb2.Rejection(message="no", resources={"a": "bad"}),
        )
        assert request_from_proto(message) == Request(
            ResourceKind.ENDPOINTS,
            ClientNode("id", "web", Locality("r", "z"), "a/1"),
            ("a", "b"),
            ("c",),
            {"a": "1"},
            ("d",),
            "7",
            Rejection("no", {"a": "bad"}),
        )

    @pytest.mark.parametrize(
        ("data", "field"),
        [(b"", "type"), (b"\x10\x09", "type"), (b"\x10\x01\x0a\x05\x1a\x03\x12\x01 ", "node.locality.zone")],
    )
    def test_what_has_no_meaning_is_refused_by_name(self, data: bytes, field: str) -> None:
        with pytest.raises(ProtocolError) as caught:
            request_from_proto(discovery_pb2.DeltaResourcesRequest.FromString(data))
        assert caught.value.field == field


class TestResponses:
    DELTA = EndpointsDelta("orders", "v2", "v1", (ENDPOINT,), ("0",), 1)

    def test_an_encoded_response_is_the_message(self) -> None:
        orders, empty = SNAPSHOT.endpoints["orders"], SNAPSHOT.endpoints["empty"]
        response = Response(
            ResourceKind.ENDPOINTS, "17", (Change(orders), Change(empty), Change(orders, self.DELTA)), ("gone", "lost")
        )
        message = discovery_pb2.DeltaResourcesResponse.FromString(ResponseEncoder("cp-1").encode(response))
        assert message == discovery_pb2.DeltaResourcesResponse(
            type=resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS,
            resources=[resource_to_proto(orders), resource_to_proto(empty), resource_to_proto(self.DELTA)],
            removed=["gone", "lost"],
            nonce="17",
            control_plane="cp-1",
        )

    def test_a_known_service_without_endpoints_has_a_body(self) -> None:
        message = resource_to_proto(SNAPSHOT.endpoints["empty"])
        assert message.WhichOneof("body") == "endpoints"
        assert message.version == SNAPSHOT.endpoints["empty"].version

    def test_a_delta_names_its_base(self) -> None:
        message = resource_to_proto(self.DELTA)
        assert (message.name, message.version, message.endpoints_delta.base_version) == ("orders", "v2", "v1")
        assert list(message.endpoints_delta.removed_ids) == ["0"]
        assert message.endpoints_delta.upserts[0].id == "1"

    def test_a_policy_is_sent_with_its_defaults(self) -> None:
        message = resource_to_proto(SNAPSHOT.policies["orders"])
        assert message.policy.circuit_breaker.consecutive_failures == 5

    def test_a_resource_is_serialised_once_for_all_streams(self) -> None:
        encoder = ResponseEncoder("cp")
        resource = SNAPSHOT.endpoints["orders"]
        first = encoder.encode(Response(ResourceKind.ENDPOINTS, "1", (Change(resource),), ()))
        # Not what an encoder does to its input: it shows that the second response is not made from it again.
        object.__setattr__(resource, "endpoints", ())
        second = encoder.encode(Response(ResourceKind.ENDPOINTS, "1", (Change(resource),), ()))
        object.__setattr__(resource, "endpoints", (Endpoint("0", "127.0.0.1", 1), ENDPOINT))
        assert first == second

    def test_sizes_are_near_what_goes_over_the_wire(self) -> None:
        resource = SNAPSHOT.endpoints["orders"]
        actual = resource_to_proto(resource).endpoints.ByteSize()
        assert actual * 0.8 <= resource.size <= actual * 1.5
