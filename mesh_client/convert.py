"""Protobuf to core values and back, on the client's side. What comes in is checked here, and nowhere after."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf import json_format
from mesh.v1 import discovery_pb2, edge_pb2, endpoint_pb2, policy_pb2, resource_pb2

from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import InvalidPolicyError, InvalidValueError
from mesh_client.core.model import Endpoint, Health, Locality, ResourceKind, check_service_name, sorted_endpoints
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.store import (
    Acknowledge,
    EndpointsDelta,
    EndpointsResource,
    PolicyResource,
    Resource,
    Subscribe,
    Update,
)

_TYPES = {
    ResourceKind.POLICY: resource_pb2.RESOURCE_TYPE_SERVICE_POLICY,
    ResourceKind.ENDPOINTS: resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS,
}
_KINDS = {number: kind for kind, number in _TYPES.items()}
_HEALTH = {
    endpoint_pb2.HEALTH_STATUS_UNSPECIFIED: Health.HEALTHY,
    endpoint_pb2.HEALTH_STATUS_HEALTHY: Health.HEALTHY,
    endpoint_pb2.HEALTH_STATUS_UNHEALTHY: Health.UNHEALTHY,
    endpoint_pb2.HEALTH_STATUS_DRAINING: Health.DRAINING,
}
_HEALTH_NUMBERS = {
    Health.HEALTHY: endpoint_pb2.HEALTH_STATUS_HEALTHY,
    Health.UNHEALTHY: endpoint_pb2.HEALTH_STATUS_UNHEALTHY,
    Health.DRAINING: endpoint_pb2.HEALTH_STATUS_DRAINING,
}
MAX_REJECTION = 1024
"""Characters of a rejection's reason that are sent."""


def endpoint_from_proto(message: endpoint_pb2.Endpoint) -> Endpoint:
    """The endpoint that a message states.

    Raises:
        InvalidValueError: a field is outside its range.
    """
    if message.health not in _HEALTH:
        raise InvalidValueError("endpoint.health", message.health, "a HealthStatus of endpoint.proto")
    return Endpoint(
        id=message.id,
        address=message.address,
        port=message.port,
        weight=message.weight or 1,
        health=_HEALTH[message.health],
        locality=Locality(message.locality.region, message.locality.zone),
        metadata=dict(message.metadata),
    )


def endpoint_to_proto(endpoint: Endpoint) -> endpoint_pb2.Endpoint:
    """The message that states an endpoint."""
    return endpoint_pb2.Endpoint(
        id=endpoint.id,
        address=endpoint.address,
        port=endpoint.port,
        weight=endpoint.weight,
        health=_HEALTH_NUMBERS[endpoint.health],
        locality=endpoint_pb2.Locality(region=endpoint.locality.region, zone=endpoint.locality.zone),
        metadata=dict(endpoint.metadata),
    )


def policy_from_proto(message: policy_pb2.ServicePolicy) -> ServicePolicy:
    """The policy that a message states.

    Raises:
        InvalidPolicyError: with the path of each bad field.
    """
    return ServicePolicy.parse(json_format.MessageToDict(message, preserving_proto_field_name=True))


def policy_to_proto(policy: ServicePolicy) -> policy_pb2.ServicePolicy:
    """The message that states a policy, defaults included."""
    return json_format.ParseDict(policy.dump(), policy_pb2.ServicePolicy())


def edge_policy_from_proto(message: edge_pb2.EdgePolicy) -> EdgePolicy:
    """The policy of an edge that a message states.

    Raises:
        InvalidPolicyError: with the path of each bad field.
    """
    return EdgePolicy.parse(json_format.MessageToDict(message, preserving_proto_field_name=True))


def edge_policy_to_proto(policy: EdgePolicy) -> edge_pb2.EdgePolicy:
    """The message that states the policy of an edge, defaults included."""
    return json_format.ParseDict(policy.dump(), edge_pb2.EdgePolicy())


