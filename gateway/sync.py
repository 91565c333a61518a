"""Keeps one edge in step with the mesh: policy, endpoints and certificates in, pushes out, reports back.

What to do when is decided by `gateway.sync_state`; this shell joins it to a mesh client, to the stream of the edge's
policy, to whatever tells the edge, and to the election among several gateways.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random

from gateway.election_state import Role
from gateway.errors import PushFailedError, PushRejectedError
from gateway.pushing import Pusher
from gateway.sync_state import Observe, PolicyVersion, Push, Result, Sync, SyncState
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import MeshError
from mesh_client.core.store import EndpointsResource
from mesh_client.mesh import Mesh
from mesh_client.tasks import end_tasks

log = logging.getLogger(__name__)

WATCH_AGAIN = 5.0
"""Seconds after a failure to look at the edge."""


class EdgeSync:
    """One edge's gateway.

    Make the mesh client with its `applied`, so that drains wait for the edge.

    Args:
        pusher: tells the edge.
        on_state: told where things stand, at each change.
        rng: draws the waits between attempts.
    """

    def __init__(
        self,
        pusher: Pusher,
        on_state: Callable[[SyncState], None] = lambda _: None,
        *,
        rng: Random | None = None,
    ) -> None:
        self._pusher = pusher
        self._on_state = on_state
        self._loop = asyncio.get_running_loop()
        self._machine = Sync(pusher.check, rng or Random(), self._loop.time())
        self._mesh: Mesh | None = None
        self._watched: set[str] = set()
        self._wake = asyncio.Event()
        self._takes_over = asyncio.Event()
        self._settled: set[asyncio.Future[None]] = set()
        self._generation = 0
        self._state = self._machine.state()

    @property
    def state(self) -> SyncState:
        """Where things stand."""
        return self._machine.state()

    # -- what comes in

    def recovered(self, version: str, policy: EdgePolicy) -> None:
        """An earlier process has found this policy good."""
        self._machine.recovered(PolicyVersion(version, policy))
        self._changed()

    def policy_changed(self, version: str, policy: EdgePolicy) -> None:
        """The policy that the edge is to obey."""
        log.info("the policy of edge %s is version %s, with %d services", policy.edge, version, len(policy.services))
        self._machine.policy_changed(PolicyVersion(version, policy), self._loop.time())
        self._changed()

    def role_changed(self, role: Role) -> None:
        """Among several gateways of this edge, this one is to push, or to stand by."""
        self._machine.lead(self._loop.time(), pushes=role.pushes)
        if role.pushes:
            self._takes_over.set()
        self._changed()

    async def applied(self, services: frozenset[str] = frozenset()) -> None:
        """Returns when the edge obeys all that is known now.

        For ``applied`` of `mesh_client.connect`, and for `mesh_client.identity.Identity.confirm_after`.
        """
        wanted = self._machine.generation
        while self._machine.settled < wanted:
            settled = self._loop.create_future()
            self._settled.add(settled)
            try:
                await settled
            finally:
                self._settled.discard(settled)

    # -- life

    async def run(self, mesh: Mesh) -> None:
        """Keeps the edge in step until it is cancelled.

        Args:
            mesh: an entered client, made with `applied`.
        """
        self._mesh = mesh
        transport = mesh.transport
        self._generation = transport.generation
        unsubscribe = transport.on_change(self._credentials_changed)
        watching = asyncio.create_task(self._watch_edge(), name="watch of the edge")
        try:
            self._changed()
            while True:
                await self._step()
        finally:
            unsubscribe()
            await end_tasks(watching)

    async def _watch_edge(self) -> None:
        while True:
            try:
                await self._pusher.watch(self._lost)
            except Exception:
                # A defect of ours. Not to look at the edge any more would be worse than to try again.
                log.exception("looking at the edge failed")
                await asyncio.sleep(WATCH_AGAIN)

    async def _step(self) -> None:
        now = self._loop.time()
        self._wake.clear()
        self._takes_over.clear()
        action = self._machine.due(now)
        self._tell()
        if isinstance(action, Push):
            await self._push(action)
        elif isinstance(action, Observe):
            await self._observe(action)
        else:
            await self._wait(self._machine.deadline(now))

    async def _wait(self, deadline: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _push(self, push: Push) -> None:
        machine = self._machine
        try:
            await self._pusher.push(push)
        except PushRejectedError as error:
            log.warning("policy %s is rejected: %s", push.policy.version or "that exposes nothing", error)
            machine.rejected(str(error), self._loop.time(), again=error.again)
        except PushFailedError as error:
            self._failed(str(error), error.after)
        except MeshError as error:
            self._failed(str(error))
        except Exception as error:
            # A defect of ours. To stop would be worse than to try again.
            log.exception("telling the edge failed")
            self._failed(f"{type(error).__name__}: {error}")
        else:
            machine.applied(self._loop.time())
        self._changed()

    def _failed(self, reason: str, after: float = 0.0) -> None:
        if reason != self._machine.state().reason:
            log.warning("the edge cannot be told: %s", reason)
        self._machine.failed(reason, self._loop.time(), after=after)

    async def _observe(self, observe: Observe) -> None:
        """Until it is seen, or this gateway is to push itself."""
        observing = asyncio.create_task(self._pusher.observe(observe.gone))
        takes_over = asyncio.create_task(self._takes_over.wait())
        try:
            await asyncio.wait({observing, takes_over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end_tasks(observing, takes_over)
        if not self._takes_over.is_set():
            if error := observing.exception():
                log.error("looking at the edge failed", exc_info=error)
            self._machine.observed()
            self._changed()

    def _credentials_changed(self) -> None:
        if self._mesh is not None and self._mesh.transport.generation != self._generation:
            self._generation = self._mesh.transport.generation
            self._machine.credentials_changed(self._loop.time())
            self._changed()

    def _lost(self) -> None:
        self._machine.lost(self._loop.time())
        self._changed()

    def _changed(self) -> None:
        """Something came in or went out."""
        self._wake.set()
        self._tell()

    def _tell(self) -> None:
        """Watches what is to be watched, and tells who waits."""
        if self._mesh is not None:
            for name in sorted(self._machine.upstreams - self._watched):
                self._watched.add(name)
                self._watch(self._mesh, name)
        for settled in tuple(self._settled):
            if not settled.done():
                settled.set_result(None)
        state = self._machine.state()
        if state != self._state:
            if state.result is Result.REJECTED and self._state.result is not Result.REJECTED:
                log.warning("policy %s is not obeyed: %s", state.policy_version, state.reason)
            self._state = state
            self._on_state(state)

    def _watch(self, mesh: Mesh, name: str) -> None:
        def known(resource: EndpointsResource | None) -> None:
            self._machine.endpoints_changed(name, resource, self._loop.time())
            self._changed()

        mesh.watch_endpoints(name, known)
