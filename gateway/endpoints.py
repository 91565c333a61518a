"""Which endpoints of a service an edge is given. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mesh_client.core.model import Endpoint, Health


def routable(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Those that requests may go to: the healthy ones; if there are none, those that fail their checks.

    An edge has no news of its own to judge by, so a service none of whose endpoints passes its checks, as after an
    outage of Consul, is called all the same. Those that are leaving are never called.
    """
    staying = [endpoint for endpoint in endpoints if endpoint.health is not Health.DRAINING]
    healthy = tuple(endpoint for endpoint in staying if endpoint.health is Health.HEALTHY)
    return healthy or tuple(staying)
