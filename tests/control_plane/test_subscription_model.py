"""A client that follows the protocol ends up with what the server has, whatever happens on the way."""

from __future__ import annotations

from collections import deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from control_plane.events import PolicyDeleted, PolicyStored
from control_plane.policies import PolicyBook
from control_plane.snapshot import (
    EMPTY,
    DeltaCache,
    EndpointsResource,
    PolicyResource,
    build_snapshot,
    changes,
    check_consistency,
)
from control_plane.subscription import Change, ClientNode, Rejection, Request, Response, Subscriptions
from mesh_client.core.model import Endpoint, ResourceKind
from mesh_client.core.policy import ServicePolicy

SERVICES = ["orders", "payments", "stock"]
IDS = [f"endpoint-{number:02}" for number in range(12)]
Content = dict[str, Endpoint] | ServicePolicy


def is_poison(content: Content) -> bool:
    """What the client always rejects."""
    return isinstance(content, dict) and any(endpoint.port == 6666 for endpoint in content.values())


class Client:
    """The client's side of the protocol, by the comments of discovery.proto."""

    def __init__(self) -> None:
        self.held: dict[ResourceKind, dict[str, tuple[str, Content]]] = {kind: {} for kind in ResourceKind}
        self.wanted: set[str] = set()
        self.outbox: deque[Request] = deque()

    def connect(self) -> None:
        self.outbox.clear()
        for kind in ResourceKind:
            held = {name: version for name, (version, _) in self.held[kind].items()}
            self.outbox.append(Request(kind, ClientNode("client"), tuple(sorted(self.wanted)), held_versions=held))

    def subscribe(self, name: str) -> None:
        self.wanted.add(name)
        self.outbox.extend(Request(kind, subscribe=(name,)) for kind in ResourceKind)

    def unsubscribe(self, name: str) -> None:
        self.wanted.discard(name)
        for kind in ResourceKind:
            self.held[kind].pop(name, None)
            self.outbox.append(Request(kind, unsubscribe=(name,)))

    def receive(self, response: Response) -> None:
        held = self.held[response.kind]
        rejected, resync = {}, []
        for change in response.changes:
            name = change.resource.name
            if name not in self.wanted:
                continue
            content = self.content(change, held.get(name))
            if content is None:
                resync.append(name)
            elif is_poison(content):
                rejected[name] = "poison"
            else:
                held[name] = (change.resource.version, content)
        for name in response.removed:
            held.pop(name, None)
        self.outbox.append(
            Request(
                response.kind,
                resync=tuple(resync),
                response_nonce=response.nonce,
                rejection=Rejection("rejected", rejected) if rejected else None,
            )
        )

    @staticmethod
    def content(change: Change, held: tuple[str, Content] | None) -> Content | None:
        resource = change.resource
        if isinstance(resource, PolicyResource):
            return resource.policy
        if change.delta is None:
            return {endpoint.id: endpoint for endpoint in resource.endpoints}
        if held is None or held[0] != change.delta.base_version or isinstance(held[1], ServicePolicy):
            return None
        endpoints = {each: endpoint for each, endpoint in held[1].items() if each not in change.delta.removed_ids}
        return endpoints | {endpoint.id: endpoint for endpoint in change.delta.upserts}


