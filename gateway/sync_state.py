"""What an edge is told, when, and what is known to be in force there. Pure.

Policy, endpoints and credentials come in; pushes go out, one at a time. A policy that does not fit, or that the edge
refuses, is rejected: the last good one stays in force and goes on to follow the endpoints. What cannot be delivered is
tried again. ``now`` is monotonic seconds throughout.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from gateway.endpoints import routable
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.policy import Backoff
from mesh_client.core.retry import backoff_delay
from mesh_client.core.store import EndpointsResource

QUIET, MAXIMUM = 0.02, 0.2
"""Changes wait this many seconds for further ones, and at most so many: as in the control plane, since drains wait."""
RETRY = Backoff(initial=0.5, max=5.0, multiplier=2.0)
PATIENCE = 5.0
"""Seconds that the control plane has to tell the policy before that of an earlier process is used."""


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A policy of the edge as it is stored."""

    version: str
    """Empty for the policy that exposes nothing, where none is stored."""
    policy: EdgePolicy


@dataclass(frozen=True, slots=True)
class Push:
    """Tell the edge this. The end is told to `Sync.applied`, `Sync.rejected` or `Sync.failed`."""

    generation: int
    policy: PolicyVersion
    endpoints: Mapping[str, EndpointsResource | None]
    """Of the services that the policy names; None for one that the mesh does not know."""


@dataclass(frozen=True, slots=True)
class Observe:
    """Another gateway tells the edge: see that these are gone there. The end is told to `Sync.observed`."""

    generation: int
    gone: Mapping[str, frozenset[str]]
    """Services of the mesh, and their endpoints as ``host:port``."""


class Result(enum.Enum):
    """How the edge stands to what the mesh says."""

    PENDING = "pending"
    """There is something that it has not been told yet."""
    APPLIED = "applied"
    """It has applied the newest policy."""
    REJECTED = "rejected"
    """The newest policy is not obeyed; the last good one is, if there was one."""
    FAILED = "failed"
    """It cannot be told, and that is tried again."""
    STANDBY = "standby"
    """Another gateway tells it."""


@dataclass(frozen=True, slots=True)
class SyncState:
    """Where things stand, for reports."""

    result: Result
    policy_version: str
    """The newest one that is known."""
    applied_version: str
    """The one in force, as far as this gateway told it."""
    reason: str = ""
    """Why it is rejected, or could not be told."""
    endpoints: Mapping[str, str] = field(default_factory=dict)
    """Versions of the endpoints in force, by service of the mesh."""


