"""Between the protobuf messages of ``mesh.v1`` and the values of the core, in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import assert_never
from weakref import WeakKeyDictionary

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import admin_pb2, discovery_pb2, edge_pb2, endpoint_pb2, policy_pb2, resource_pb2

from control_plane.policies import PROVISIONAL
from control_plane.snapshot import EndpointsDelta, EndpointsResource, PolicyResource, Resource
from control_plane.subscription import Change, ClientNode, ProtocolError, Rejection, Request, Response
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import FieldError, InvalidValueError
from mesh_client.core.model import Endpoint, Health, Locality, ResourceKind
from mesh_client.core.policy import ServicePolicy

_HEALTH_TO_PROTO: dict[Health, endpoint_pb2.HealthStatus.ValueType] = {
    Health.HEALTHY: endpoint_pb2.HEALTH_STATUS_HEALTHY,
    Health.UNHEALTHY: endpoint_pb2.HEALTH_STATUS_UNHEALTHY,
    Health.DRAINING: endpoint_pb2.HEALTH_STATUS_DRAINING,
}
_HEALTH_FROM_PROTO: dict[int, Health] = {
    **{number: health for health, number in _HEALTH_TO_PROTO.items()},
    endpoint_pb2.HEALTH_STATUS_UNSPECIFIED: Health.HEALTHY,
}
_KIND_TO_PROTO: dict[ResourceKind, resource_pb2.ResourceType.ValueType] = {
    ResourceKind.POLICY: resource_pb2.RESOURCE_TYPE_SERVICE_POLICY,
    ResourceKind.ENDPOINTS: resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS,
}
_KIND_FROM_PROTO: dict[int, ResourceKind] = {number: kind for kind, number in _KIND_TO_PROTO.items()}


def locality_from_proto(message: endpoint_pb2.Locality) -> Locality:
    """The value.

    Raises:
        InvalidValueError: a name is not allowed.
    """
    return Locality(message.region, message.zone)


def endpoint_from_proto(message: endpoint_pb2.Endpoint) -> Endpoint:
    """The value; unset health is healthy and unset weight is 1.

    Raises:
        InvalidValueError: a field is outside its range; the path names it.
    """
    health = _HEALTH_FROM_PROTO.get(message.health)
    if health is None:
        raise InvalidValueError("endpoint.health", message.health, "a HealthStatus")
    return Endpoint(
        id=message.id,
        address=message.address,
        port=message.port,
        weight=message.weight or 1,
        health=health,
        locality=locality_from_proto(message.locality),
        metadata=dict(message.metadata),
    )


def endpoint_to_proto(endpoint: Endpoint) -> endpoint_pb2.Endpoint:
    """The message."""
    message = endpoint_pb2.Endpoint(
        id=endpoint.id,
        address=endpoint.address,
        port=endpoint.port,
        weight=endpoint.weight,
        health=_HEALTH_TO_PROTO[endpoint.health],
        metadata=dict(endpoint.metadata),
    )
    if endpoint.locality != _NOWHERE:
        message.locality.region = endpoint.locality.region
        message.locality.zone = endpoint.locality.zone
    return message


_NOWHERE = Locality()


def policy_to_proto(policy: ServicePolicy) -> policy_pb2.ServicePolicy:
    """The message, defaults written out."""
    return json_format.ParseDict(policy.dump(), policy_pb2.ServicePolicy())


def edge_policy_to_proto(policy: EdgePolicy) -> edge_pb2.EdgePolicy:
    """The message, defaults written out."""
    return json_format.ParseDict(policy.dump(), edge_pb2.EdgePolicy())


def policy_from_proto(message: policy_pb2.ServicePolicy) -> ServicePolicy:
    """The value.

    Raises:
        InvalidPolicyError: with the path of every bad field.
    """
    return ServicePolicy.parse(json_format.MessageToDict(message, preserving_proto_field_name=True))


def field_errors_to_proto(errors: Iterable[FieldError]) -> list[admin_pb2.FieldError]:
    """The messages, in order."""
    return [admin_pb2.FieldError(path=error.path, message=error.message) for error in errors]


def kind_to_proto(kind: ResourceKind) -> resource_pb2.ResourceType.ValueType:
    """The resource type."""
    return _KIND_TO_PROTO[kind]


def duration_to_proto(seconds: float) -> Duration:
    """The message; a negative time counts as 0."""
    fraction, whole = math.modf(max(seconds, 0.0))
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def request_from_proto(message: discovery_pb2.DeltaResourcesRequest) -> Request:
    """The request.

    Raises:
        ProtocolError: the type or a part of the node is not allowed.
    """
    kind = _KIND_FROM_PROTO.get(message.type)
    if kind is None:
        raise ProtocolError(
            "type", f"{message.type} is not a resource type; expected SERVICE_POLICY or SERVICE_ENDPOINTS"
        )
    return Request(
        kind=kind,
        node=node_from_proto(message.node) if message.HasField("node") else None,
        subscribe=tuple(message.subscribe),
        unsubscribe=tuple(message.unsubscribe),
        held_versions=dict(message.held_versions),
        resync=tuple(message.resync),
        response_nonce=message.response_nonce,
        rejection=Rejection(message.error.message, dict(message.error.resources))
        if message.HasField("error")
        else None,
    )


def node_from_proto(message: discovery_pb2.Node) -> ClientNode:
    """Who a client says it is.

    Raises:
        ProtocolError: it says so in a way that is not allowed.
    """
    try:
        locality = locality_from_proto(message.locality)
    except InvalidValueError as error:
        raise ProtocolError(f"node.{error.path}", f"expected {error.expected}") from None
    return ClientNode(message.id, message.service, locality, message.user_agent)


class ResponseEncoder:
    """Serialises responses; the bytes of a resource are made once, however many streams it goes to.

    A response is put together from length-delimited fields that were serialised before, which protobuf defines to be
    the same bytes as those of the whole message: https://protobuf.dev/programming-guides/encoding/.

    Args:
        control_plane: name of this control plane in every response.
    """

    def __init__(self, control_plane: str) -> None:
        self._tail = discovery_pb2.DeltaResourcesResponse(control_plane=control_plane).SerializeToString()
        self._heads = {
            kind: discovery_pb2.DeltaResourcesResponse(type=number).SerializeToString()
            for kind, number in _KIND_TO_PROTO.items()
        }
        self._fields: WeakKeyDictionary[Resource | EndpointsDelta, bytes] = WeakKeyDictionary()

    def encode(self, response: Response) -> bytes:
        """A serialised ``DeltaResourcesResponse``."""
        parts = [self._heads[response.kind]]
        parts += [self._field(change) for change in response.changes]
        parts.append(
            discovery_pb2.DeltaResourcesResponse(removed=response.removed, nonce=response.nonce).SerializeToString()
        )
        parts.append(self._tail)
        return b"".join(parts)

    def _field(self, change: Change) -> bytes:
        content = change.resource if change.delta is None else change.delta
        field = self._fields.get(content)
        if field is None:
            message = discovery_pb2.DeltaResourcesResponse(resources=[resource_to_proto(content)])
            field = self._fields[content] = message.SerializeToString(deterministic=True)
        return field


def resource_to_proto(content: Resource | EndpointsDelta) -> resource_pb2.Resource:
    """The message of a whole resource, or of the way to it."""
    message = resource_pb2.Resource(name=content.name, version=content.version)
    match content:
        case PolicyResource():
            message.policy.CopyFrom(policy_to_proto(content.policy))
            message.provisional = content.version.endswith(PROVISIONAL)
        case EndpointsResource():
            # An empty list is content too: a known service without endpoints.
            message.endpoints.SetInParent()
            message.endpoints.endpoints.extend(map(endpoint_to_proto, content.endpoints))
        case EndpointsDelta():
            message.endpoints_delta.base_version = content.base_version
            message.endpoints_delta.upserts.extend(map(endpoint_to_proto, content.upserts))
            message.endpoints_delta.removed_ids.extend(content.removed_ids)
        case _:
            assert_never(content)
    return message
