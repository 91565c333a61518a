"""What Consul's answers say: JSON of its HTTP API in, values of the mesh out. Pure.

Every function takes decoded JSON of any shape. A wrong shape of the whole raises `MalformedAnswerError`; a wrong single
registration or document is left out and described, so that it disturbs no other.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.events import Registration
from control_plane.sources import StoredDocument
from mesh_client.core.errors import InvalidValueError, MeshError
from mesh_client.core.model import (
    MAX_METADATA_LENGTH,
    MAX_METADATA_PAIRS,
    MAX_WEIGHT,
    Endpoint,
    Health,
    Locality,
    check_service_name,
)
from mesh_client.core.policy_base import Policy

MESH_TAG = "grpc-mesh"
"""Only services with this tag belong to the mesh."""

_CONSUL = "consul"
_ZONE, _REGION, _DRAINING, _REGISTRATION = "mesh-zone", "mesh-region", "mesh-draining", "mesh-registration"
_MAINTENANCE = ("_node_maintenance", "_service_maintenance:")


class MalformedAnswerError(MeshError):
    """An answer is not of the form that Consul's API documents."""


@dataclass(frozen=True, slots=True)
class ServiceList:
    """An answer of ``/v1/catalog/services``."""

    names: frozenset[str]
    """Services that belong to the mesh."""
    problems: tuple[str, ...]
    empty: bool
    """It names no service at all. A catalog always has Consul's own, so this is never the truth about it."""
    complete: bool
    """Consul's own service is in it, which only those see who may see every service."""


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """An answer of ``/v1/health/service``."""

    endpoints: tuple[Endpoint, ...]
    """Ordered by id."""
    registrations: Mapping[str, Registration]
    """By endpoint id: what the instance says of itself in its meta ``mesh-registration``, else when Consul created the
    registration, which says less: it stays over a registration in place."""
    problems: tuple[str, ...]
    """What is wrong with what is left out."""


def parse_services(answer: object) -> ServiceList:
    """Which services there are, from ``/v1/catalog/services``.

    Raises:
        MalformedAnswerError: the answer has another form.
    """
    if not isinstance(answer, dict):
        raise MalformedAnswerError("expected an object of services and their tags")
    names, problems = set(), []
    for name, tags in answer.items():
        if not isinstance(tags, list):
            raise MalformedAnswerError(f"expected a list of tags for service {str(name)[:80]!r}")
        if MESH_TAG not in tags:
            continue
        try:
            names.add(check_service_name(name))
        except InvalidValueError as error:
            problems.append(str(error))
    return ServiceList(frozenset(names), tuple(problems), not answer, _CONSUL in answer)


def parse_health(answer: object) -> ServiceHealth:
    """The endpoints of a service, from ``/v1/health/service``.

    The service's id is the endpoint's id. Consul's ids are unique per node only: one that several nodes use, or that is
    only the service's name (the default, hence not meant as an id), is followed by ``:`` and the node's name.

    Raises:
        MalformedAnswerError: the answer has another form.
    """
    if not isinstance(answer, list):
        raise MalformedAnswerError("expected a list of instances")
    instances, problems = [], []
    for position, entry in enumerate(answer):
        try:
            instance = _Instance.parse(entry)
        except _FieldError as error:
            problems.append(f"instance {position} of the answer: {error}")
            continue
        if MESH_TAG in instance.tags:
            instances.append(instance)
    uses = Counter(instance.id for instance in instances)
    endpoints: dict[str, Endpoint] = {}
    registrations: dict[str, Registration] = {}
    for instance in instances:
        shared = uses[instance.id] > 1 or instance.id == instance.service
        endpoint_id = f"{instance.id}:{instance.node}" if shared else instance.id
        try:
            endpoint = instance.endpoint(endpoint_id, problems)
        except InvalidValueError as error:
            problems.append(f"instance {instance.id[:80]!r} on node {instance.node[:80]!r}: {error}")
            continue
        if endpoint_id in endpoints:
            problems.append(f"instance {endpoint_id!r} is listed twice; the first one counts")
            continue
        endpoints[endpoint_id] = endpoint
        registrations[endpoint_id] = instance.registration
    ordered = tuple(endpoints[endpoint_id] for endpoint_id in sorted(endpoints))
    return ServiceHealth(ordered, registrations, tuple(problems))


def parse_checks(answer: object) -> dict[tuple[str, str], tuple[str, str]]:
    """Service and status of each check, by node and check id, from ``/v1/health/state/any``.

    Raises:
        MalformedAnswerError: the answer has another form.
    """
    if not isinstance(answer, list):
        raise MalformedAnswerError("expected a list of checks")
    try:
        return {
            (_text(check, "Node"), _text(check, "CheckID")): (_text(check, "ServiceName"), _text(check, "Status"))
            for check in answer
        }
    except _FieldError as error:
        raise MalformedAnswerError(f"a check is not of the expected form: {error}") from None


def policy_prefix(kind: type[Policy]) -> str:
    """Where policies of a kind are in the KV store."""
    return f"mesh/{kind.STORED_AS}/"