class ProtocolModel(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.book = PolicyBook(ServicePolicy)
        self.services: dict[str, tuple[Endpoint, ...]] = {}
        self.snapshot = EMPTY
        self.client = Client()
        self.connected = False
        self.reconnect()

    def publish(self) -> None:
        before, self.snapshot = self.snapshot, build_snapshot(self.services, self.book.policy, self.snapshot)
        check_consistency(self.snapshot, before)
        for kind, name in changes(before, self.snapshot):
            self.machine.touch(kind, name)

    @rule(service=st.sampled_from(SERVICES), ids=st.sets(st.sampled_from(IDS)), port=st.sampled_from([1, 2, 6666]))
    def replace_endpoints(self, service: str, ids: set[str], port: int) -> None:
        self.services[service] = tuple(Endpoint(each, "127.0.0.1", port) for each in sorted(ids))
        self.publish()

    @rule(service=st.sampled_from(SERVICES), each=st.sampled_from(IDS), port=st.sampled_from([1, 2, 6666]))
    def change_one_endpoint(self, service: str, each: str, port: int) -> None:
        members = {endpoint.id: endpoint for endpoint in self.services.get(service, ())}
        if each in members and members[each].port == port:
            del members[each]
        else:
            members[each] = Endpoint(each, "127.0.0.1", port)
        self.services[service] = tuple(members[name] for name in sorted(members))
        self.publish()

    @rule(service=st.sampled_from(SERVICES))
    def forget_service(self, service: str) -> None:
        self.services.pop(service, None)
        self.publish()

    @rule(service=st.sampled_from(SERVICES), timeout=st.integers(0, 2))
    def change_policy(self, service: str, timeout: int) -> None:
        self.book.apply(
            PolicyStored(service, f"service: {service}\ntimeout: {timeout}s".encode(), "1")
            if timeout
            else PolicyDeleted(service)
        )
        self.publish()

    @rule(service=st.sampled_from(SERVICES))
    def subscribe(self, service: str) -> None:
        self.client.subscribe(service)

    @rule(service=st.sampled_from(SERVICES))
    def unsubscribe(self, service: str) -> None:
        self.client.unsubscribe(service)

    @rule(service=st.sampled_from(SERVICES), kind=st.sampled_from(list(ResourceKind)))
    def lose_what_is_held(self, service: str, kind: ResourceKind) -> None:
        if self.client.held[kind].pop(service, None) is not None:
            self.client.outbox.append(Request(kind, resync=(service,)))

    @rule()
    def reconnect(self) -> None:
        self.machine = Subscriptions(DeltaCache())
        self.inbox: deque[Response] = deque()
        self.unanswered = dict.fromkeys(ResourceKind, 0)
        self.known: dict[ResourceKind, dict[str, bool]] = {
            kind: dict.fromkeys(self.client.held[kind], True) for kind in ResourceKind
        }
        self.known_before: dict[ResourceKind, dict[str, bool]] = {}
        self.subscribed: dict[ResourceKind, set[str]] = {kind: set() for kind in ResourceKind}
        self.client.connect()

    @rule()
    def server_reads(self) -> None:
        if self.client.outbox:
            request = self.client.outbox.popleft()
            if request.response_nonce:
                self.unanswered[request.kind] -= 1
                for name in request.rejection.resources if request.rejection is not None else ():
                    self.known[request.kind][name] = self.known_before[request.kind].get(name, False)
            effect = self.machine.receive(request, 0.0)
            for name in effect.unsubscribed:
                self.known[request.kind].pop(name, None)
            self.subscribed[request.kind] -= set(effect.unsubscribed)
            self.subscribed[request.kind] |= set(effect.subscribed)

    @rule()
    def server_writes(self) -> None:
        for response in self.machine.next_responses(self.snapshot):
            self.unanswered[response.kind] += 1
            assert self.unanswered[response.kind] == 1, "a second response of a type before the first was answered"
            other = ResourceKind.ENDPOINTS if response.kind is ResourceKind.POLICY else ResourceKind.POLICY
            known = self.known[response.kind]
            self.known_before[response.kind] = known.copy()
            for change in response.changes:
                name = change.resource.name
                if response.kind is ResourceKind.ENDPOINTS and name in self.subscribed[other]:
                    assert self.known[other].get(name), "endpoints before their policy"
                known[name] = True
            for name in response.removed:
                if response.kind is ResourceKind.POLICY and name in self.subscribed[other]:
                    assert not self.known[other].get(name), "policy withdrawn before its endpoints"
                known[name] = False
            self.inbox.append(response)

    @rule()
    def client_reads(self) -> None:
        if self.inbox:
            self.client.receive(self.inbox.popleft())

    @rule()
    def settle(self) -> None:
        for _ in range(100):
            while self.client.outbox:
                self.server_reads()
            self.server_writes()
            if not self.inbox:
                break
            while self.inbox:
                self.client_reads()
        else:
            raise AssertionError("the two sides talk without end")
        for kind in ResourceKind:
            held = self.client.held[kind]
            assert held.keys() <= self.client.wanted
            for name in self.client.wanted:
                self.converged(kind, name, held.get(name))

    def converged(self, kind: ResourceKind, name: str, held: tuple[str, Content] | None) -> None:
        resource = self.snapshot.get(kind, name)
        if resource is None:
            assert held is None
            return
        content: Content = (
            {endpoint.id: endpoint for endpoint in resource.endpoints}
            if isinstance(resource, EndpointsResource)
            else resource.policy
        )
        if is_poison(content):
            assert held is None or not is_poison(held[1])
        else:
            assert held == (resource.version, content)

    @invariant()
    def who_holds_an_endpoint_is_known(self) -> None:
        """What a drain relies on: no client calls an endpoint that the server believes it does not have."""
        for name in self.subscribed[ResourceKind.ENDPOINTS]:
            held = self.client.held[ResourceKind.ENDPOINTS].get(name)
            if held is None or any(name in request.unsubscribe for request in self.client.outbox):
                continue
            assert isinstance(held[1], dict)
            for each in held[1]:
                assert self.machine.may_hold_endpoint(name, each)


TestProtocolModel = ProtocolModel.TestCase
TestProtocolModel.settings = settings(stateful_step_count=60)
