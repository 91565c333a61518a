"""The real server's machine and the real client's store, joined by the protobuf messages that go over the wire.

Whatever happens on the way, the client ends up with what the server publishes. Beside `test_subscription_model`, whose
client is written by the comments of the protos, this one holds both implementations and both conversions together.
"""

from __future__ import annotations

import enum
from collections import deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mesh.v1 import discovery_pb2, resource_pb2

from control_plane.convert import ResponseEncoder, request_from_proto
from control_plane.events import PolicyDeleted, PolicyStored
from control_plane.policies import PolicyBook
from control_plane.snapshot import (
    EMPTY,
    DeltaCache,
    EndpointsResource,
    Resource,
    build_snapshot,
    changes,
    check_consistency,
)
from control_plane.subscription import Subscriptions
from mesh_client import convert
from mesh_client.core import store as client
from mesh_client.core.model import Endpoint, Health, ResourceKind
from mesh_client.core.policy import ServicePolicy

SERVICES = ["orders", "payments", "stock"]
IDS = [f"endpoint-{number:02}" for number in range(12)]
NODE = discovery_pb2.Node(id="client-1", service="web")


class Damage(enum.Enum):
    """What is wrong with a response when it arrives, as if the client did not understand what the server meant."""

    NONE = "none"
    CONTENT = "content"
    """One resource is invalid."""
    BASE = "base"
    """A delta's base is not what the client holds."""


def endpoint(id: str, port: int) -> Endpoint:
    health = Health.UNHEALTHY if port == 2 else Health.HEALTHY
    return Endpoint(id, "127.0.0.1", port, health=health, weight=port, metadata={"version": f"v{port}"})


def damaged(message: discovery_pb2.DeltaResourcesResponse, damage: Damage) -> discovery_pb2.DeltaResourcesResponse:
    for resource in message.resources[:1]:
        if damage is Damage.CONTENT:
            spoil(resource)
        elif damage is Damage.BASE and resource.HasField("endpoints_delta"):
            resource.endpoints_delta.base_version = "another"
    return message


def spoil(resource: resource_pb2.Resource) -> None:
    if resource.HasField("policy"):
        resource.policy.service = "somebody-else"
    for items in (resource.endpoints.endpoints, resource.endpoints_delta.upserts):
        for item in items[:1]:
            item.port = 0