def parse_policies(answer: object, prefix: str) -> tuple[dict[str, StoredDocument], tuple[str, ...]]:
    """The stored policies by name, and what is wrong with the keys left out, from a recursive ``/v1/kv`` read.

    Args:
        answer: what Consul said.
        prefix: of the keys.

    Raises:
        MalformedAnswerError: the answer has another form.
    """
    if not isinstance(answer, list):
        raise MalformedAnswerError("expected a list of keys")
    documents: dict[str, StoredDocument] = {}
    problems = []
    for entry in answer:
        try:
            key = _text(entry, "Key")
            index = _whole(entry, "ModifyIndex")
            value = entry.get("Value")
            document = b"" if value is None else base64.b64decode(value, validate=True)
        except (_FieldError, TypeError, ValueError) as error:
            raise MalformedAnswerError(f"a key is not of the expected form: {error}") from None
        name = key.removeprefix(prefix)
        if not name:
            continue  # the folder itself, which Consul's web page makes
        try:
            check_service_name(name)
        except InvalidValueError as error:
            problems.append(f"key {key[:160]!r}: {error}")
            continue
        documents[name] = StoredDocument(name, document, str(index))
    return documents, tuple(problems)


class _FieldError(Exception):
    """A field is missing or of another type."""


@dataclass(frozen=True, slots=True)
class _Instance:
    id: str
    service: str
    node: str
    address: str
    port: int
    weight: int
    tags: tuple[object, ...]
    meta: Mapping[str, object]
    health: Health
    registration: Registration

    @classmethod
    def parse(cls, entry: object) -> _Instance:
        node, service, checks = _object(entry, "Node"), _object(entry, "Service"), _list(entry, "Checks")
        weights, meta = _object(service, "Weights"), _object(service, "Meta")
        return cls(
            id=_text(service, "ID"),
            service=_text(service, "Service"),
            node=_text(node, "Node"),
            address=_text(service, "Address") or _text(node, "Address"),
            port=_whole(service, "Port"),
            weight=_whole(weights, "Passing") if "Passing" in weights else 1,
            tags=tuple(_list(service, "Tags")),
            meta=meta,
            health=_health(checks),
            registration=_registration(service, meta),
        )

    def endpoint(self, endpoint_id: str, problems: list[str]) -> Endpoint:
        """Raises InvalidValueError; what can be left out of the endpoint alone is, and is added to ``problems``."""
        where = f"instance {self.id[:80]!r} on node {self.node[:80]!r}"
        weight = min(max(self.weight, 1), MAX_WEIGHT)
        if weight != self.weight:
            problems.append(f"{where}: weight {self.weight} counts as {weight}")
        labels: dict[str, str] = {}
        for key in sorted(self.meta):
            value = self.meta[key]
            if key in (_ZONE, _REGION, _DRAINING, _REGISTRATION):
                continue
            if not isinstance(value, str) or not key or max(len(key), len(value)) > MAX_METADATA_LENGTH:
                problems.append(
                    f"{where}: meta {key[:80]!r} is left out; expected texts of {MAX_METADATA_LENGTH} at most"
                )
            elif len(labels) == MAX_METADATA_PAIRS:
                problems.append(f"{where}: meta {key[:80]!r} is left out; {MAX_METADATA_PAIRS} pairs are the most")
            else:
                labels[key] = value
        return Endpoint(
            id=endpoint_id,
            address=self.address,
            port=self.port,
            weight=weight,
            health=Health.DRAINING if self.meta.get(_DRAINING) == "true" else self.health,
            locality=self._locality(where, problems),
            metadata=labels,
        )

    def _locality(self, where: str, problems: list[str]) -> Locality:
        try:
            return Locality(region=str(self.meta.get(_REGION, "")), zone=str(self.meta.get(_ZONE, "")))
        except InvalidValueError as error:
            problems.append(f"{where}: {error}; it counts as of no zone")
            return Locality()


def _registration(service: Mapping[str, object], meta: Mapping[str, object]) -> Registration:
    if own := meta.get(_REGISTRATION):
        return Registration(str(own), of_process=True)
    return Registration(str(service.get("CreateIndex", "")))


def _health(checks: list[object]) -> Health:
    health = Health.HEALTHY
    for check in checks:
        if _text(check, "Status") == "critical":
            if _text(check, "CheckID").startswith(_MAINTENANCE):
                return Health.DRAINING
            health = Health.UNHEALTHY
    return health


def _object(parent: object, name: str) -> Mapping[str, object]:
    value = parent.get(name) if isinstance(parent, dict) else None
    if value is None and isinstance(parent, dict) and name in ("Meta", "Weights"):
        return {}
    if not isinstance(value, dict):
        raise _FieldError(f"{name} is missing or not an object")
    return value


def _list(parent: object, name: str) -> list[object]:
    value = parent.get(name) if isinstance(parent, Mapping) else None
    if value is None and isinstance(parent, Mapping):
        return []
    if not isinstance(value, list):
        raise _FieldError(f"{name} is not a list")
    return value


def _text(parent: object, name: str) -> str:
    value = parent.get(name) if isinstance(parent, Mapping) else None
    if not isinstance(value, str):
        raise _FieldError(f"{name} is missing or not a text")
    return value


def _whole(parent: object, name: str) -> int:
    value = parent.get(name) if isinstance(parent, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _FieldError(f"{name} is missing or not a whole number")
    return value