def resource_from_proto(message: resource_pb2.Resource) -> Resource:
    """The resource that a message carries.

    Raises:
        InvalidPolicyError, InvalidValueError: its content is invalid; the message says where.
    """
    service = check_service_name(message.name)
    body = message.WhichOneof("body")
    if body == "policy":
        policy = policy_from_proto(message.policy)
        if policy.service != service:
            raise InvalidValueError("policy.service", policy.service, f"{service!r}, the resource's name")
        return PolicyResource(service, message.version, policy, message.provisional)
    if body == "endpoints":
        endpoints = sorted_endpoints(map(endpoint_from_proto, message.endpoints.endpoints))
        return EndpointsResource(service, message.version, endpoints)
    if body == "endpoints_delta":
        delta = message.endpoints_delta
        return EndpointsDelta(
            service,
            message.version,
            delta.base_version,
            tuple(map(endpoint_from_proto, delta.upserts)),
            tuple(delta.removed_ids),
        )
    raise InvalidValueError("resource.body", body, "policy, endpoints or endpoints_delta")


def resource_to_proto(resource: PolicyResource | EndpointsResource) -> resource_pb2.Resource:
    """The message that carries a whole resource."""
    if isinstance(resource, PolicyResource):
        return resource_pb2.Resource(
            name=resource.service,
            version=resource.version,
            policy=policy_to_proto(resource.policy),
            provisional=resource.provisional,
        )
    return resource_pb2.Resource(
        name=resource.service,
        version=resource.version,
        endpoints=resource_pb2.ServiceEndpoints(endpoints=map(endpoint_to_proto, resource.endpoints)),
    )


def update_from_proto(message: discovery_pb2.DeltaResourcesResponse) -> Update:
    """One discovery response. Resources that are invalid are named in ``Update.invalid``, the others are taken.

    Raises:
        InvalidValueError: the resource type is none that this client knows.
    """
    kind = _KINDS.get(message.type)
    if kind is None:
        raise InvalidValueError("response.type", message.type, "a ResourceType of resource.proto")
    resources: list[Resource] = []
    invalid: dict[str, str] = {}
    for item in message.resources:
        try:
            resource = resource_from_proto(item)
            if isinstance(resource, PolicyResource) is not (kind is ResourceKind.POLICY):
                raise InvalidValueError("resource.body", item.WhichOneof("body"), f"a body of type {kind.value}")
        except (InvalidPolicyError, InvalidValueError) as error:
            invalid[item.name[:64]] = str(error)[:MAX_REJECTION]
        else:
            resources.append(resource)
    return Update(kind, message.nonce, tuple(resources), tuple(message.removed), invalid)


def subscribe_to_proto(
    request: Subscribe, node: discovery_pb2.Node | None = None
) -> discovery_pb2.DeltaResourcesRequest:
    """The request that subscribes; with ``node`` the first one of a stream."""
    return discovery_pb2.DeltaResourcesRequest(
        node=node,
        type=_TYPES[request.kind],
        subscribe=request.subscribe,
        unsubscribe=request.unsubscribe,
        held_versions=dict(request.held_versions),
        resync=request.resync,
    )


def acknowledge_to_proto(answer: Acknowledge) -> discovery_pb2.DeltaResourcesRequest:
    """The request that acknowledges or rejects."""
    request = discovery_pb2.DeltaResourcesRequest(
        type=_TYPES[answer.kind], response_nonce=answer.nonce, resync=answer.resync
    )
    if answer.rejected:
        request.error.message = f"{len(answer.rejected)} resources are invalid"
        request.error.resources.update(answer.rejected)
    return request


def snapshot_to_proto(
    active: Iterable[tuple[PolicyResource, EndpointsResource]],
) -> resource_pb2.CachedSnapshot:
    """What the disk cache keeps."""
    snapshot = resource_pb2.CachedSnapshot()
    for policy, endpoints in active:
        snapshot.policies.append(resource_to_proto(policy))
        snapshot.endpoints.append(resource_to_proto(endpoints))
    return snapshot


def snapshot_from_proto(
    message: resource_pb2.CachedSnapshot,
) -> tuple[list[PolicyResource], list[EndpointsResource]]:
    """What the disk cache kept.

    Raises:
        InvalidPolicyError, InvalidValueError: an entry is invalid.
    """
    policies = [resource_from_proto(item) for item in message.policies]
    endpoints = [resource_from_proto(item) for item in message.endpoints]
    return (
        [item for item in policies if isinstance(item, PolicyResource)],
        [item for item in endpoints if isinstance(item, EndpointsResource)],
    )
