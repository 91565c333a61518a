"""Leases of the embedded registry: which endpoints are registered, who holds each, and when one is given up. Pure.

A lease is *held* while a stream stands behind it, and *loose* otherwise. Each event returns actions, in the order in
which they are to be done: catalog events to emit, rows to save or delete, streams to end.

    event, lease       none              held                                    loose
    register           new, held        token matches: taken over, else refused  held again
    update             illegal          endpoint replaced                        illegal
    break              illegal          loose, for the lease's grace             illegal
    close              illegal          drained, then gone                       illegal
    drain              nothing          drained                                  drained
    its time passes    -                -                                        gone

A loose lease is taken by whoever registers its id next: its holder with the token keeps the drained mark, somebody else
(the same instance started anew) begins afresh. The token matters for a held lease: it lets an instance whose broken
connection the control plane has not noticed yet take its own lease over.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from control_plane.events import EndpointDrained, ServiceObserved, ServiceVanished
from mesh_client.core.errors import InvalidTransitionError, InvalidValueError, MeshError
from mesh_client.core.model import Endpoint, Health, Locality, sorted_endpoints

SOURCE = "embedded"


class LeaseHeldError(MeshError):
    """Another live stream holds the lease."""

    def __init__(self, service: str, endpoint_id: str, peer: str) -> None:
        super().__init__(
            f"endpoint {endpoint_id} of {service} is registered by another live stream, from {peer}; "
            "give each instance an id of its own, or come back with the lease token"
        )


class LeaseLimitError(MeshError):
    """There are as many leases as there may be."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the registry holds {limit} registrations, which is its limit; deregister some first")


@dataclass(frozen=True, slots=True)
class Lease:
    """One registration."""

    service: str
    endpoint: Endpoint
    token_hash: bytes
    peer: str = ""
    """Address of the connection that registered it, for operators."""
    workload: str = ""
    """The workload that registered it last; empty for one without identity, or with a control plane that did not note
    it."""
    drained: bool = False
    """It asked to leave, and is kept only until its holder goes."""
    holder: int | None = None
    """The stream behind it; None while loose."""
    expires_at: float = 0.0
    """When a loose lease is given up, monotonic seconds. Of no meaning while held."""

    def is_of(self, workload: str, token_hash: bytes | None) -> bool:
        """Whether it is a workload's, or that of whoever shows a token; one that has no workload is everybody's.

        Args:
            workload: who asks.
            token_hash: hash of the lease token that it showed; None when it showed none. An instance that joined anew
                is another workload than the one that registered.
        """
        shown = token_hash is not None and hmac.compare_digest(token_hash, self.token_hash)
        return shown or self.workload in ("", workload)

    @property
    def published(self) -> Endpoint:
        """The endpoint as the catalog shall see it."""
        return replace(self.endpoint, health=Health.DRAINING) if self.drained else self.endpoint


@dataclass(frozen=True, slots=True)
class SaveLease:
    """Store the lease's row, in place of one with its service and id."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class DeleteLease:
    """Delete the lease's row."""

    service: str
    endpoint_id: str


@dataclass(frozen=True, slots=True)
class EndStream:
    """End a stream whose lease was taken over."""

    stream: int


LeaseAction = ServiceObserved | ServiceVanished | EndpointDrained | SaveLease | DeleteLease | EndStream


