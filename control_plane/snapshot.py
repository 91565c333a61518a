"""Frozen state of the mesh at one moment, by resource, with versions that equal content has everywhere. Pure."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from weakref import WeakKeyDictionary

from mesh_client.core.errors import MeshError
from mesh_client.core.model import Endpoint, ResourceKind
from mesh_client.core.policy import ServicePolicy

UNKNOWN_VERSION = ""
"""Stands for a service that the mesh does not know, where a version is meant."""


class InconsistentSnapshotError(MeshError):
    """A snapshot must not be published: it breaks a rule that clients rely on. A defect of the control plane."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PolicyResource:
    """The policy that holds for one service."""

    name: str
    version: str
    policy: ServicePolicy
    size: int
    """Bytes of its JSON form: more than it takes on the wire."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class EndpointsResource:
    """The published endpoints of one service, ordered by id."""

    name: str
    version: str
    endpoints: tuple[Endpoint, ...]
    size: int
    """Bytes, about, that it takes on the wire."""

    def has(self, endpoint_id: str) -> bool:
        """Whether it holds an endpoint of this id."""
        return any(endpoint.id == endpoint_id for endpoint in self.endpoints)


Resource = PolicyResource | EndpointsResource


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class EndpointsDelta:
    """The way from one version of a service's endpoints to another."""

    name: str
    version: str
    """That it leads to."""
    base_version: str
    upserts: tuple[Endpoint, ...]
    removed_ids: tuple[str, ...]
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Every resource. Resources that did not change are the same objects in consecutive snapshots."""

    policies: Mapping[str, PolicyResource]
    endpoints: Mapping[str, EndpointsResource]

    def get(self, kind: ResourceKind, name: str) -> Resource | None:
        """One resource; None for a service that is not known."""
        return self.policies.get(name) if kind is ResourceKind.POLICY else self.endpoints.get(name)


EMPTY = Snapshot(MappingProxyType({}), MappingProxyType({}))


def build_snapshot(
    services: Mapping[str, tuple[Endpoint, ...]],
    policy: Callable[[str], tuple[ServicePolicy, str]],
    previous: Snapshot = EMPTY,
) -> Snapshot:
    """The snapshot of the known services.

    Args:
        services: published endpoints, ordered by id, by service.
        policy: the policy that holds for a service and its version, as `PolicyBook.policy` gives them.
        previous: what is published now; its resources are taken over where their content is the same.
    """
    return Snapshot(
        policies=MappingProxyType(
            {name: _policy_resource(name, *policy(name), previous.policies.get(name)) for name in services}
        ),
        endpoints=MappingProxyType(
            {
                name: _endpoints_resource(name, endpoints, previous.endpoints.get(name))
                for name, endpoints in services.items()
            }
        ),
    )


def check_consistency(snapshot: Snapshot, previous: Snapshot = EMPTY) -> None:
    """Checks what clients rely on; resources that ``previous`` holds too were checked with it.

    Raises:
        InconsistentSnapshotError: a service has only one of policy and endpoints, a resource stands under another name,
            or endpoint ids are not in order and unique.
    """
    if snapshot.policies.keys() != snapshot.endpoints.keys():
        odd = ", ".join(sorted(snapshot.policies.keys() ^ snapshot.endpoints.keys()))
        raise InconsistentSnapshotError(f"{odd}: a service needs both a policy and endpoints")
    for kind, name in changes(previous, snapshot):
        resource = snapshot.get(kind, name)
        if resource is None:
            continue
        if resource.name != name:
            raise InconsistentSnapshotError(f"{name}: its {kind.value} are named {resource.name}")
        if isinstance(resource, PolicyResource):
            if resource.policy.service != name:
                raise InconsistentSnapshotError(f"{name}: its policy is that of {resource.policy.service}")
        else:
            ids = [endpoint.id for endpoint in resource.endpoints]
            if any(left >= right for left, right in itertools.pairwise(ids)):
                raise InconsistentSnapshotError(f"{name}: endpoint ids are not in order and unique")


def changes(before: Snapshot, after: Snapshot) -> Iterator[tuple[ResourceKind, str]]:
    """Kind and name of every resource that is new, gone or another object."""
    for kind, old, new in (
        (ResourceKind.POLICY, before.policies, after.policies),
        (ResourceKind.ENDPOINTS, before.endpoints, after.endpoints),
    ):
        if old is new:
            continue
        for name, resource in new.items():
            if old.get(name) is not resource:
                yield kind, name
        for name in old.keys() - new.keys():
            yield kind, name


def endpoints_delta(base: EndpointsResource, target: EndpointsResource) -> EndpointsDelta | None:
    """The way from ``base`` to ``target``, or None when the whole ``target`` is not larger."""
    old = {endpoint.id: endpoint for endpoint in base.endpoints}
    upserts = tuple(endpoint for endpoint in target.endpoints if old.pop(endpoint.id, None) != endpoint)
    removed_ids = tuple(old)
    size = _HEADER_SIZE + sum(map(_endpoint_size, upserts)) + sum(len(endpoint_id) + 2 for endpoint_id in removed_ids)
    if size >= target.size:
        return None
    return EndpointsDelta(target.name, target.version, base.version, upserts, removed_ids, size)


class DeltaCache:
    """`endpoints_delta`, remembered as long as the target lives: streams that hold the same base share the result."""

    def __init__(self) -> None:
        self._by_target: WeakKeyDictionary[EndpointsResource, dict[str, EndpointsDelta | None]] = WeakKeyDictionary()

    def __call__(self, base: EndpointsResource, target: EndpointsResource) -> EndpointsDelta | None:
        """The delta, or None when the whole is not larger."""
        deltas = self._by_target.setdefault(target, {})
        if base.version not in deltas:
            deltas[base.version] = endpoints_delta(base, target)
        return deltas[base.version]

    def __len__(self) -> int:
        return len(self._by_target)


_HEADER_SIZE = 24
"""Bytes of a delta's base version and framing."""


def _policy_resource(name: str, policy: ServicePolicy, version: str, previous: PolicyResource | None) -> PolicyResource:
    if previous is not None and previous.version == version:
        return previous
    return PolicyResource(name, version, policy, len(policy.model_dump_json()))


def _endpoints_resource(
    name: str, endpoints: tuple[Endpoint, ...], previous: EndpointsResource | None
) -> EndpointsResource:
    if previous is not None and (previous.endpoints is endpoints or previous.endpoints == endpoints):
        return previous
    canonical = json.dumps([_canonical(endpoint) for endpoint in endpoints], separators=(",", ":")).encode()
    version = hashlib.sha256(canonical).hexdigest()[:16]
    return EndpointsResource(name, version, endpoints, sum(map(_endpoint_size, endpoints)))


def _canonical(endpoint: Endpoint) -> list[object]:
    return [
        endpoint.id,
        endpoint.address,
        endpoint.port,
        endpoint.weight,
        endpoint.health.value,
        endpoint.locality.region,
        endpoint.locality.zone,
        sorted(endpoint.metadata.items()),
    ]


def _endpoint_size(endpoint: Endpoint) -> int:
    """Bytes of the protobuf form, within a few: one byte a tag and one a length, names being short."""
    size = 2 + 2 + len(endpoint.id) + 2 + len(endpoint.address) + 4 + 2 + 2
    size += 2 + 2 + len(endpoint.locality.region) + 2 + len(endpoint.locality.zone)
    return size + sum(8 + len(key) + len(value) for key, value in endpoint.metadata.items())
