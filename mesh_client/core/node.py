"""One endpoint as this client sees it, and what every balancing algorithm offers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from mesh_client.core.load import EndpointLoad
from mesh_client.core.outlier import EndpointRecord
from mesh_client.core.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Collection

    from mesh_client.core.model import Endpoint


class Node:
    """One endpoint as this client sees it. It outlives pickers and is compared and hashed by identity.

    Attributes:
        endpoint: what the control plane says; replaced when that changes.
        load: live load.
        added_at: when this client first saw it, for slow start; ``-inf`` for members of the first snapshot.
        ejected: set by outlier handling.
        connection: belongs to the shell.
        record: what outlier detection counts of it.
        tallies: what is counted of its attempts, by method; `Service.tally` makes those that are missing.
        ring_points: cache of the endpoint's points on a hash ring, made when first needed.
    """

    __slots__ = ("added_at", "connection", "ejected", "endpoint", "load", "record", "ring_points", "tallies")

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        load: EndpointLoad | None = None,
        added_at: float = -math.inf,
        connection: object = None,
    ) -> None:
        self.endpoint = endpoint
        self.load = EndpointLoad() if load is None else load
        self.added_at = added_at
        self.ejected = False
        self.connection = connection
        self.record = EndpointRecord(0.0)
        self.tallies: dict[str, Tally] = {}
        self.ring_points: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"<Node {self.endpoint.id} at {self.endpoint.target}>"


class Picker(Protocol):
    """Chooses the endpoint of an attempt. Its nodes never change: a new set of nodes is a new picker."""

    def pick(self, key: str | None, excluded: Collection[Node], now: float) -> Node | None:
        """The node to call; None only when there are none.

        Args:
            key: what RING_HASH hashes; the other algorithms ignore it.
            excluded: nodes that this call has tried; avoided while there is another, ignored otherwise.
            now: seconds on the caller's monotonic clock.
        """
        ...
