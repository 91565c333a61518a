"""One stream's subscription machine: what is sent when, and what answers mean."""

from __future__ import annotations

import dataclasses

import pytest

from control_plane.events import PolicyStored
from control_plane.policies import PolicyBook
from control_plane.snapshot import EMPTY, Snapshot, build_snapshot
from control_plane.subscription import (
    MAX_REJECTION_LENGTH,
    MAX_RESPONSE_SIZE,
    ClientNode,
    ProtocolError,
    Rejection,
    Request,
    Response,
    Subscriptions,
    SubscriptionState,
)
from mesh_client.core.model import Endpoint, ResourceKind, StatusCode
from mesh_client.core.policy import ServicePolicy

NODE = ClientNode("client-1", "web")
POLICY, ENDPOINTS = ResourceKind.POLICY, ResourceKind.ENDPOINTS


class Stream:
    """A stream, and the mesh behind it."""

    def __init__(self, max_subscriptions: int = 100) -> None:
        self.machine = Subscriptions(max_subscriptions=max_subscriptions)
        self.services: dict[str, tuple[Endpoint, ...]] = {}
        self.book = PolicyBook(ServicePolicy)
        self.snapshot = EMPTY
        self.now = 0.0

    def publish(self, service: str, *ids: str, port: int = 1000, metadata: str = "") -> Snapshot:
        self.services[service] = tuple(
            Endpoint(id, "127.0.0.1", port, metadata={"filler": metadata} if metadata else {}) for id in ids
        )
        return self.republish(service)

    def withdraw(self, service: str) -> None:
        del self.services[service]
        self.republish(service)

    def store_policy(self, service: str, timeout: float) -> None:
        self.book.apply(PolicyStored(service, f"service: {service}\ntimeout: {timeout}s\n".encode(), "1"))
        self.republish(service)

    def republish(self, service: str) -> Snapshot:
        self.snapshot = build_snapshot(self.services, self.book.policy, self.snapshot)
        for kind in ResourceKind:
            self.machine.touch(kind, service)
        return self.snapshot

    def request(self, kind: ResourceKind, *subscribe: str, **fields: object) -> list[Response]:
        node = NODE if self.machine.node is None else None
        request = dataclasses.replace(Request(kind, node, subscribe), **fields)  # type: ignore[arg-type] # any field
        self.machine.receive(request, self.now)
        return self.sent()

    def subscribe(self, *names: str) -> list[Response]:
        """To both kinds, with everything acknowledged."""
        responses = self.request(POLICY, *names)
        responses += self.request(ENDPOINTS, *names)
        for response in responses:
            self.acknowledge(response)
        return responses

    def acknowledge(self, response: Response) -> list[Response]:
        return self.request(response.kind, response_nonce=response.nonce)

    def reject(self, response: Response, message: str = "bad", **resources: str) -> list[Response]:
        return self.request(response.kind, response_nonce=response.nonce, rejection=Rejection(message, dict(resources)))

    def sent(self) -> list[Response]:
        return self.machine.next_responses(self.snapshot)

    def state(self, kind: ResourceKind, service: str) -> SubscriptionState:
        return next(state for state in self.machine.states() if (state.kind, state.service) == (kind, service))


def names(response: Response) -> list[str]:
    return [change.resource.name for change in response.changes]


def versions(response: Response) -> list[str]:
    return [change.resource.version for change in response.changes]


@pytest.fixture
def stream() -> Stream:
    return Stream()


