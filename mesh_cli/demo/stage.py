"""What every scenario works with."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mesh_cli.demo.load import Customers
from mesh_cli.demo.policies import Operator
from mesh_cli.demo.promises import Promise
from mesh_cli.demo.system import System
from mesh_client.core.breaker import BreakerState
from mesh_client.mesh import Mesh
from mesh_client.mesh_state import MeshState, ServiceState

_LOOK_EVERY = 0.02
"""Seconds. Ejections and breakers change with calls and time, which the mesh client tells nobody of."""


class View(Protocol):
    """Where the demo shows what it does."""

    def tell(self, text: str) -> None:
        """One line about what happens now."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How much of everything."""

    rate: float
    """Orders a second in the background."""
    spread_orders: int
    """Orders to measure the spread of one algorithm with."""
    hash_keys: int
    """Customers whose stickiness is measured."""
    orders_between: int
    """Orders before, between and after what is done to the system: seconds times `rate`."""
    refused_calls: int
    """Calls refused by the open breaker whose latency is measured."""
    lease_seconds: float
    """How long to go on after the control plane's restart, so that leases which nobody renews run out; 0: not."""


FULL = Profile(rate=100, spread_orders=300, hash_keys=50, orders_between=200, refused_calls=300, lease_seconds=17)
QUICK = Profile(rate=50, spread_orders=120, hash_keys=20, orders_between=30, refused_calls=100, lease_seconds=0)


@dataclass(frozen=True, slots=True)
class Stage:
    """One running demo."""

    system: System
    mesh: Mesh
    operator: Operator
    customers: Customers
    view: View
    profile: Profile

    def service(self, name: str) -> ServiceState:
        """A service as the customers' own mesh client sees it."""
        return service(self.mesh.state(), name)

    def ejected(self, name: str) -> set[str]:
        """Ids of the endpoints that the customers' mesh client has ejected."""
        return {endpoint.id for endpoint in self.service(name).endpoints if endpoint.ejected}

    def avoids(self, name: str, id: str) -> bool:
        """Whether the customers' mesh client does not call an endpoint: ejected, or not there any more."""
        return all(endpoint.ejected for endpoint in self.service(name).endpoints if endpoint.id == id)

    def breaker(self, name: str) -> BreakerState:
        """State of the customers' breaker of a service."""
        return self.service(name).breaker

    async def until(self, holds: Callable[[], bool], timeout: float) -> float:
        """Seconds until something holds; infinite when it does not within ``timeout``."""
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > timeout:
                return math.inf
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY):
                    await self.mesh.changed()
        return time.monotonic() - began

    async def until_known(self, name: str, id: str, timeout: float = 10.0) -> float:
        """Seconds until the customers' mesh client knows an endpoint; infinite when it does not."""
        return await self.until(lambda: id in {endpoint.id for endpoint in self.service(name).endpoints}, timeout)


class Scenario(Protocol):
    """One thing that goes wrong, or is changed, and what its callers notice."""

    title: str

    async def play(self, stage: Stage) -> list[Promise]:
        """Does it; returns the promises with their figures."""


def service(state: MeshState, name: str) -> ServiceState:
    """One service of a mesh client's state.

    Raises:
        KeyError: it does not follow the service.
    """
    for known in state.services:
        if known.service == name:
            return known
    raise KeyError(name)
