"""Services and calls for tests of the core: seeded, without a clock."""

from __future__ import annotations

from random import Random
from typing import Any

from mesh_client.core.model import Endpoint, Health
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.service import Service
from mesh_client.core.store import EndpointsResource, PolicyResource

_versions = iter(range(1_000_000))


def endpoint(name: str, **fields: Any) -> Endpoint:
    """An endpoint whose port follows from its name, so that equal names are equal endpoints."""
    return Endpoint(id=name, address="127.0.0.1", port=1000 + sum(name.encode()), **fields)


def service(*names: str, seed: int = 1, now: float = 0.0, **policy: Any) -> Service:
    """A service named ``orders``, active with endpoints of these names."""
    made = Service("orders", zone="", rng=Random(seed), now=now)
    activate(made, *map(endpoint, names), now=now, **policy)
    return made


def activate(made: Service, *endpoints: Endpoint, now: float = 0.0, **policy: Any) -> list[str]:
    """Gives a service new endpoints and a new policy; ids of the nodes that are gone."""
    resource = PolicyResource("orders", f"p{next(_versions)}", ServicePolicy.parse({"service": "orders", **policy}))
    members = EndpointsResource("orders", f"e{next(_versions)}", tuple(sorted(endpoints, key=lambda each: each.id)))
    return [node.endpoint.id for node in made.activate(resource, members, now)]


UNHEALTHY = Health.UNHEALTHY