class TestSubscribing:
    def test_the_first_request_gets_what_it_asks_for(self, stream: Stream) -> None:
        snapshot = stream.publish("orders", "1")
        (response,) = stream.request(POLICY, "orders")
        assert response.kind is POLICY
        assert versions(response) == [snapshot.policies["orders"].version]
        assert response.removed == ()

    def test_an_unknown_service_is_said_to_be_unknown_once(self, stream: Stream) -> None:
        (response,) = stream.request(ENDPOINTS, "nobody")
        assert (response.changes, response.removed) == ((), ("nobody",))
        assert stream.acknowledge(response) == []
        stream.machine.touch(ENDPOINTS, "nobody")
        assert stream.sent() == []

    def test_known_and_empty_is_not_unknown(self, stream: Stream) -> None:
        stream.publish("orders")
        (response,) = stream.request(ENDPOINTS, "orders")
        assert names(response) == ["orders"]
        assert response.removed == ()

    def test_what_the_client_holds_is_not_sent_again_but_its_request_is_answered(self, stream: Stream) -> None:
        version = stream.publish("orders", "1").endpoints["orders"].version
        (response,) = stream.request(ENDPOINTS, "orders", held_versions={"orders": version})
        assert (response.changes, response.removed) == ((), ())
        assert stream.state(ENDPOINTS, "orders").acknowledged_version == version
        assert stream.acknowledge(response) == []

    def test_deltas_can_start_from_a_version_that_the_client_brought_along(self, stream: Stream) -> None:
        many = [f"{number:02}" for number in range(30)]
        version = stream.publish("orders", *many).endpoints["orders"].version
        (response,) = stream.request(ENDPOINTS, "orders", held_versions={"orders": version})
        stream.acknowledge(response)
        stream.publish("orders", *many[1:])
        (response,) = stream.sent()
        delta = response.changes[0].delta
        assert delta is not None
        assert (delta.base_version, delta.removed_ids) == (version, ("00",))

    def test_an_outdated_version_that_the_client_brought_along_is_replaced_whole(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders", held_versions={"orders": "0123456789abcdef", "other": "x"})
        assert names(response) == ["orders"]
        assert response.changes[0].delta is None

    def test_subscribing_twice_is_harmless(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        assert stream.request(ENDPOINTS, "orders") == []

    def test_after_unsubscribing_nothing_is_sent(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        effect = stream.machine.receive(Request(ENDPOINTS, unsubscribe=("orders", "other")), 0.0)
        assert effect.unsubscribed == ("orders",)
        stream.publish("orders", "1", "2")
        assert [response.kind for response in stream.sent()] == []

    def test_subscribing_again_gets_everything_again(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        (response,) = stream.request(ENDPOINTS, "orders", unsubscribe=("orders",))
        assert names(response) == ["orders"]

    def test_an_answer_says_nothing_of_a_subscription_that_was_renewed_meanwhile(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        assert stream.request(ENDPOINTS, "orders", unsubscribe=("orders",)) == []
        (again,) = stream.acknowledge(response)
        assert names(again) == ["orders"]
        assert stream.reject(again, other="not in it", orders="no") == []

    def test_the_effects_name_what_was_subscribed_and_answered(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        effect = stream.machine.receive(Request(ENDPOINTS, NODE, ("orders", "orders", "nobody")), 0.0)
        assert effect.subscribed == ("orders", "nobody")
        (response,) = stream.sent()
        effect = stream.machine.receive(Request(ENDPOINTS, response_nonce=response.nonce), 0.0)
        assert set(effect.answered) == {"orders", "nobody"}


class TestAnswers:
    def test_nothing_more_is_sent_until_the_response_is_answered_and_changes_conflate(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        for number in range(100):
            stream.publish("orders", f"new-{number}")
            assert stream.sent() == []
        assert not stream.machine.ready()
        (latest,) = stream.acknowledge(response)
        assert versions(latest) == [stream.snapshot.endpoints["orders"].version]
        assert stream.acknowledge(latest) == []

    def test_an_unanswered_kind_does_not_hold_up_the_other(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (policy,) = stream.request(POLICY, "orders")
        (endpoints,) = stream.request(ENDPOINTS, "orders")
        stream.acknowledge(endpoints)
        stream.publish("orders", "2")
        assert [response.kind for response in stream.sent()] == [ENDPOINTS]
        assert stream.acknowledge(policy) == []

    def test_a_change_that_is_undone_before_the_answer_is_not_sent(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        stream.publish("orders", "2")
        stream.publish("orders", "1")
        assert stream.acknowledge(response) == []

    def test_nonces_are_unique_within_the_stream(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        responses = stream.subscribe("orders")
        stream.publish("orders", "2")
        responses += stream.sent()
        assert len({response.nonce for response in responses}) == len(responses) == 3

    @pytest.mark.parametrize("nonce", ["99", "of another stream"])
    def test_an_unknown_nonce_is_ignored_and_the_rest_of_the_request_is_not(self, stream: Stream, nonce: str) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        assert stream.request(ENDPOINTS, "payments", response_nonce=nonce) == []
        assert stream.state(ENDPOINTS, "orders").acknowledged_version == ""
        (second,) = stream.acknowledge(response)
        assert second.removed == ("payments",)

    def test_a_second_answer_to_a_response_is_ignored(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        stream.acknowledge(response)
        stream.reject(response)
        assert stream.state(ENDPOINTS, "orders").rejected_version is None

    def test_the_time_of_the_acknowledgement_is_kept(self, stream: Stream) -> None:
        version = stream.publish("orders", "1").endpoints["orders"].version
        (response,) = stream.request(ENDPOINTS, "orders")
        assert stream.state(ENDPOINTS, "orders").acknowledged_at is None
        stream.now = 7.0
        stream.acknowledge(response)
        state = stream.state(ENDPOINTS, "orders")
        assert (state.acknowledged_at, state.acknowledged_version) == (7.0, version)


class TestRejections:
    def test_a_rejected_version_is_not_sent_again(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        bad = stream.publish("orders", "bad").endpoints["orders"].version
        (response,) = stream.sent()
        assert stream.reject(response, orders="no") == []
        stream.machine.touch(ENDPOINTS, "orders")
        assert stream.sent() == []
        state = stream.state(ENDPOINTS, "orders")
        assert (state.rejected_version, state.rejection) == (bad, "no")

    def test_it_is_not_sent_again_after_a_detour_over_what_the_client_holds(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        stream.publish("orders", "bad")
        (response,) = stream.sent()
        stream.reject(response)
        stream.publish("orders", "1")
        assert stream.sent() == []
        stream.publish("orders", "bad")
        assert stream.sent() == []

    def test_the_next_version_is_a_delta_from_the_last_good_one(self, stream: Stream) -> None:
        many = [f"{number:02}" for number in range(30)]
        good = stream.publish("orders", *many).endpoints["orders"].version
        stream.subscribe("orders")
        stream.publish("orders", *many, "bad")
        (response,) = stream.sent()
        stream.reject(response)
        stream.publish("orders", *many, "better")
        (response,) = stream.sent()
        delta = response.changes[0].delta
        assert delta is not None
        assert delta.base_version == good
        stream.acknowledge(response)
        state = stream.state(ENDPOINTS, "orders")
        assert (state.rejected_version, state.rejection) == (None, "")

    def test_resources_that_a_rejection_does_not_name_were_accepted(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.publish("payments", "1")
        (response,) = stream.request(ENDPOINTS, "orders", "payments")
        stream.reject(response, "half of it", orders="no")
        assert stream.state(ENDPOINTS, "orders").acknowledged_version == ""
        assert stream.state(ENDPOINTS, "payments").acknowledged_version != ""
        assert stream.state(ENDPOINTS, "payments").rejected_version is None

    def test_a_rejection_without_names_rejects_the_whole_response(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders", "nobody")
        assert stream.reject(response, "all of it") == []
        assert stream.state(ENDPOINTS, "orders").rejection == "all of it"
        assert stream.state(ENDPOINTS, "nobody").rejection == "all of it"
        assert stream.sent() == []

    def test_a_name_without_a_reason_gets_the_message_and_long_ones_are_cut(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        stream.reject(response, "m" * 10_000, orders="")
        assert stream.state(ENDPOINTS, "orders").rejection == "m" * MAX_REJECTION_LENGTH


class TestDeltas:
    def test_a_change_of_a_large_service_is_sent_as_a_delta_and_of_a_small_one_whole(self, stream: Stream) -> None:
        many = [f"{number:02}" for number in range(30)]
        stream.publish("large", *many)
        stream.publish("small", "1")
        stream.subscribe("large", "small")
        stream.publish("large", *many[:-1])
        stream.publish("small", "2")
        (response,) = stream.sent()
        deltas = {change.resource.name: change.delta for change in response.changes}
        assert deltas["large"] is not None
        assert deltas["small"] is None

    def test_a_resync_gets_the_whole(self, stream: Stream) -> None:
        many = [f"{number:02}" for number in range(30)]
        stream.publish("orders", *many)
        stream.subscribe("orders")
        stream.publish("orders", *many[1:])
        (delta,) = stream.sent()
        (whole,) = stream.request(ENDPOINTS, response_nonce=delta.nonce, resync=("orders",))
        assert whole.changes[0].delta is None
        assert versions(whole) == versions(delta)
        assert stream.acknowledge(whole) == []

    def test_a_resync_of_what_is_under_way_waits_for_its_answer(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        assert stream.request(ENDPOINTS, resync=("orders",)) == []
        (whole,) = stream.acknowledge(response)
        assert names(whole) == ["orders"]

    def test_a_resync_gets_a_rejected_version_too(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        (again,) = stream.request(
            ENDPOINTS, response_nonce=response.nonce, rejection=Rejection("base"), resync=("orders",)
        )
        assert names(again) == ["orders"]


class TestOrder:
    def test_a_new_service_gets_its_policy_first(self, stream: Stream) -> None:
        stream.subscribe("orders")
        stream.publish("orders", "1")
        assert [response.kind for response in stream.sent()] == [POLICY, ENDPOINTS]

    def test_endpoints_wait_while_their_policy_cannot_be_sent(self, stream: Stream) -> None:
        stream.publish("payments", "1")
        stream.subscribe("orders", "payments")
        stream.store_policy("payments", 3)
        (under_way,) = stream.sent()
        stream.publish("orders", "1")
        assert stream.sent() == []
        assert [(each.kind, names(each)) for each in stream.acknowledge(under_way)] == [
            (POLICY, ["orders"]),
            (ENDPOINTS, ["orders"]),
        ]

    def test_endpoints_of_other_services_do_not_wait(self, stream: Stream) -> None:
        stream.publish("payments", "1")
        stream.subscribe("orders", "payments")
        stream.store_policy("payments", 3)
        stream.sent()
        stream.publish("orders", "1")
        stream.publish("payments", "2")
        assert [(each.kind, names(each)) for each in stream.sent()] == [(ENDPOINTS, ["payments"])]

    def test_a_service_that_goes_loses_its_endpoints_first(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        stream.withdraw("orders")
        assert [(each.kind, each.removed) for each in stream.sent()] == [
            (ENDPOINTS, ("orders",)),
            (POLICY, ("orders",)),
        ]

    def test_a_policy_stays_while_the_withdrawal_of_its_endpoints_cannot_be_sent(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        stream.publish("orders", "2")
        (under_way,) = stream.sent()
        stream.withdraw("orders")
        assert stream.sent() == []
        assert [each.kind for each in stream.acknowledge(under_way)] == [ENDPOINTS, POLICY]

    def test_a_client_that_wants_only_endpoints_gets_them(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        assert names(response) == ["orders"]

    def test_a_rejected_policy_does_not_keep_the_endpoints_back(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (policy,) = stream.request(POLICY, "orders")
        stream.reject(policy)
        (endpoints,) = stream.request(ENDPOINTS, "orders")
        assert names(endpoints) == ["orders"]

    def test_a_service_that_goes_takes_its_policy_along_though_its_endpoints_were_rejected(
        self, stream: Stream
    ) -> None:
        stream.subscribe("orders")
        stream.publish("orders", "bad")
        policy, endpoints = stream.sent()
        stream.acknowledge(policy)
        stream.reject(endpoints)
        stream.withdraw("orders")
        assert [(each.kind, each.removed) for each in stream.sent()] == [(POLICY, ("orders",))]

    def test_endpoints_that_wait_do_not_count_as_an_answer_to_the_first_request(self, stream: Stream) -> None:
        (first,) = stream.request(POLICY, "nobody")
        stream.publish("orders", "1")
        assert stream.request(POLICY, "orders") == []
        assert stream.request(ENDPOINTS, "orders") == []
        assert [each.kind for each in stream.acknowledge(first)] == [POLICY, ENDPOINTS]


class TestSizes:
    def test_a_response_takes_as_much_as_fits_and_the_rest_follows(self, stream: Stream) -> None:
        each = 250
        wanted = [f"service-{number}" for number in range(30)]
        for name in wanted:
            stream.publish(name, *(f"{number:04}" for number in range(each)), metadata="x" * 250)
        (response,) = stream.request(ENDPOINTS, *wanted)
        got: list[str] = []
        rounds = 0
        while response.changes:
            assert sum(change.resource.size for change in response.changes) <= MAX_RESPONSE_SIZE
            got += names(response)
            rounds += 1
            following = stream.acknowledge(response)
            if not following:
                break
            (response,) = following
        assert sorted(got) == sorted(wanted)
        assert rounds > 1

    def test_a_resource_that_is_larger_than_a_response_should_be_is_sent_alone(self, stream: Stream) -> None:
        stream.publish("large", *(f"{number:05}" for number in range(5_000)), metadata="x" * 250)
        stream.publish("small", "1")
        assert stream.snapshot.endpoints["large"].size > MAX_RESPONSE_SIZE
        (first,) = stream.request(ENDPOINTS, "large", "small")
        assert names(first) == ["large"]
        (second,) = stream.acknowledge(first)
        assert names(second) == ["small"]


class TestWhoMayHoldAnEndpoint:
    def holds(self, stream: Stream, endpoint_id: str = "1") -> bool:
        return stream.machine.may_hold_endpoint("orders", endpoint_id)

    def test_from_the_moment_it_is_sent_until_a_version_without_it_is_acknowledged(self, stream: Stream) -> None:
        stream.publish("orders", "1", "2")
        assert not self.holds(stream)
        (response,) = stream.request(ENDPOINTS, "orders")
        assert self.holds(stream)
        assert not self.holds(stream, "3")
        stream.acknowledge(response)
        stream.publish("orders", "2")
        assert self.holds(stream)
        (response,) = stream.sent()
        assert self.holds(stream)
        stream.acknowledge(response)
        assert not self.holds(stream)
        assert self.holds(stream, "2")

    def test_who_rejects_the_version_without_it_holds_it_still(self, stream: Stream) -> None:
        stream.publish("orders", "1", "2")
        stream.subscribe("orders")
        stream.publish("orders", "2")
        (response,) = stream.sent()
        stream.reject(response)
        assert self.holds(stream)

    def test_who_came_back_with_an_old_version_may_hold_it(self, stream: Stream) -> None:
        stream.publish("orders", "2")
        (response,) = stream.request(ENDPOINTS, "orders", held_versions={"orders": "old"})
        assert self.holds(stream)
        stream.acknowledge(response)
        assert not self.holds(stream)

    def test_who_asked_for_the_whole_may_hold_it(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        (response,) = stream.request(ENDPOINTS, resync=("orders",))
        stream.publish("orders", "2")
        (response,) = stream.acknowledge(response)
        assert self.holds(stream)
        stream.acknowledge(response)
        assert not self.holds(stream)

    def test_who_asked_for_the_whole_and_waits_may_hold_it(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        stream.publish("orders", "2")
        (response,) = stream.sent()
        stream.request(ENDPOINTS, resync=("orders",))
        stream.machine.receive(Request(ENDPOINTS, response_nonce=response.nonce), 0.0)
        assert self.holds(stream)

    def test_who_comes_back_while_a_response_is_under_way_may_take_it_for_the_answer(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        (response,) = stream.request(ENDPOINTS, "orders")
        stream.request(ENDPOINTS, unsubscribe=("orders",))
        assert not self.holds(stream)
        stream.request(ENDPOINTS, "orders")
        assert self.holds(stream)
        stream.publish("orders", "2")
        (response,) = stream.acknowledge(response)
        assert self.holds(stream)
        stream.acknowledge(response)
        assert not self.holds(stream)

    def test_who_unsubscribed_or_was_told_that_the_service_is_unknown_does_not(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        stream.withdraw("orders")
        for response in stream.sent():
            stream.acknowledge(response)
        assert not self.holds(stream)
        stream.publish("orders", "1")
        for response in stream.sent():
            stream.acknowledge(response)
        assert self.holds(stream)
        stream.request(ENDPOINTS, unsubscribe=("orders",))
        assert not self.holds(stream)


class TestIllegalRequests:
    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (Request(POLICY), "node"),
            (Request(POLICY, ClientNode("")), "node.id"),
            (Request(POLICY, ClientNode("x" * 257)), "node.id"),
            (Request(POLICY, ClientNode("x", "Not Good")), "node.service"),
            (Request(POLICY, ClientNode("x", user_agent="x" * 257)), "node.user_agent"),
            (Request(POLICY, NODE, ("orders", "Not Good")), "subscribe[1]"),
            (Request(POLICY, NODE, ("",)), "subscribe[0]"),
            (Request(POLICY, NODE, ("x" * 10_000,)), "subscribe[0]"),
            (Request(POLICY, NODE, held_versions={"Not Good": "v"}), "held_versions"),
            (Request(POLICY, NODE, held_versions={"orders": ""}), "held_versions[orders]"),
            (Request(POLICY, NODE, held_versions={"orders": "x" * 65}), "held_versions[orders]"),
            (Request(POLICY, NODE, resync=("orders",)), "resync[0]"),
            (Request(POLICY, NODE, resync=("Not Good",)), "resync[0]"),
            (Request(POLICY, NODE, rejection=Rejection("no")), "error"),
        ],
    )
    def test_a_bad_first_request_names_its_field_and_changes_nothing(
        self, stream: Stream, request_: Request, field: str
    ) -> None:
        with pytest.raises(ProtocolError) as caught:
            stream.machine.receive(request_, 0.0)
        assert (caught.value.field, caught.value.code) == (field, StatusCode.INVALID_ARGUMENT)
        assert str(caught.value).startswith(field)
        assert len(str(caught.value)) < 300
        assert stream.machine.node is None
        assert stream.machine.states() == []

    def test_the_node_may_be_repeated_and_not_changed(self, stream: Stream) -> None:
        stream.subscribe("orders")
        stream.machine.receive(Request(POLICY, NODE), 0.0)
        with pytest.raises(ProtocolError, match="node"):
            stream.machine.receive(Request(POLICY, ClientNode("other")), 0.0)

    def test_held_versions_belong_into_the_first_request_of_each_type(self, stream: Stream) -> None:
        stream.request(POLICY, "orders")
        stream.request(ENDPOINTS, "orders", held_versions={"orders": "v"})
        with pytest.raises(ProtocolError, match="held_versions"):
            stream.request(POLICY, "payments", held_versions={"payments": "v"})

    def test_a_resync_together_with_the_end_of_the_subscription_is_refused(self, stream: Stream) -> None:
        stream.publish("orders", "1")
        stream.subscribe("orders")
        with pytest.raises(ProtocolError, match="not subscribed"):
            stream.request(ENDPOINTS, unsubscribe=("orders",), resync=("orders",))
        assert stream.state(ENDPOINTS, "orders").acknowledged_version

    def test_a_flood_of_subscriptions_is_refused_over_both_kinds_together(self) -> None:
        stream = Stream(max_subscriptions=3)
        stream.subscribe("a")
        with pytest.raises(ProtocolError, match="4 subscriptions are more than the 3") as caught:
            stream.request(ENDPOINTS, "b", "c")
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert [state.service for state in stream.machine.states()] == ["a", "a"]
        stream.request(ENDPOINTS, "a", "b")

    def test_a_flood_of_held_versions_is_refused(self) -> None:
        stream = Stream(max_subscriptions=2)
        with pytest.raises(ProtocolError) as caught:
            stream.request(POLICY, held_versions={"a": "1", "b": "1", "c": "1"})
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