class ConvergenceModel(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.book = PolicyBook(ServicePolicy)
        self.services: dict[str, tuple[Endpoint, ...]] = {}
        self.snapshot = EMPTY
        self.encoder = ResponseEncoder("control-plane-1")
        self.store = client.Store()
        self.connect()

    # -- the mesh behind the server

    def publish(self) -> None:
        before, self.snapshot = self.snapshot, build_snapshot(self.services, self.book.policy, self.snapshot)
        check_consistency(self.snapshot, before)
        for kind, name in changes(before, self.snapshot):
            self.server.touch(kind, name)

    @rule(service=st.sampled_from(SERVICES), ids=st.sets(st.sampled_from(IDS)), port=st.integers(1, 3))
    def replace_endpoints(self, service: str, ids: set[str], port: int) -> None:
        self.services[service] = tuple(endpoint(each, port) for each in sorted(ids))
        self.publish()

    @rule(service=st.sampled_from(SERVICES), each=st.sampled_from(IDS), port=st.integers(1, 3))
    def change_one_endpoint(self, service: str, each: str, port: int) -> None:
        members = {member.id: member for member in self.services.get(service, ())}
        if members.pop(each, None) != endpoint(each, port):
            members[each] = endpoint(each, port)
        self.services[service] = tuple(members[id] for id in sorted(members))
        self.publish()

    @rule(service=st.sampled_from(SERVICES))
    def forget_service(self, service: str) -> None:
        self.services.pop(service, None)
        self.publish()

    @rule(service=st.sampled_from(SERVICES), timeout=st.integers(0, 2))
    def change_policy(self, service: str, timeout: int) -> None:
        document = f"service: {service}\ntimeout: {timeout}s".encode()
        self.book.apply(PolicyStored(service, document, "1") if timeout else PolicyDeleted(service))
        self.publish()

    # -- the client's process

    @rule(service=st.sampled_from(SERVICES))
    def subscribe(self, service: str) -> None:
        if service in self.foreign:
            self.unsubscribe(service)
        self.send(*map(convert.subscribe_to_proto, self.store.subscribe(service)))

    @rule(service=st.sampled_from(SERVICES))
    def subscribe_without_the_store(self, service: str) -> None:
        """What the store does not want may still arrive, as it does of a service that was given up a moment ago."""
        if service not in self.store.services:
            self.foreign.add(service)
            self.was_foreign.add(service)
            self.send(*(convert.subscribe_to_proto(client.Subscribe(kind, (service,))) for kind in ResourceKind))

    @rule(service=st.sampled_from(SERVICES))
    def unsubscribe(self, service: str) -> None:
        if service in self.foreign:
            self.foreign.remove(service)
            requests = (client.Subscribe(kind, (), unsubscribe=(service,)) for kind in ResourceKind)
            self.send(*map(convert.subscribe_to_proto, requests))

    @rule(service=st.sampled_from(SERVICES), kind=st.sampled_from(ResourceKind))
    def ask_for_the_whole_again(self, service: str, kind: ResourceKind) -> None:
        if service in self.store.services:
            self.send(convert.acknowledge_to_proto(client.Acknowledge(kind, "", {}, (service,))))

    @rule()
    def reconnect(self) -> None:
        """The stream breaks, with everything that is under way on it."""
        self.store.closed()
        self.connect()

    @rule()
    def restart_the_client(self) -> None:
        """A new process starts from the disk cache, which holds what the old one had, and says so to the server."""
        saved = convert.snapshot_to_proto(self.store.active()).SerializeToString(deterministic=True)
        subscribed = self.store.services
        self.store = client.Store()
        self.store.restore(*convert.snapshot_from_proto(resource_pb2.CachedSnapshot.FromString(saved)))
        for name in subscribed:
            self.store.subscribe(name)
        self.store.use_cache()
        self.connect()

    def connect(self) -> None:
        self.server = Subscriptions(DeltaCache())
        self.to_client: deque[tuple[bytes, frozenset[str]]] = deque()
        self.to_server: deque[bytes] = deque()
        self.heard: set[ResourceKind] = set()
        self.subscribed: dict[ResourceKind, set[str]] = {kind: set() for kind in ResourceKind}
        self.rejected: dict[tuple[ResourceKind, str], str] = {}
        self.foreign: set[str] = set()
        self.was_foreign: set[str] = set()
        """Of these the store may take what was sent to an earlier subscription: no order holds across two of them."""
        first, *others = self.store.opened()
        self.send(convert.subscribe_to_proto(first, NODE), *map(convert.subscribe_to_proto, others))

    def send(self, *requests: discovery_pb2.DeltaResourcesRequest) -> None:
        self.to_server.extend(request.SerializeToString() for request in requests)

    # -- the wire

    @rule()
    def server_reads(self) -> None:
        if self.to_server:
            request = request_from_proto(discovery_pb2.DeltaResourcesRequest.FromString(self.to_server.popleft()))
            effect = self.server.receive(request, 0.0)
            self.subscribed[request.kind] -= set(effect.unsubscribed)
            self.subscribed[request.kind] |= set(effect.subscribed)

    @rule()
    def server_writes(self) -> None:
        both = frozenset(
            self.subscribed[ResourceKind.POLICY] & self.subscribed[ResourceKind.ENDPOINTS] - self.was_foreign
        )
        for response in self.server.next_responses(self.snapshot):
            self.to_client.append((self.encoder.encode(response), both))

    def leaving(self) -> set[str]:
        """Services that the server will hear the client unsubscribe from."""
        requests = map(discovery_pb2.DeltaResourcesRequest.FromString, self.to_server)
        return {name for request in requests for name in request.unsubscribe}

    @rule(damage=st.sampled_from([Damage.NONE, Damage.NONE, Damage.NONE, Damage.CONTENT, Damage.BASE]))
    def client_reads(self, damage: Damage = Damage.NONE) -> None:
        if not self.to_client:
            return
        data, both = self.to_client.popleft()
        message = damaged(discovery_pb2.DeltaResourcesResponse.FromString(data), damage)
        update = convert.update_from_proto(message)
        self.order_holds(update, both)
        answer, _ = self.store.apply(update)
        for name in answer.rejected:
            version = next(resource.version for resource in message.resources if resource.name == name)
            self.rejected[update.kind, name] = version
        self.heard.add(update.kind)
        self.send(convert.acknowledge_to_proto(answer))

    def order_holds(self, update: client.Update, both: frozenset[str]) -> None:
        """A service comes with its policy first and goes with its endpoints first, where both are subscribed to."""
        if update.kind is ResourceKind.ENDPOINTS:
            for resource in update.resources:
                if resource.service in both and (ResourceKind.POLICY, resource.service) not in self.rejected:
                    assert self.store.policy(resource.service) is not None, "endpoints came before their policy"
        else:
            for name in both.intersection(update.removed):
                assert self.store.endpoints(name) is None, "a policy went before its endpoints"

    @rule()
    def settle(self) -> None:
        for _ in range(100):
            while self.to_server:
                self.server_reads()
            self.server_writes()
            if not self.to_client:
                break
            while self.to_client:
                self.client_reads()
        else:
            raise AssertionError("the two sides talk without end")
        assert self.store.in_sync
        for name in self.store.services:
            policy, endpoints = self.store.policy(name), self.store.endpoints(name)
            self.converged(ResourceKind.POLICY, name, policy)
            self.converged(ResourceKind.ENDPOINTS, name, endpoints)
            if not {(kind, name) for kind in ResourceKind} & self.rejected.keys():
                known = client.Resolution.ACTIVE if name in self.services else client.Resolution.UNKNOWN
                assert self.store.resolution(name) is known

    def converged(
        self, kind: ResourceKind, name: str, held: client.PolicyResource | client.EndpointsResource | None
    ) -> None:
        published = self.snapshot.get(kind, name)
        if published is None:
            assert held is None
        elif held is None or held.version != published.version:
            assert self.rejected.get((kind, name)) == published.version, "outdated, and it did not reject what is new"
        else:
            assert content(held) == content(published)

    @invariant()
    def it_is_in_sync_once_both_kinds_were_answered(self) -> None:
        assert self.store.in_sync == (len(self.heard) == len(ResourceKind))

    @invariant()
    def who_holds_an_endpoint_is_known(self) -> None:
        """What a drain relies on: the server never believes of an endpoint wrongly that no client can call it."""
        for name in self.subscribed[ResourceKind.ENDPOINTS].intersection(self.store.services) - self.leaving():
            held = self.store.endpoints(name)
            for member in held.endpoints if held is not None else ():
                assert self.server.may_hold_endpoint(name, member.id)


def content(resource: Resource | client.PolicyResource | client.EndpointsResource) -> object:
    if isinstance(resource, EndpointsResource | client.EndpointsResource):
        return resource.endpoints
    return resource.policy


TestConvergence = ConvergenceModel.TestCase
TestConvergence.settings = settings(stateful_step_count=60)
