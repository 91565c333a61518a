"""Who published an event: what it claims, and what the broker proves.

RabbitMQ lets nobody publish under another user's name (the ``user-id`` property), and users are named like services.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mesh_client.core.caller import Caller
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.events.errors import DeadReason, UnusableEventError
from mesh_client.core.events.topology import CONTROL_PLANE, OPERATOR
from mesh_client.core.identity import Kind, Principal

WORKLOAD = "mesh-workload"
"""Header: which workload of the service published it."""
PUBLISHER = "mesh-publisher"
"""Header of what a group has sent to itself, to wait: as whom the broker had let its publisher in."""

PLAINTEXT = "mesh:"
"""Begins the source of a service that has no identity."""

_WORKLOAD_ID = re.compile(r"[0-9a-f]{16}")
_UNKNOWN_WORKLOAD = "0" * 16


def source_of(principal: Principal | None, service: str) -> str:
    """As whom a process publishes: its SPIFFE ID, or ``mesh:NAME`` in plaintext."""
    if principal is not None:
        return principal.spiffe_id
    return service if service == CONTROL_PLANE else f"{PLAINTEXT}{service}"


def proven_user(user_id: str | None, headers: Mapping[str, object], service: str) -> str | None:
    """As whom the broker let the publisher in; None where it does not say.

    Args:
        user_id: property of the message.
        headers: of the message.
        service: whose group it is: only its own user, and operators, may publish to its groups' exchanges.
    """
    first = headers.get(PUBLISHER)
    return first if user_id in {service, OPERATOR} and isinstance(first, str) else user_id


def check_publisher(
    source: str, user: str | None, headers: Mapping[str, object], trust_domain: str | None
) -> Caller | None:
    """Who published an event.

    Args:
        source: as the event says.
        user: as the broker says.
        headers: of the message.
        trust_domain: of the mesh; None in plaintext, where nobody is anybody.

    Raises:
        UnusableEventError: the two are not the same.
    """
    if trust_domain is None:
        if user is not None and source not in {source_of(None, user), user}:
            raise UnusableEventError(DeadReason.FORGED, f"it is of {user!r}, and says it were of {source!r}")
        return None
    try:
        principal = Principal.parse(source)
    except InvalidValueError as error:
        raise UnusableEventError(DeadReason.FORGED, f"its source is nobody of the mesh: {error}") from None
    if principal.trust_domain != trust_domain or principal.kind is Kind.OPERATOR or principal.caller != user:
        raise UnusableEventError(DeadReason.FORGED, f"it is of {user!r}, and says it were of {source!r}")
    workload = headers.get(WORKLOAD)
    known = isinstance(workload, str) and _WORKLOAD_ID.fullmatch(workload)
    return Caller(principal, str(workload) if known else _UNKNOWN_WORKLOAD)