class Sync:
    """The machine of one edge.

    Args:
        check: what is wrong with a policy, in words, as far as that can be known without endpoints; empty if nothing.
        rng: draws the waits between attempts.
        now: the time.
        quiet: see `QUIET`.
        maximum: see `MAXIMUM`.
    """

    def __init__(
        self,
        check: Callable[[EdgePolicy], str],
        rng: Random,
        now: float,
        *,
        quiet: float = QUIET,
        maximum: float = MAXIMUM,
    ) -> None:
        self._check = check
        self._rng = rng
        self._good: PolicyVersion | None = None
        self._quiet = quiet
        self._maximum = maximum
        self._patient_until = now + PATIENCE
        self._newest: PolicyVersion | None = None
        self._rejection = ""
        self._again_at: float | None = None
        """When the rejected policy is looked at again, because the reason may have passed."""
        self._endpoints: dict[str, EndpointsResource | None] = {}
        self._pushes = False
        self._changed_first: float | None = None
        self._changed_last = now
        self._under_way: Push | Observe | None = None
        self._failures = 0
        self._failure = ""
        self._retry_at = now
        self._settled = 0
        self._in_force: Mapping[str, frozenset[str]] = {}
        """What the edge was told last, or seen to have: endpoints as ``host:port``, by service."""
        self._versions: Mapping[str, str] = {}
        self._applied: str | None = None
        self.generation = 0
        """Grows with each change of what the edge should be told."""

    # -- what comes in

    def recovered(self, good: PolicyVersion) -> None:
        """An earlier process has found a policy good. It is the last good one until there is another."""
        if self._good is None:
            self._good = good

    def policy_changed(self, newest: PolicyVersion, now: float) -> None:
        """The stored policy is another one, or the first is known."""
        if newest == self._newest:
            return
        self._newest, self._again_at = newest, None
        self._rejection = self._check(newest.policy)
        if not self._rejection:
            self._touch(now)

    def endpoints_changed(self, service: str, resource: EndpointsResource | None, now: float) -> None:
        """The endpoints of a service are known; None: the mesh does not know it."""
        if service not in self._endpoints or self._endpoints[service] != resource:
            self._endpoints[service] = resource
            self._touch(now)

    def credentials_changed(self, now: float) -> None:
        """The certificate, its key or the trusted roots are others."""
        self._touch(now)

    def lead(self, now: float, *, pushes: bool) -> None:
        """This gateway tells the edge from now on, or leaves that to another one."""
        if pushes and not self._pushes:
            if isinstance(self._under_way, Observe):
                self._under_way = None
            self._retry_at = now
            self._touch(now)  # What the other one has told is not known for certain.
        self._pushes = pushes

    def lost(self, now: float) -> None:
        """The edge has not got any more what it was told."""
        self._touch(now)

    # -- what goes out

    def due(self, now: float) -> Push | Observe | None:
        """What to begin now. Nothing else begins before its end was told."""
        if self._under_way is not None:
            return None
        self._reconsider(now)
        choice = self._choice(now)
        if choice is None or not self._dirty or now < self._debounced(now):
            return None
        endpoints = {name: self._endpoints[name] for name in choice.policy.upstreams}
        if self._pushes:
            self._under_way = Push(self.generation, choice, endpoints)
        else:
            targets = _targets(endpoints)
            gone = {
                name: lost
                for name, before in self._in_force.items()
                if (lost := before - targets.get(name, frozenset()))
            }
            if not gone:
                self._settle(self.generation, targets)
                return None
            self._under_way = Observe(self.generation, gone)
        self._changed_first = None
        return self._under_way

    def deadline(self, now: float) -> float | None:
        """When `due` should be looked at again by time alone; None: after the next event."""
        if self._under_way is not None:
            return None
        times = []
        if self._again_at is not None:
            times.append(self._again_at)
        if self._newest is None and self._good is not None and now < self._patient_until:
            times.append(self._patient_until)
        if self._dirty and self._choice(now) is not None:
            times.append(self._debounced(now))
        return min(times, default=None)

    def applied(self, now: float) -> None:
        """The edge obeys what was pushed, and nothing else.

        Raises:
            InvalidTransitionError: nothing was.
        """
        push = self._pushed()
        self._good = push.policy
        self._applied = push.policy.version
        self._versions = {name: resource.version for name, resource in push.endpoints.items() if resource is not None}
        self._failures, self._failure, self._retry_at = 0, "", now
        self._settle(push.generation, _targets(push.endpoints))

    def rejected(self, reason: str, now: float, *, again: float | None = None) -> None:
        """What was pushed is refused, by the edge or by what makes its configuration; the edge obeys what it did.

        Args:
            reason: why, without secrets.
            now: the time.
            again: seconds after which the reason may have passed; None: only another policy helps.

        Raises:
            InvalidTransitionError: nothing was pushed.
        """
        push = self._pushed()
        if self._good is not None and push.policy.policy == self._good.policy:
            self._fail(reason, now)  # It was good before: something else is wrong, and may pass.
        elif push.policy == self._newest:
            self._rejection = reason
            self._again_at = None if again is None else now + again

    def failed(self, reason: str, now: float, *, after: float = 0.0) -> None:
        """The edge could not be told; it may obey what it did, or what was pushed.

        Args:
            reason: why, without secrets.
            now: the time.
            after: seconds to wait at least, as the edge asked for.

        Raises:
            InvalidTransitionError: nothing was pushed.
        """
        self._pushed()
        self._fail(reason, now, after)

    def observed(self) -> None:
        """What should be gone is, or it has been waited for long enough.

        Raises:
            InvalidTransitionError: nothing was to be observed, or this gateway pushes itself meanwhile.
        """
        observed = self._under_way
        if not isinstance(observed, Observe):
            raise InvalidTransitionError("nothing was to be observed")
        self._under_way = None
        gone = observed.gone
        self._settle(
            observed.generation, {name: held - gone.get(name, frozenset()) for name, held in self._in_force.items()}
        )

    # -- what others ask

    @property
    def settled(self) -> int:
        """The generation up to which the edge is known to obey.

        Where it was never told anything, there is nothing older. While endpoints are missing that the policy needs,
        those that have come are not waited for either: the others come once these are acknowledged.
        """
        return self._settled if any(map(self._is_complete, self._candidates())) else self.generation

    @property
    def upstreams(self) -> frozenset[str]:
        """Services of the mesh whose endpoints must be known."""
        return frozenset(name for item in self._candidates() for name in item.policy.upstreams)

    def state(self) -> SyncState:
        """Where things stand."""
        newest = "" if self._newest is None else self._newest.version
        if not self._pushes:
            result, reason = Result.STANDBY, ""
        elif self._failures:
            result, reason = Result.FAILED, self._failure
        elif self._rejection:
            result, reason = Result.REJECTED, self._rejection
        elif self._newest is not None and self._good == self._newest and self._applied == newest:
            result, reason = Result.APPLIED, ""
        else:
            result, reason = Result.PENDING, ""
        if self._failures and self._rejection:
            reason = f"{reason}; and version {newest} is rejected: {self._rejection}"
        return SyncState(result, newest, self._applied or "", reason, self._versions)

    # -- inside

    def _touch(self, now: float) -> None:
        self.generation += 1
        if self._changed_first is None:
            self._changed_first = now
        self._changed_last = now

    @property
    def _dirty(self) -> bool:
        return self._settled < self.generation

    def _debounced(self, now: float) -> float:
        first = self._changed_first
        quiet = now if first is None else min(self._changed_last + self._quiet, first + self._maximum)
        return max(quiet, self._retry_at) if self._pushes else quiet

    def _reconsider(self, now: float) -> None:
        if self._again_at is not None and now >= self._again_at and self._newest is not None:
            self._again_at = None
            self._rejection = ""
            self._touch(now)

    def _choice(self, now: float) -> PolicyVersion | None:
        """The policy to push: the newest if it is good, else the last good one; once all its endpoints are known."""
        if self._newest is None and now < self._patient_until:
            return None
        return next(filter(self._is_complete, self._candidates()), None)

    def _candidates(self) -> list[PolicyVersion]:
        newest = None if self._rejection else self._newest
        return [item for item in (newest, self._good) if item is not None]

    def _is_complete(self, item: PolicyVersion) -> bool:
        return all(name in self._endpoints for name in item.policy.upstreams)

    def _settle(self, generation: int, targets: Mapping[str, frozenset[str]]) -> None:
        self._settled = generation
        self._in_force = targets

    def _pushed(self) -> Push:
        push = self._under_way
        if not isinstance(push, Push):
            raise InvalidTransitionError("nothing was pushed")
        self._under_way = None
        return push

    def _fail(self, reason: str, now: float, after: float = 0.0) -> None:
        self._failures += 1
        self._failure = reason
        # At least half of the wait, so that an edge that is down is not asked in a loop.
        delay = backoff_delay(RETRY, min(self._failures, 32), self._rng)
        bound = min(RETRY.initial * RETRY.multiplier ** min(self._failures - 1, 32), RETRY.max)
        self._retry_at = now + max((bound + delay) / 2, after)


def _targets(endpoints: Mapping[str, EndpointsResource | None]) -> dict[str, frozenset[str]]:
    return {
        name: frozenset(endpoint.target for endpoint in routable(resource.endpoints))
        for name, resource in endpoints.items()
        if resource is not None
    }
