"""One discovery stream's subscriptions: who holds what, what is sent next, what an answer means. Pure.

Modelled on xDS incremental ADS (https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from control_plane.snapshot import (
    UNKNOWN_VERSION,
    EndpointsDelta,
    EndpointsResource,
    Resource,
    Snapshot,
    endpoints_delta,
)
from mesh_client.core.errors import InvalidTransitionError, InvalidValueError
from mesh_client.core.model import Locality, ResourceKind, StatusCode, check_service_name

MAX_SUBSCRIPTIONS = 10_000
"""On one stream, both types together."""
MAX_RESPONSE_SIZE = 1024 * 1024
"""Bytes, about, after which a response takes no further resource; gRPC clients refuse messages above 4 MiB."""
MAX_REJECTION_LENGTH = 4096
_MAX_ID_LENGTH = 256
_MAX_VERSION_LENGTH = 64


class ProtocolError(InvalidTransitionError):
    """A request breaks the protocol; the stream ends with ``code``.

    Attributes:
        code: INVALID_ARGUMENT, or RESOURCE_EXHAUSTED past a limit.
        field: path of the request's field.
    """

    def __init__(self, field: str, message: str, code: StatusCode = StatusCode.INVALID_ARGUMENT) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.code = code


@dataclass(frozen=True, slots=True)
class ClientNode:
    """Who a client says it is."""

    id: str
    service: str = ""
    locality: Locality = field(default_factory=Locality)
    user_agent: str = ""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a response was rejected; no resources mean all of them."""

    message: str
    resources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a client, about one kind of resources."""

    kind: ResourceKind
    node: ClientNode | None = None
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    held_versions: Mapping[str, str] = field(default_factory=dict)
    resync: tuple[str, ...] = ()
    response_nonce: str = ""
    rejection: Rejection | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """What a request changed."""

    subscribed: tuple[str, ...] = ()
    unsubscribed: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    """Resources of the response that it acknowledged or rejected."""


@dataclass(frozen=True, slots=True)
class Change:
    """One resource of a response: whole, or the way to it from what the client holds."""

    resource: Resource
    delta: EndpointsDelta | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One response to send."""

    kind: ResourceKind
    nonce: str
    changes: tuple[Change, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SubscriptionState:
    """One subscription as operators see it."""

    kind: ResourceKind
    service: str
    acknowledged_version: str
    """Empty when nothing, or that the service is unknown, was acknowledged."""
    acknowledged_at: float | None
    rejected_version: str | None
    rejection: str


@dataclass(slots=True)
class _Subscription:
    acknowledged: str | None = None
    """Version that the client holds; UNKNOWN_VERSION: it was told that there is none; None: nothing is known."""
    resource: Resource | None = None
    """The resource of that version, as the base of deltas."""
    acknowledged_at: float | None = None
    sent: str | None = None
    """Version sent last, answered or not."""
    unsure: bool = False
    """It may hold something that is not known: it asked for the whole, or subscribed while a response was under way."""
    rejected: str | None = None
    rejection: str = ""


@dataclass(slots=True)
class _Flight:
    """The response that is not answered yet."""

    nonce: str
    resources: dict[str, Resource | None]


@dataclass(slots=True)
class _Lane:
    """Everything about one kind."""

    subscriptions: dict[str, _Subscription] = field(default_factory=dict)
    dirty: dict[str, None] = field(default_factory=dict)
    """Names to look at when the lane is free, the longest waiting first. Changes meanwhile conflate here."""
    flight: _Flight | None = None
    begun: bool = False
    greeted: bool = False
    """A response was sent. The first request is always answered, if by nothing new: what is held is current then."""

    @property
    def pending(self) -> bool:
        """Whether there may be something to send, and it may be sent."""
        return self.flight is None and (bool(self.dirty) or (self.begun and not self.greeted))


DeltaFunction = Callable[[EndpointsResource, EndpointsResource], EndpointsDelta | None]


class Subscriptions:
    """The machine of one stream.

    Feed it `receive` for each request and `touch` for each published change; `next_responses` says what to send. It
    holds one set of names and one unanswered response per kind, however slow the client is.

    Args:
        delta: makes deltas; the default does so each time, a stream hub passes one that many streams share.
        max_subscriptions: limit over both kinds, at least 1.
    """

    def __init__(self, delta: DeltaFunction = endpoints_delta, max_subscriptions: int = MAX_SUBSCRIPTIONS) -> None:
        self._delta = delta
        self._max_subscriptions = max_subscriptions
        self._lanes = {kind: _Lane() for kind in ResourceKind}
        self._nonce = 0
        self.node: ClientNode | None = None
        """None until the first request."""

    def receive(self, request: Request, now: float) -> Effect:
        """Takes in one request. An unknown or outdated nonce is ignored, the rest of its request is not.

        Raises:
            ProtocolError: the request is illegal; nothing is changed.
        """
        lane = self._lanes[request.kind]
        self._check(request, lane)
        if self.node is None:
            self.node = request.node
        lane.begun = True
        answered = self._answer(lane, request, now) if request.response_nonce else ()
        if not (request.subscribe or request.unsubscribe or request.resync):
            return Effect(answered=answered)
        unsubscribed = self._unsubscribe(lane, request.unsubscribe)
        subscribed = self._subscribe(lane, request.subscribe, request.held_versions)
        for name in request.resync:
            self._resync(lane, name)
        return Effect(subscribed, unsubscribed, answered)

    def touch(self, kind: ResourceKind, name: str) -> None:
        """The published resource changed. Harmless for a name that is not subscribed to."""
        lane = self._lanes[kind]
        if name in lane.subscriptions:
            lane.dirty[name] = None

    def ready(self) -> bool:
        """Whether `next_responses` may have something to say."""
        return any(lane.pending for lane in self._lanes.values())

    def next_responses(self, snapshot: Snapshot) -> list[Response]:
        """What to send now, in order; it counts as sent.

        Of a service that appears the policy goes first, of one that disappears the endpoints.
        """
        responses = []
        # A third turn: policies whose withdrawal waited for that of the endpoints.
        for kind in (ResourceKind.POLICY, ResourceKind.ENDPOINTS, ResourceKind.POLICY):
            lane = self._lanes[kind]
            if lane.pending and (response := self._respond(kind, lane, snapshot)) is not None:
                responses.append(response)
        return responses

    def may_hold_endpoint(self, service: str, endpoint_id: str) -> bool:
        """Whether the client may have an endpoint: acknowledged, under way, or unknown because it held it before."""
        lane = self._lanes[ResourceKind.ENDPOINTS]
        subscription = lane.subscriptions.get(service)
        if subscription is None:
            return False
        under_way = lane.flight.resources.get(service) if lane.flight is not None else None
        if isinstance(under_way, EndpointsResource) and under_way.has(endpoint_id):
            return True
        if not subscription.acknowledged:
            return subscription.unsure
        held = subscription.resource
        return not isinstance(held, EndpointsResource) or held.has(endpoint_id)

    def states(self) -> list[SubscriptionState]:
        """Every subscription, ordered by service."""
        states = [
            SubscriptionState(
                kind,
                name,
                subscription.acknowledged or "",
                subscription.acknowledged_at,
                subscription.rejected,
                subscription.rejection,
            )
            for kind, lane in self._lanes.items()
            for name, subscription in lane.subscriptions.items()
        ]
        states.sort(key=lambda state: state.service)
        return states

    def _check(self, request: Request, lane: _Lane) -> None:
        if self.node is None:
            if request.node is None:
                raise ProtocolError("node", "is required in the first request of a stream")
            _check_node(request.node)
        elif request.node is not None and request.node != self.node:
            raise ProtocolError("node", "must not change within a stream")
        if request.rejection is not None and not request.response_nonce:
            raise ProtocolError("error", "is set without the response_nonce that it rejects")
        if request.held_versions:
            if lane.begun:
                raise ProtocolError("held_versions", "belongs into the first request of a type only")
            self._check_held(request.held_versions)
        for path, names in (("subscribe", request.subscribe), ("resync", request.resync)):
            for index, name in enumerate(names):
                if name not in lane.subscriptions:
                    _check_name(f"{path}[{index}]", name)
        if request.subscribe:
            new = {name for name in request.subscribe if name not in lane.subscriptions}
            self._check_limit("subscribe", sum(len(each.subscriptions) for each in self._lanes.values()) + len(new))
        if request.resync:
            after = lane.subscriptions.keys() - set(request.unsubscribe) | set(request.subscribe)
            for index, name in enumerate(request.resync):
                if name not in after:
                    raise ProtocolError(f"resync[{index}]", f"{name} is not subscribed to")

    def _check_held(self, held: Mapping[str, str]) -> None:
        self._check_limit("held_versions", len(held))
        for name, version in held.items():
            _check_name("held_versions", name)
            if not 1 <= len(version) <= _MAX_VERSION_LENGTH:
                raise ProtocolError(
                    f"held_versions[{name}]", f"expected a version of 1 to {_MAX_VERSION_LENGTH} characters"
                )

    def _check_limit(self, path: str, count: int) -> None:
        if count > self._max_subscriptions:
            raise ProtocolError(
                path,
                f"{count} subscriptions are more than the {self._max_subscriptions} that one stream may have",
                StatusCode.RESOURCE_EXHAUSTED,
            )

    @staticmethod
    def _answer(lane: _Lane, request: Request, now: float) -> tuple[str, ...]:
        flight = lane.flight
        if flight is None or flight.nonce != request.response_nonce:
            return ()
        lane.flight = None
        rejection = request.rejection
        rejected: Collection[str] = ()
        if rejection is not None:
            rejected = rejection.resources or flight.resources
        for name, resource in flight.resources.items():
            subscription = lane.subscriptions[name]
            version = UNKNOWN_VERSION if resource is None else resource.version
            if rejection is not None and name in rejected:
                reason = rejection.resources.get(name) or rejection.message
                subscription.rejected = version
                subscription.rejection = reason[:MAX_REJECTION_LENGTH]
            else:
                subscription.acknowledged = version
                subscription.resource = resource
                subscription.acknowledged_at = now
                subscription.rejected = None
                subscription.rejection = ""
                subscription.unsure = False
        return tuple(flight.resources)

    @staticmethod
    def _unsubscribe(lane: _Lane, names: tuple[str, ...]) -> tuple[str, ...]:
        gone = []
        for name in names:
            if lane.subscriptions.pop(name, None) is None:
                continue
            gone.append(name)
            lane.dirty.pop(name, None)
            if lane.flight is not None:
                # Its answer says nothing about the subscription that may follow.
                lane.flight.resources.pop(name, None)
        return tuple(gone)

    @staticmethod
    def _subscribe(lane: _Lane, names: tuple[str, ...], held: Mapping[str, str]) -> tuple[str, ...]:
        new = []
        for name in names:
            if name in lane.subscriptions:
                continue
            version = held.get(name)
            # A response under way may belong to an earlier subscription; the client would take it for this one's.
            under_way = lane.flight is not None
            lane.subscriptions[name] = _Subscription(acknowledged=version, sent=version, unsure=under_way)
            lane.dirty[name] = None
            new.append(name)
        return tuple(new)

    @staticmethod
    def _resync(lane: _Lane, name: str) -> None:
        subscription = lane.subscriptions[name]
        lane.subscriptions[name] = dataclasses.replace(
            subscription, acknowledged=None, resource=None, rejected=None, rejection="", unsure=True
        )
        lane.dirty[name] = None
        if lane.flight is not None:
            lane.flight.resources.pop(name, None)

    def _respond(self, kind: ResourceKind, lane: _Lane, snapshot: Snapshot) -> Response | None:
        changes: list[Change] = []
        removed: list[str] = []
        flight: dict[str, Resource | None] = {}
        size = 0
        for name in tuple(lane.dirty):
            subscription = lane.subscriptions[name]
            resource = snapshot.get(kind, name)
            version = UNKNOWN_VERSION if resource is None else resource.version
            if subscription.acknowledged == version:
                # The base of the next delta, also where the client only said which version it held.
                subscription.resource = resource
                # What was sent since was rejected, so that this is where the client is.
                subscription.sent = version
                lane.dirty.pop(name, None)
                continue
            if subscription.rejected == version:
                lane.dirty.pop(name, None)
                continue
            if not self._is_turn(kind, name, present=resource is not None):
                continue
            if resource is None:
                removed.append(name)
            else:
                change = self._change(subscription, resource)
                cost = resource.size if change.delta is None else change.delta.size
                if size and size + cost > MAX_RESPONSE_SIZE:
                    break
                size += cost
                changes.append(change)
            flight[name] = resource
            subscription.sent = version
            lane.dirty.pop(name, None)
        if not flight and (lane.greeted or lane.dirty):
            return None
        lane.greeted = True
        self._nonce += 1
        lane.flight = _Flight(str(self._nonce), flight)
        return Response(kind, lane.flight.nonce, tuple(changes), tuple(removed))

    def _is_turn(self, kind: ResourceKind, name: str, present: bool) -> bool:
        """Whether the other kind does not have to go first, where the client subscribes to both."""
        if present == (kind is ResourceKind.POLICY):
            return True
        other = self._lanes[
            ResourceKind.ENDPOINTS if kind is ResourceKind.POLICY else ResourceKind.POLICY
        ].subscriptions.get(name)
        return other is None or bool(other.sent) == present

    def _change(self, subscription: _Subscription, resource: Resource) -> Change:
        base = subscription.resource
        if isinstance(base, EndpointsResource) and isinstance(resource, EndpointsResource):
            return Change(resource, self._delta(base, resource))
        return Change(resource)


def _check_name(path: str, name: str) -> None:
    try:
        check_service_name(name)
    except InvalidValueError as error:
        raise ProtocolError(path, f"{name[:80]!r} is not allowed; expected {error.expected}") from None


def _check_node(node: ClientNode) -> None:
    # Logs and terminals show them: a line break or an escape would be obeyed there.
    if not 1 <= len(node.id) <= _MAX_ID_LENGTH or not node.id.isprintable():
        raise ProtocolError("node.id", f"expected 1 to {_MAX_ID_LENGTH} printable characters")
    if len(node.user_agent) > _MAX_ID_LENGTH or not node.user_agent.isprintable():
        raise ProtocolError("node.user_agent", f"expected at most {_MAX_ID_LENGTH} printable characters")
    if node.service:
        _check_name("node.service", node.service)
