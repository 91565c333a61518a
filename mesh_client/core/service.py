"""One service as one client sees it: what all calls to it share.

Joins policy and endpoints to pickers, and keeps the breaker, ejections, retry budget and limits.
`mesh_client.core.call` asks it; the shell feeds it and obeys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from mesh_client.core.balancer import Node, Picker, build_picker, next_rebuild
from mesh_client.core.breaker import BreakerState, ServiceBreaker
from mesh_client.core.errors import MeshErrorDetail, Reason
from mesh_client.core.incidents import Incidents, Transition
from mesh_client.core.model import Endpoint, Health, Outcome, StatusCode
from mesh_client.core.outlier import OutlierDetector
from mesh_client.core.policy import (
    Algorithm,
    FaultInjection,
    HashSource,
    RetryPolicy,
    Route,
    ServicePolicy,
    method_matches,
)
from mesh_client.core.rate_limit import ConcurrencyGate
from mesh_client.core.retry import RetryBudget
from mesh_client.core.store import EndpointsResource, PolicyResource, Resolution
from mesh_client.core.tally import ANSWERS, Tally, TallyBook
from mesh_client.core.tap import ServiceTap

NEVER = float("inf")
_SUCCESS, _FAILURE = Outcome.SUCCESS, Outcome.FAILURE


@dataclass(frozen=True, slots=True)
class Subset:
    """One share of a traffic split: the labels, and the running total of weights up to and with it."""

    labels: frozenset[tuple[str, str]]
    upto: int


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """What a route and its service say of one method."""

    timeout: float | None
    retry: RetryPolicy
    retried_codes: frozenset[int]
    fault: FaultInjection | None
    split: tuple[Subset, ...] = ()


class Service:
    """Shared state of all calls of one client to one service. Not thread-safe; one owner drives it.

    Args:
        name: the service.
        zone: the client's own zone, for the same-zone preference; empty for none.
        rng: drives every random choice, so that a seed repeats them.
        now: seconds, monotonic.
        on_transition: told of each change of the breaker's state.
        snapshot_age: seconds since the control plane last confirmed what is held, for explanations.
        control_plane: the state of the discovery stream in words, for explanations.
        identity: the state of this process's certificate in words, for explanations; empty in plaintext.
        on_unreached: told of each attempt that did not reach its endpoint, with the transport's message.
    """

    tap: ServiceTap | None = None
    """Told of each call while somebody looks at them; set by `tapped`."""

    def __init__(
        self,
        name: str,
        *,
        zone: str,
        rng: Random,
        now: float,
        on_transition: Callable[[BreakerState, BreakerState], None] | None = None,
        snapshot_age: Callable[[float], float | None] = lambda now: None,
        control_plane: Callable[[], str] = str,
        identity: Callable[[], str] = str,
        on_unreached: Callable[[Node, str], None] = lambda node, details: None,
    ) -> None:
        self.name = name
        self.snapshot_age = snapshot_age
        self.control_plane = control_plane
        self.identity = identity
        self.on_unreached = on_unreached
        self.rng = rng
        self.resolution = Resolution.PENDING
        self.unreached: str = ""
        """Why nothing is known while the resolution is pending and waiting is pointless; empty while there is hope."""
        self.unreached_reason = Reason.CONTROL_PLANE_NEVER_REACHED
        """The same, for `Call`."""
        self.policy = ServicePolicy(service=name)
        self.policy_version = ""
        self.policy_provisional = False
        self.endpoints_version = ""
        self.picker: Picker = build_picker(self.policy.load_balancer, (), zone=zone, rng=rng, now=now)
        self.incidents = Incidents()
        """What is remembered of what went wrong."""
        self._on_transition = on_transition
        self.budget = RetryBudget(self.policy.retry.budget, now)
        self.breaker = ServiceBreaker(self.policy.circuit_breaker, now, self._breaker_changed)
        self.outliers = OutlierDetector(self.policy.outlier_detection, self.incidents.ejection)
        self.gate = ConcurrencyGate(self.policy.concurrency_limit.max_in_flight)
        self.hash_source: HashSource | None = None
        """Where RING_HASH takes its key from; None while another algorithm balances."""
        self.tallies = TallyBook()
        """What is counted of attempts."""
        self.repeated: dict[str, Tally] = {}
        """What is counted of calls that their first attempt did not end, from its start on; by method."""
        self.repeated_attempts: dict[str, Tally] = {}
        """The part of ``tallies`` that belongs to them, taken out as soon as such a call goes on."""
        self.unattempted: dict[str, Tally] = {}
        """What is counted of calls that failed without an attempt; by method."""
        self.failed_calls: Counter[tuple[str, str, Reason]] = Counter()
        """Calls that failed for good, by method, status and reason; those that never became an attempt included."""
        self._zone = zone
        self._nodes: dict[str, Node] = {}
        self._subset_pickers: dict[frozenset[tuple[str, str]], Picker] = {}
        self._settings: dict[str, MethodSettings] = {}
        self.plain_settings: dict[str, MethodSettings] = {}
        """Settings of the methods whose calls need neither key, metadata, fault nor split; empty unless active, and
        while the service is tapped."""
        self.next_tick = NEVER
        """When `tick` is due."""
        self._slow_start_end: float | None = None
        self.blamed: Node | None = None
        """The only endpoint that the last failed calls tried."""
        self._calls_before = 0
        """Calls that earlier budgets counted, as ``_retries_before``."""
        self._retries_before = 0

    @property
    def calls(self) -> int:
        """Calls since the start that the concurrency limit and the breaker let through."""
        return self._calls_before + self.budget.calls

    @property
    def retries(self) -> int:
        """Retries since the start that the budget granted."""
        return self._retries_before + self.budget.retries

    @property
    def nodes(self) -> Collection[Node]:
        """The endpoints, in order of id."""
        return self._nodes.values()

    def activate(self, policy: PolicyResource, endpoints: EndpointsResource, now: float) -> list[Node]:
        """Obeys a policy and balances over endpoints from now on.

        Returns the nodes that are gone, to be closed with grace.
        """
        first = self.resolution is not Resolution.ACTIVE
        self.resolution = Resolution.ACTIVE
        if policy.version != self.policy_version or first:
            self._obey(policy, now)
        gone = [] if endpoints.version == self.endpoints_version and not first else self._replace(endpoints, first, now)
        self._rebuild(now)
        return gone

    def deactivate(self, resolution: Resolution, now: float) -> list[Node]:
        """The service is not known (any more). Returns the nodes that are gone."""
        gone = list(self._nodes.values())
        self.resolution = resolution
        self.endpoints_version = ""
        self._nodes = {}
        self.plain_settings.clear()
        self._rebuild(now)
        return gone

    def settings(self, method: str, metadata: Iterable[tuple[str, str | bytes]] = ()) -> MethodSettings:
        """What applies to a call of ``method``, a full name with leading slash.

        ``metadata`` is read only where a route matches on it.
        """
        try:
            return self._settings[method]
        except KeyError:
            pass
        candidates = [route for route in self.policy.routes if method_matches(route.method, method)]
        needs_metadata = False
        for route in candidates:
            if route.metadata:
                needs_metadata = True
                held = dict(metadata)
                if any(held.get(key) != value for key, value in route.metadata.items()):
                    continue
            settings = self._resolve(route)
            break
        else:
            settings = self._resolve(Route())
        if not needs_metadata:
            self._settings[method] = settings
            if settings.fault is None and not settings.split and self.hash_source is None and self.tap is None:
                self.plain_settings[method] = settings
        return settings

    def picker_for(self, settings: MethodSettings, now: float) -> Picker:
        """The picker over all endpoints, or over the subset that the split draws."""
        if now >= self.next_tick:
            self.tick(now)
        if not settings.split:
            return self.picker
        draw = self.rng.randrange(settings.split[-1].upto)
        labels = next(subset.labels for subset in settings.split if draw < subset.upto)
        try:
            return self._subset_pickers[labels]
        except KeyError:
            picker = self._subset_pickers[labels] = self._build(
                [node for node in self._nodes.values() if labels <= node.endpoint.metadata.items()], now
            )
            return picker

    def why_no_pick(self, settings: MethodSettings) -> Reason:
        """Why a picker came back empty."""
        return Reason.NO_MATCHING_ENDPOINTS if settings.split and self._nodes else Reason.NO_ENDPOINTS

    def record(self, node: Node, outcome: Outcome, now: float) -> None:
        """Accounts an attempt's outcome to its endpoint, and ejects or restores where that follows.

        An endpoint that has left, or came back elsewhere under its old id, is no longer judged by it.
        """
        if self._nodes.get(node.endpoint.id) is node and self.outliers.record(node.endpoint.id, outcome, now):
            self._rebuild(now)

    def settle(self, breaker: ServiceBreaker, token: int, outcome: Outcome, tried: Sequence[Node], now: float) -> None:
        """Accounts a whole call to the service breaker, unless a new policy has replaced the one that admitted it.

        A row of failures of one endpoint, while others are there, is that endpoint's matter and counts once: the
        breaker opens when the service fails, not when one host does. A failed probe always counts.
        """
        if breaker is not self.breaker:
            return
        if outcome is _SUCCESS:
            self.blamed = None
        elif outcome is _FAILURE:
            alone = len(tried) == 1 and len(self._nodes) > 1 and self.breaker.state(now) is BreakerState.CLOSED
            if alone and tried[0] is self.blamed:
                outcome = Outcome.NEUTRAL
            self.blamed = tried[0] if alone else None
        breaker.settle(token, outcome, now)

    def call_failed(self, code: StatusCode, detail: MeshErrorDetail, took: float | None, now: float) -> None:
        """Counts a call that failed for good; ``took`` are its seconds if it never became an attempt, else None."""
        method = self.tallies.known(detail.method)
        if took is not None:
            self.unattempted.setdefault(method, Tally()).failed(code.name, took)
        key = method, code.name, detail.reason
        self.failed_calls[key] += 1
        if code.name not in ANSWERS:
            self.incidents.failed(key, detail, now)

    def call_goes_on(self, method: str, code: StatusCode, took: float) -> None:
        """Counts an attempt that failed after so many seconds, and did not end its call."""
        self.repeated_attempts.setdefault(self.tallies.known(method), Tally()).failed(code.name, took)

    def call_repeated(self, method: str, code: StatusCode, took: float, last_took: float | None) -> None:
        """Counts a call whose first attempt did not end it: how it ended, and after how many seconds.

        ``last_took`` are the seconds of the attempt that ended it so; None when it ended without another one.
        """
        method = self.tallies.known(method)
        self.repeated.setdefault(method, Tally()).ended(code.name, took)
        if last_took is not None:
            self.repeated_attempts.setdefault(method, Tally()).ended(code.name, last_took)

    def tapped(self, tap: ServiceTap | None) -> None:
        """Calls that begin from now on are told to this tap, or to none."""
        self.tap = tap
        self._settings.clear()
        self.plain_settings.clear()

    def calls_by_method(self) -> dict[str, Tally]:
        """What is counted of whole calls, however many attempts they took; by method. It only grows, as all counters.

        An attempt counts as the call until it turns out that the call goes on.
        """
        calls: dict[str, Tally] = {}
        parts = [(methods, 1) for _, methods in self.tallies]
        for methods, sign in (*parts, (self.repeated_attempts, -1), (self.repeated, 1), (self.unattempted, 1)):
            for method, tally in list(methods.items()):
                calls.setdefault(method, Tally()).add(tally, sign)
        return calls

    def tally(self, node: Node, method: str) -> Tally:
        """Where attempts of a full method name on a node are counted."""
        tally = node.tallies.get(method)
        return self.tallies.tally(node.endpoint.id, method) if tally is None else tally

    def tick(self, now: float) -> None:
        """Does what is due by time alone: ends ejections, compares success rates, ends slow starts."""
        slow_start_due = self._slow_start_end is not None and now >= self._slow_start_end
        if self.outliers.tick(now) or slow_start_due:
            self._rebuild(now)
        else:
            self._schedule(now)

    def _breaker_changed(self, old: BreakerState, new: BreakerState) -> None:
        self.incidents.transition(Transition(self.breaker.changed_at, old, new))
        if self._on_transition is not None:
            self._on_transition(old, new)

    def _obey(self, resource: PolicyResource, now: float) -> None:
        old, new = self.policy, resource.policy
        self.policy, self.policy_version = new, resource.version
        self.policy_provisional = resource.provisional
        self._settings.clear()
        self.plain_settings.clear()
        if new.retry.budget != old.retry.budget:
            self._calls_before, self._retries_before = self.calls, self.retries
            self.budget = RetryBudget(new.retry.budget, now)
        if new.circuit_breaker != old.circuit_breaker:
            self.breaker = ServiceBreaker(new.circuit_breaker, now, self._breaker_changed)
        if new.outlier_detection != old.outlier_detection:
            self.outliers = OutlierDetector(new.outlier_detection, self.incidents.ejection)
            self._account_for(self._nodes, now)
        self.gate.limit = new.concurrency_limit.max_in_flight
        hashes = new.load_balancer.algorithm is Algorithm.RING_HASH
        self.hash_source = new.load_balancer.hash_key.source if hashes else None

    def _replace(self, resource: EndpointsResource, first: bool, now: float) -> list[Node]:
        old = self._nodes
        self._nodes = {endpoint.id: self._node(endpoint, old, first, now) for endpoint in resource.endpoints}
        self.endpoints_version = resource.version
        gone = [node for id_, node in old.items() if self._nodes.get(id_) is not node]
        if any(node.endpoint.id in self._nodes for node in gone):
            # Who comes back elsewhere under an old id has done nothing wrong yet.
            self.outliers.set_endpoints([id_ for id_, node in self._nodes.items() if old.get(id_) is node], now)
        self._account_for(self._nodes, now)
        return gone

    def _account_for(self, nodes: Mapping[str, Node], now: float) -> None:
        self.outliers.set_endpoints(nodes, now)
        for id_, node in nodes.items():
            node.record = self.outliers.record_of(id_)
            node.tallies = self.tallies.of(id_)
        self.tallies.keep(nodes.keys())

    @staticmethod
    def _node(endpoint: Endpoint, old: Mapping[str, Node], first: bool, now: float) -> Node:
        node = old.get(endpoint.id)
        if node is None or node.endpoint.target != endpoint.target:
            return Node(endpoint, added_at=-NEVER if first else now)
        if node.endpoint.health is not Health.HEALTHY and endpoint.health is Health.HEALTHY:
            node.added_at = now  # Back from being unhealthy: it starts slowly again, as in Envoy.
        node.endpoint = endpoint
        return node

    def _rebuild(self, now: float) -> None:
        nodes = list(self._nodes.values())
        for node in nodes:
            node.ejected = node.endpoint.id in self.outliers.ejected
        self.picker = self._build(nodes, now)
        self._subset_pickers = {}
        self._slow_start_end = next_rebuild(self.policy.load_balancer, nodes, now)
        self._schedule(now)

    def _schedule(self, now: float) -> None:
        ticks = (self.outliers.next_tick(now), self._slow_start_end)
        self.next_tick = min((tick for tick in ticks if tick is not None), default=NEVER)

    def _build(self, nodes: Sequence[Node], now: float) -> Picker:
        return build_picker(self.policy.load_balancer, nodes, zone=self._zone, rng=self.rng, now=now)

    def _resolve(self, route: Route) -> MethodSettings:
        retry = route.retry or self.policy.retry
        fault = route.fault or self.policy.fault
        split: list[Subset] = []
        total = 0
        for subset in route.split:
            if subset.weight:
                total += subset.weight
                split.append(Subset(frozenset(subset.labels.items()), total))
        return MethodSettings(
            timeout=route.timeout if route.timeout is not None else self.policy.timeout,
            retry=retry,
            retried_codes=frozenset(map(int, retry.retry_on)),
            fault=fault if fault.delay or fault.abort else None,
            split=tuple(split),
        )
