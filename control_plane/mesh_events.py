"""What happens in the mesh, as events: what changed since it was looked at last. Pure.

Each event has the name and the fields of its message in mesh/v1/event.proto.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from control_plane.catalog_service import EndpointRecord
from control_plane.policies import PROVISIONAL
from control_plane.telemetry.recorder import Reporter
from mesh_client.core.model import Endpoint, Health

MANY = 2
"""Processes that have ejected an endpoint, at least, for it to be told; and at least half of those that call it."""
MAX_REJECTIONS = 10
"""Clients of which it is told that they reject one version of a policy: mostly all of them do."""


@dataclass(frozen=True, slots=True)
class EndpointUp:
    """An endpoint takes calls."""

    service: str
    endpoint_id: str
    target: str
    zone: str

    @property
    def key(self) -> str:
        """What it is ordered by."""
        return self.service


@dataclass(frozen=True, slots=True)
class EndpointDown:
    """An endpoint takes no calls any more."""

    service: str
    endpoint_id: str
    target: str
    listed: bool

    @property
    def key(self) -> str:
        """What it is ordered by."""
        return self.service


@dataclass(frozen=True, slots=True)
class EndpointEjected:
    """Several clients do not call an endpoint."""

    service: str
    endpoint_id: str
    clients: int

    @property
    def key(self) -> str:
        """What it is ordered by."""
        return self.service


@dataclass(frozen=True, slots=True)
class PolicyApplied:
    """Another policy is in force."""

    service: str
    version: str

    @property
    def key(self) -> str:
        """What it is ordered by."""
        return self.service


@dataclass(frozen=True, slots=True)
class PolicyRejected:
    """A policy is not obeyed: by a client, or, without one, by nobody, for it is invalid."""

    service: str
    version: str
    node_id: str
    reason: str

    @property
    def key(self) -> str:
        """What it is ordered by."""
        return self.service


@dataclass(frozen=True, slots=True)
class CertificateIssued:
    """A workload got a certificate; ``expires`` in seconds since 1970."""

    spiffe_id: str
    workload_id: str
    serial: str
    expires: float
    renewal: bool

    @property
    def key(self) -> str:
        """What it is ordered by."""
        return self.spiffe_id.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class RootRotated:
    """A step of a rotation of the trust root was taken."""

    step: str
    roots: tuple[str, ...]

    @property
    def key(self) -> str:
        """What it is ordered by."""
        return ""


MeshEvent = (
    EndpointUp | EndpointDown | EndpointEjected | PolicyApplied | PolicyRejected | CertificateIssued | RootRotated
)


class Detector:
    """Finds what happened by comparing what is with what was.

    What it sees first of anything is how things are, and not what happened: whoever begins passes the results over.
    """

    def __init__(self) -> None:
        self._up: dict[str, dict[str, Endpoint]] = {}
        self._policies: dict[str, str] = {}
        self._invalid: dict[str, str] = {}
        self._rejected: dict[str, tuple[str, set[str]]] = {}
        """By service, the version that clients rejected last, and which clients."""
        self._ejected: set[tuple[str, str]] = set()
        self._roots: tuple[tuple[str, ...], str] | None = None

    def endpoints(self, service: str, records: Sequence[EndpointRecord]) -> list[MeshEvent]:
        """Which endpoints of a service began or ended to take calls. An id at another address is another endpoint.

        Args:
            service: its name.
            records: all endpoints that are known of it, those included that are leaving.
        """
        before = self._up.get(service, {})
        after = {each.endpoint.id: each.endpoint for each in records if each.endpoint.health is Health.HEALTHY}
        listed = {each.endpoint.id: each.endpoint.target for each in records}
        found: list[MeshEvent] = [
            EndpointDown(service, name, old.target, listed.get(name) == old.target)
            for name, old in before.items()
            if name not in after or after[name].target != old.target
        ]
        found += [
            EndpointUp(service, name, new.target, new.locality.zone)
            for name, new in after.items()
            if name not in before or before[name].target != new.target
        ]
        if after:
            self._up[service] = after
        else:
            self._up.pop(service, None)
        return found

    def policy(self, service: str, version: str, stored_version: str = "", problem: str = "") -> list[MeshEvent]:
        """Whether another policy of a service is in force, or an invalid one is stored.

        Args:
            service: its name.
            version: of what is in force.
            stored_version: the store's, of an invalid one.
            problem: what is wrong with that; empty when nothing is.
        """
        if problem:
            told = self._invalid.get(service)
            self._invalid[service] = stored_version
            return [] if told == stored_version else [PolicyRejected(service, "", "", problem)]
        self._invalid.pop(service, None)
        # Defaults in place of a policy that is not known are nothing that anybody applied.
        if version.endswith(PROVISIONAL) or self._policies.get(service) == version:
            return []
        self._policies[service] = version
        return [PolicyApplied(service, version)]

    def rejected(self, service: str, version: str, node_id: str, reason: str) -> list[MeshEvent]:
        """A client rejects a version of a service's policy."""
        known, nodes = self._rejected.get(service, ("", set()))
        if known != version:
            nodes = set()
            self._rejected[service] = version, nodes
        if node_id in nodes or len(nodes) >= MAX_REJECTIONS:
            return []
        nodes.add(node_id)
        return [PolicyRejected(service, version, node_id, reason)]

    def ejections(self, reporters: Iterable[Reporter]) -> list[MeshEvent]:
        """Which endpoints are ejected by many, of those that were not when this was asked last."""
        callers: Counter[str] = Counter()
        ejected: Counter[tuple[str, str]] = Counter()
        for reporter in reporters:
            if reporter.connected:
                for called in reporter.called.values():
                    if called.state is not None:
                        callers[called.service] += 1
                        ejected.update((called.service, endpoint_id) for endpoint_id in called.state.ejected)
        many = {
            which: clients for which, clients in ejected.items() if clients >= MANY and 2 * clients >= callers[which[0]]
        }
        found: list[MeshEvent] = [
            EndpointEjected(*which, clients) for which, clients in sorted(many.items()) if which not in self._ejected
        ]
        self._ejected = set(many)
        return found

    def roots(self, fingerprints: Sequence[str], signing: str) -> list[MeshEvent]:
        """Whether a step of a rotation was taken.

        Args:
            fingerprints: of the roots that are trusted now.
            signing: of the one that new certificates lead up to.
        """
        after = tuple(fingerprints)
        before, self._roots = self._roots, (after, signing)
        if before is None or before == (after, signing):
            return []
        roots, signed = before
        # Given roots may change in one go: what was done to the one that signs is what matters.
        if signing != signed:
            step = "overlap"
        elif set(after) - set(roots):
            step = "add"
        else:
            step = "retire"
        return [RootRotated(step, after)]
