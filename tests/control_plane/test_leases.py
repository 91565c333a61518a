"""Leases of the embedded registry."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from control_plane.events import EndpointDrained, ServiceObserved, ServiceVanished
from control_plane.sources.leases import (
    DeleteLease,
    EndStream,
    Lease,
    LeaseAction,
    LeaseBook,
    LeaseHeldError,
    LeaseLimitError,
    SaveLease,
    endpoint_from_json,
    endpoint_to_json,
)
from mesh_client.core.errors import InvalidTransitionError, InvalidValueError
from mesh_client.core.model import Endpoint, Health, Locality

FIRST = Endpoint("a-1", "10.0.0.1", 80)
SECOND = Endpoint("a-2", "10.0.0.2", 80)


def register(
    book: LeaseBook, stream: int, endpoint: Endpoint = FIRST, token: bytes | None = None
) -> tuple[LeaseAction, ...]:
    return book.register(
        stream, "a", endpoint, token_hash=token, fresh_hash=f"token-{stream}".encode(), peer=f"peer-{stream}"
    )


def observed(*endpoints: Endpoint) -> ServiceObserved:
    return ServiceObserved("embedded", "a", endpoints)


def test_a_registration_is_published_and_stored() -> None:
    book = LeaseBook()
    actions = register(book, 1)
    assert actions == (observed(FIRST), SaveLease(Lease("a", FIRST, b"token-1", "peer-1", holder=1)))
    assert len(book) == 1
    assert book.holds(1)
    assert book.next_tick() is None


def test_the_endpoints_of_a_service_are_ordered_by_id() -> None:
    book = LeaseBook()
    register(book, 1, SECOND)
    assert register(book, 2, FIRST)[0] == observed(FIRST, SECOND)


def test_an_update_is_published_and_the_same_again_is_not() -> None:
    book = LeaseBook()
    register(book, 1)
    sick = replace(FIRST, health=Health.UNHEALTHY)
    assert book.update(1, sick)[0] == observed(sick)
    assert book.update(1, sick) == ()


def test_an_update_may_not_change_the_id() -> None:
    book = LeaseBook()
    register(book, 1)
    with pytest.raises(InvalidValueError, match="constant over a stream"):
        book.update(1, SECOND)
    assert book.lease("a", "a-1") is not None


def test_half_closing_drains_and_then_removes() -> None:
    book = LeaseBook()
    register(book, 1)
    assert book.closed(1) == (
        EndpointDrained("a", "a-1"),
        ServiceVanished("embedded", "a"),
        DeleteLease("a", "a-1"),
    )
    assert len(book) == 0


def test_a_broken_stream_leaves_the_endpoint_for_the_grace() -> None:
    book = LeaseBook(grace=10.0)
    register(book, 1)
    register(book, 2, SECOND)
    assert book.broken(1, now=100.0) == ()
    assert book.next_tick() == 110.0
    assert book.tick(109.9) == ()
    assert book.tick(110.0) == (observed(SECOND), DeleteLease("a", "a-1"))
    assert book.next_tick() is None


def test_the_holder_comes_back_within_the_grace_and_nothing_is_published() -> None:
    book = LeaseBook(grace=10.0)
    register(book, 1)
    book.broken(1, now=100.0)
    (saved,) = register(book, 2, token=b"token-1")
    assert isinstance(saved, SaveLease)
    assert saved.lease.token_hash == b"token-1"
    assert book.tick(200.0) == ()
    assert book.holds(2)


def test_breaking_twice_counts_the_grace_from_the_second_time() -> None:
    book = LeaseBook(grace=10.0)
    register(book, 1)
    book.broken(1, now=100.0)
    register(book, 2, token=b"token-1")
    book.broken(2, now=105.0)
    assert book.tick(110.0) == ()
    assert book.tick(115.0) == (ServiceVanished("embedded", "a"), DeleteLease("a", "a-1"))


def test_another_live_stream_is_refused_without_the_token() -> None:
    book = LeaseBook()
    register(book, 1)
    for token in (None, b"token-9"):
        with pytest.raises(LeaseHeldError, match="from peer-1"):
            register(book, 2, token=token)
    assert book.holds(1)
    assert not book.holds(2)


def test_the_token_takes_a_live_lease_over_and_ends_the_old_stream() -> None:
    book = LeaseBook()
    register(book, 1)
    actions = register(book, 2, replace(FIRST, port=81), token=b"token-1")
    assert actions[:2] == (EndStream(1), observed(replace(FIRST, port=81)))
    assert not book.holds(1)
    with pytest.raises(InvalidTransitionError):
        book.broken(1, now=1.0)


def test_a_loose_lease_is_free_for_an_instance_started_anew() -> None:
    book = LeaseBook()
    register(book, 1)
    book.broken(1, now=100.0)
    (saved,) = register(book, 2)
    assert isinstance(saved, SaveLease)
    assert saved.lease.token_hash == b"token-2"


def test_a_drained_endpoint_stays_drained_for_its_holder_and_over_updates() -> None:
    book = LeaseBook()
    register(book, 1)
    leaving = replace(FIRST, health=Health.DRAINING)
    assert book.drain("a", "a-1")[:2] == (EndpointDrained("a", "a-1"), observed(leaving))
    assert book.drain("a", "a-1") == ()
    (saved,) = book.update(1, replace(FIRST, health=Health.UNHEALTHY))
    assert isinstance(saved, SaveLease)
    book.broken(1, now=1.0)
    assert [type(action) for action in register(book, 2, token=b"token-1")] == [SaveLease]
    lease = book.lease("a", "a-1")
    assert lease is not None
    assert lease.published.health is Health.DRAINING


def test_an_instance_started_anew_is_not_drained_and_its_predecessor_was_removed_first() -> None:
    book = LeaseBook()
    register(book, 1)
    book.drain("a", "a-1")
    book.broken(1, now=1.0)
    assert register(book, 2)[:2] == (ServiceVanished("embedded", "a"), observed(FIRST))


def test_draining_what_is_not_registered_does_nothing() -> None:
    assert LeaseBook().drain("a", "a-1") == ()


def test_past_the_limit_registrations_are_refused_and_returning_ones_are_not() -> None:
    book = LeaseBook(max_leases=1)
    register(book, 1)
    with pytest.raises(LeaseLimitError, match="holds 1 registrations"):
        register(book, 2, SECOND)
    register(book, 3, token=b"token-1")
    assert book.holds(3)


def test_restored_leases_are_published_and_kept_for_their_own_grace() -> None:
    book = LeaseBook(grace=10.0)
    rows = [Lease("a", FIRST, b"t1"), Lease("a", SECOND, b"t2", drained=True), Lease("b", FIRST, b"t3", holder=7)]
    published = book.restore(rows, now=100.0, grace=15.0)
    assert published == (
        observed(FIRST, replace(SECOND, health=Health.DRAINING)),
        ServiceObserved("embedded", "b", (FIRST,)),
    )
    register(book, 1, token=b"t1")
    assert book.tick(114.9) == ()
    assert book.tick(115.0) == (
        observed(FIRST),
        ServiceVanished("embedded", "b"),
        DeleteLease("a", "a-2"),
        DeleteLease("b", "a-1"),
    )


def test_a_book_in_use_cannot_be_restored_into() -> None:
    book = LeaseBook()
    register(book, 1)
    with pytest.raises(InvalidTransitionError):
        book.restore([], now=0.0, grace=15.0)


def test_events_of_streams_without_a_lease_are_illegal() -> None:
    book = LeaseBook()
    register(book, 1)
    with pytest.raises(InvalidTransitionError):
        register(book, 1)
    with pytest.raises(InvalidTransitionError):
        book.update(2, FIRST)
    with pytest.raises(InvalidTransitionError):
        book.closed(2)


@pytest.mark.parametrize(
    "endpoint",
    [
        FIRST,
        Endpoint("x", "::1", 1, 7, Health.DRAINING, Locality("eu", "a"), {"version": "v2", "é": "\n"}),
    ],
)
def test_an_endpoint_survives_its_row(endpoint: Endpoint) -> None:
    assert endpoint_from_json(endpoint_to_json(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"id": 1}', endpoint_to_json(FIRST).replace("10.0.0.1", "no such"),
     endpoint_to_json(FIRST).replace('"healthy"', '"odd"'), endpoint_to_json(FIRST).replace("{}", "7"),
     endpoint_to_json(FIRST).replace("80", '"80"')],
)  # fmt: skip
def test_a_row_that_is_no_endpoint_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        endpoint_from_json(text)


class Leases(RuleBasedStateMachine):
    """What is published and stored equals the leases, and each lease ends when it should, whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.book = LeaseBook(grace=10.0, max_leases=3)
        self.next_stream = 1
        self.held: dict[int, tuple[str, str]] = {}
        self.published: dict[str, dict[str, Endpoint]] = {}
        self.rows: dict[tuple[str, str], Lease] = {}
        self.deadlines: dict[tuple[str, str], float] = {}

    def do(self, actions: tuple[LeaseAction, ...]) -> None:
        for action in actions:
            match action:
                case ServiceObserved(_, service, endpoints):
                    self.published[service] = {endpoint.id: endpoint for endpoint in endpoints}
                case ServiceVanished(_, service):
                    del self.published[service]
                case SaveLease(lease):
                    self.rows[lease.service, lease.endpoint.id] = lease
                case DeleteLease(service, endpoint_id):
                    del self.rows[service, endpoint_id]
                    self.deadlines.pop((service, endpoint_id), None)
                case EndStream(stream):
                    del self.held[stream]
                case EndpointDrained(service, endpoint_id):
                    assert endpoint_id in self.published[service]

    @rule(
        service=st.sampled_from("ab"),
        endpoint_id=st.sampled_from(["1", "2", "3"]),
        port=st.integers(1, 3),
        shows=st.sampled_from(["token", "other", "none"]),
    )
    def register(self, service: str, endpoint_id: str, port: int, shows: str) -> None:
        stream, self.next_stream = self.next_stream, self.next_stream + 1
        row = self.rows.get((service, endpoint_id))
        token = {"token": row.token_hash if row else b"gone", "other": b"other", "none": None}[shows]
        endpoint = Endpoint(endpoint_id, "10.0.0.1", port)
        is_held = (service, endpoint_id) in self.held.values()
        try:
            actions = self.book.register(
                stream, service, endpoint, token_hash=token, fresh_hash=str(stream).encode(), peer="p"
            )
        except LeaseHeldError:
            assert is_held
            assert shows != "token"
        except LeaseLimitError:
            assert row is None
            assert len(self.rows) == 3
        else:
            assert not is_held or shows == "token"
            self.do(actions)
            self.held[stream] = (service, endpoint_id)
            self.deadlines.pop((service, endpoint_id), None)
            assert self.published[service][endpoint_id].port == port

    @precondition(lambda self: self.held)
    @rule(data=st.data(), port=st.integers(1, 3))
    def update(self, data: st.DataObject, port: int) -> None:
        stream = data.draw(st.sampled_from(sorted(self.held)))
        self.do(self.book.update(stream, Endpoint(self.held[stream][1], "10.0.0.1", port)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def break_off(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.held)))
        self.do(self.book.broken(stream, self.now))
        self.deadlines[self.held.pop(stream)] = self.now + 10.0

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(sorted(self.held)))
        self.do(self.book.closed(stream))
        del self.held[stream]

    @rule(service=st.sampled_from("ab"), endpoint_id=st.sampled_from(["1", "2", "3"]))
    def drain(self, service: str, endpoint_id: str) -> None:
        self.do(self.book.drain(service, endpoint_id))

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.book.tick(self.now))
        assert all(deadline > self.now for deadline in self.deadlines.values())

    @invariant()
    def what_is_published_is_what_is_stored(self) -> None:
        leases = self.book.rows()
        stored = {key: replace(lease, holder=None, expires_at=0.0) for key, lease in self.rows.items()}
        assert stored == {key: replace(lease, holder=None, expires_at=0.0) for key, lease in leases.items()}
        flat = {
            (service, endpoint_id): endpoint
            for service, endpoints in self.published.items()
            for endpoint_id, endpoint in endpoints.items()
        }
        assert flat == {key: lease.published for key, lease in leases.items()}
        assert len(self.book) == len(leases) <= 3

    @invariant()
    def each_lease_is_held_or_has_a_deadline(self) -> None:
        assert set(self.book.rows()) == set(self.held.values()) | set(self.deadlines)
        assert all(self.book.holds(stream) for stream in self.held)
        earliest = self.book.next_tick()
        assert not self.deadlines or (earliest is not None and earliest <= min(self.deadlines.values()))


TestLeases = Leases.TestCase