class LeaseBook:
    """Every lease of one registry.

    Args:
        grace: seconds that a lease outlives its broken stream.
        max_leases: registrations at most.
    """

    def __init__(self, grace: float = 10.0, max_leases: int = 100_000) -> None:
        self._grace = grace
        self._max_leases = max_leases
        self._services: dict[str, dict[str, Lease]] = {}
        self._held: dict[int, tuple[str, str]] = {}
        self._expiries: list[tuple[float, str, str]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def lease(self, service: str, endpoint_id: str) -> Lease | None:
        """The lease of an endpoint, or None."""
        return self._services.get(service, {}).get(endpoint_id)

    def rows(self) -> dict[tuple[str, str], Lease]:
        """Every lease, by service and endpoint id."""
        return {
            (service, endpoint_id): lease
            for service, leases in self._services.items()
            for endpoint_id, lease in leases.items()
        }

    def holds(self, stream: int) -> bool:
        """Whether the stream stands behind a lease now."""
        return stream in self._held

    def next_tick(self) -> float | None:
        """When `tick` has something to do at the earliest, monotonic seconds; None while nothing is loose."""
        return self._expiries[0][0] if self._expiries else None

    def restore(self, leases: Iterable[Lease], now: float, grace: float) -> tuple[LeaseAction, ...]:
        """Takes in what an earlier process stored. Every lease is loose, and kept for ``grace`` seconds.

        Raises:
            InvalidTransitionError: the book is in use already.
        """
        if self._services:
            raise InvalidTransitionError("leases can be restored into an empty book only")
        for lease in leases:
            self._put(replace(lease, holder=None, expires_at=now + grace))
            self._expiries.append((now + grace, lease.service, lease.endpoint.id))
        heapify(self._expiries)
        return tuple(self._observed(service) for service in sorted(self._services))

    def register(
        self,
        stream: int,
        service: str,
        endpoint: Endpoint,
        *,
        token_hash: bytes | None,
        fresh_hash: bytes,
        peer: str,
        workload: str = "",
    ) -> tuple[LeaseAction, ...]:
        """Puts a stream behind an endpoint's lease.

        Args:
            stream: a number that no other stream has.
            service: the service it registers for.
            endpoint: as it states it.
            token_hash: hash of the lease token that it showed; None when it showed none.
            fresh_hash: hash of the token that a new lease shall have. A lease that is resumed keeps its own.
            peer: address of its connection.
            workload: that registers; empty for one without identity.

        Raises:
            InvalidTransitionError: the stream has a lease already.
            LeaseHeldError: another live stream holds the lease, and the token is not its token.
            LeaseLimitError: there are too many leases.
        """
        if stream in self._held:
            raise InvalidTransitionError(f"stream {stream} has a lease already")
        old = self.lease(service, endpoint.id)
        resumed = old is not None and token_hash is not None and hmac.compare_digest(token_hash, old.token_hash)
        if old is None and self._count >= self._max_leases:
            raise LeaseLimitError(self._max_leases)
        if old is not None and old.holder is not None and not resumed:
            raise LeaseHeldError(service, endpoint.id, old.peer)
        actions: list[LeaseAction] = []
        if old is not None and resumed:
            lease = replace(old, endpoint=endpoint, peer=peer, workload=workload, holder=stream)
            if old.holder is not None:
                del self._held[old.holder]
                actions.append(EndStream(old.holder))
        else:
            lease = Lease(service, endpoint, fresh_hash, peer, workload, holder=stream)
            if old is not None and old.drained:
                # The catalog keeps a drained endpoint out until its source stops listing it.
                actions.append(self._remove(service, endpoint.id))
        self._put(lease)
        self._held[stream] = (service, endpoint.id)
        if old is None or lease.published != old.published:
            actions.append(self._observed(service))
        actions.append(SaveLease(lease))
        return tuple(actions)

    def update(self, stream: int, endpoint: Endpoint) -> tuple[LeaseAction, ...]:
        """Replaces the endpoint that a stream registered, such as when its health changes.

        Raises:
            InvalidTransitionError: the stream has no lease.
            InvalidValueError: the id is another than before.
        """
        lease = self._of(stream)
        if endpoint.id != lease.endpoint.id:
            raise InvalidValueError("endpoint.id", endpoint.id, f"{lease.endpoint.id!r}: it is constant over a stream")
        if endpoint == lease.endpoint:
            return ()
        changed = replace(lease, endpoint=endpoint)
        self._put(changed)
        if changed.published == lease.published:
            return (SaveLease(changed),)
        return (self._observed(lease.service), SaveLease(changed))

    def broken(self, stream: int, now: float) -> tuple[LeaseAction, ...]:
        """The stream is gone without a word: its lease is loose, and given up when the grace has passed.

        Raises:
            InvalidTransitionError: the stream has no lease.
        """
        lease = self._of(stream)
        del self._held[stream]
        self._put(replace(lease, holder=None, expires_at=now + self._grace))
        heappush(self._expiries, (now + self._grace, lease.service, lease.endpoint.id))
        return ()

    def closed(self, stream: int) -> tuple[LeaseAction, ...]:
        """The stream deregistered its endpoint.

        Raises:
            InvalidTransitionError: the stream has no lease.
        """
        lease = self._of(stream)
        del self._held[stream]
        service, endpoint_id = lease.service, lease.endpoint.id
        gone = self._remove(service, endpoint_id)
        return (EndpointDrained(service, endpoint_id), gone, DeleteLease(service, endpoint_id))

    def drain(self, service: str, endpoint_id: str) -> tuple[LeaseAction, ...]:
        """Marks an endpoint as leaving for as long as its lease lasts. Does nothing for one that is not registered."""
        lease = self.lease(service, endpoint_id)
        if lease is None or lease.drained:
            return ()
        drained = replace(lease, drained=True)
        self._put(drained)
        return (EndpointDrained(service, endpoint_id), self._observed(service), SaveLease(drained))

    def tick(self, now: float) -> tuple[LeaseAction, ...]:
        """Gives up the loose leases whose time has passed."""
        gone: dict[str, list[str]] = {}
        while self._expiries and self._expiries[0][0] <= now:
            _, service, endpoint_id = heappop(self._expiries)
            lease = self.lease(service, endpoint_id)
            # The entry of a lease that was taken again, or broke anew since, is out of date.
            if lease is not None and lease.holder is None and lease.expires_at <= now:
                self._drop(service, endpoint_id)
                gone.setdefault(service, []).append(endpoint_id)
        actions: list[LeaseAction] = [self._observed(service) for service in gone]
        actions += [DeleteLease(service, endpoint_id) for service, ids in gone.items() for endpoint_id in ids]
        return tuple(actions)

    def _of(self, stream: int) -> Lease:
        if stream not in self._held:
            raise InvalidTransitionError(f"stream {stream} has no lease")
        service, endpoint_id = self._held[stream]
        return self._services[service][endpoint_id]

    def _put(self, lease: Lease) -> None:
        leases = self._services.setdefault(lease.service, {})
        if lease.endpoint.id not in leases:
            self._count += 1
        leases[lease.endpoint.id] = lease

    def _drop(self, service: str, endpoint_id: str) -> None:
        leases = self._services[service]
        del leases[endpoint_id]
        self._count -= 1
        if not leases:
            del self._services[service]

    def _remove(self, service: str, endpoint_id: str) -> ServiceObserved | ServiceVanished:
        self._drop(service, endpoint_id)
        return self._observed(service)

    def _observed(self, service: str) -> ServiceObserved | ServiceVanished:
        leases = self._services.get(service)
        if leases is None:
            return ServiceVanished(SOURCE, service)
        return ServiceObserved(SOURCE, service, sorted_endpoints(lease.published for lease in leases.values()))


def endpoint_to_json(endpoint: Endpoint) -> str:
    """The endpoint as one line of JSON, for a row."""
    return json.dumps(
        {
            "id": endpoint.id,
            "address": endpoint.address,
            "port": endpoint.port,
            "weight": endpoint.weight,
            "health": endpoint.health.value,
            "region": endpoint.locality.region,
            "zone": endpoint.locality.zone,
            "metadata": dict(endpoint.metadata),
        },
        sort_keys=True,
    )


def endpoint_from_json(text: str) -> Endpoint:
    """The endpoint that `endpoint_to_json` wrote.

    Raises:
        ValueError: the text is something else.
    """
    try:
        row = json.loads(text)
        return Endpoint(
            id=row["id"],
            address=row["address"],
            port=row["port"],
            weight=row["weight"],
            health=Health(row["health"]),
            locality=Locality(row["region"], row["zone"]),
            metadata=dict(row["metadata"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an endpoint: {error!r}") from None
