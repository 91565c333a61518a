from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.balancer import Node, Picker, build_picker, next_rebuild
from mesh_client.core.load import EndpointLoad
from mesh_client.core.model import Endpoint, Health, Locality, Outcome
from mesh_client.core.pickers import stable_hash
from mesh_client.core.policy import Algorithm, LoadBalancer

every_algorithm = pytest.mark.parametrize("algorithm", Algorithm)


def node(
    name: str, *, weight: int = 1, zone: str = "", health: Health = Health.HEALTHY, added_at: float = -math.inf
) -> Node:
    endpoint = Endpoint(name, "10.0.0.1", 50051, weight=weight, health=health, locality=Locality(zone=zone))
    return Node(endpoint, added_at=added_at)


def nodes(count: int) -> list[Node]:
    return [node(f"orders-{number}") for number in range(count)]


def build(
    algorithm: Algorithm | LoadBalancer, members: list[Node], *, zone: str = "", seed: int = 1, now: float = 0.0
) -> Picker:
    settings = algorithm if isinstance(algorithm, LoadBalancer) else LoadBalancer(algorithm=algorithm)
    return build_picker(settings, members, zone=zone, rng=Random(seed), now=now)


def picked(picker: Picker, count: int = 300, *, now: float = 0.0, excluded: tuple[Node, ...] = ()) -> Counter[str]:
    """How often each endpoint is picked, with a different key each time."""
    counts: Counter[str] = Counter()
    for number in range(count):
        chosen = picker.pick(f"user-{number}", excluded, now)
        assert chosen is not None
        counts[chosen.endpoint.id] += 1
    return counts


@every_algorithm
def test_without_endpoints_there_is_no_pick(algorithm: Algorithm) -> None:
    assert build(algorithm, []).pick("key", (), 0.0) is None


@every_algorithm
def test_a_single_endpoint_is_picked_even_when_excluded(algorithm: Algorithm) -> None:
    (only,) = members = nodes(1)
    picker = build(algorithm, members)
    assert picker.pick(None, (), 0.0) is only
    assert picker.pick("key", (only,), 0.0) is only


@every_algorithm
def test_every_endpoint_gets_its_turn(algorithm: Algorithm) -> None:
    assert len(picked(build(algorithm, nodes(5)))) == 5


@every_algorithm
def test_nothing_is_picked_twice_while_something_else_is_left(algorithm: Algorithm) -> None:
    members = nodes(6)
    picker = build(algorithm, members)
    for number in range(50):
        tried: list[Node] = []
        while len(tried) < len(members):
            chosen = picker.pick(f"user-{number}", tried, 0.0)
            assert chosen not in tried
            assert chosen is not None
            tried.append(chosen)
        assert picker.pick(f"user-{number}", tried, 0.0) in members


healths = st.sampled_from([Health.HEALTHY, Health.HEALTHY, Health.UNHEALTHY, Health.DRAINING])


@st.composite
def clusters(draw: st.DrawFn) -> list[Node]:
    members = []
    for number in range(draw(st.integers(0, 7))):
        made = node(
            f"e{number}",
            weight=draw(st.sampled_from([1, 1, 2, 7, 1000])),
            zone=draw(st.sampled_from(["a", "b"])),
            health=draw(healths),
            added_at=draw(st.sampled_from([-math.inf, 0.0, 50.0, 99.0, 100.0])),
        )
        made.ejected = draw(st.booleans())
        for _ in range(draw(st.integers(0, 3))):
            made.load.start(0.0)
        members.append(made)
    return members


@given(
    members=clusters(),
    algorithm=st.sampled_from(Algorithm),
    threshold=st.sampled_from([0.0, 50.0, 100.0]),
    slow_start=st.sampled_from([0.0, 60.0]),
    zone=st.sampled_from(["", "a", "c"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_whatever_the_cluster_only_usable_endpoints_are_picked_and_excluded_ones_last(
    members: list[Node],
    algorithm: Algorithm,
    threshold: float,
    slow_start: float,
    zone: str,
    seed: int,
    data: st.DataObject,
) -> None:
    settings = LoadBalancer(algorithm=algorithm, panic_threshold=threshold, slow_start=slow_start)
    picker = build(settings, members, zone=zone, seed=seed, now=100.0)
    present = [member for member in members if member.endpoint.health is not Health.DRAINING]
    usable = [member for member in present if member.endpoint.health is Health.HEALTHY and not member.ejected]
    if len(usable) < len(present) * threshold / 100.0:
        usable = [member for member in present if not member.ejected]
        if len(usable) < len(present) * threshold / 100.0:
            usable = present
    excluded = data.draw(st.lists(st.sampled_from(members), unique=True) if members else st.just([]))
    for number in range(12):
        chosen = picker.pick(None if number % 2 else str(number), excluded, 100.0 + number)
        if not usable:
            assert chosen is None
            continue
        assert chosen in usable
        if not set(usable) <= set(excluded):
            assert chosen not in excluded


@every_algorithm
@pytest.mark.parametrize("health", [Health.UNHEALTHY, Health.DRAINING])
def test_unhealthy_draining_and_ejected_endpoints_are_left_out(algorithm: Algorithm, health: Health) -> None:
    members = [*nodes(4), node("bad", health=health), node("ejected")]
    members[-1].ejected = True
    assert set(picked(build(algorithm, members))) == {f"orders-{number}" for number in range(4)}


@every_algorithm
def test_below_the_panic_threshold_health_is_ignored_but_draining_is_not(algorithm: Algorithm) -> None:
    members = [node("good"), *(node(f"bad-{number}", health=Health.UNHEALTHY) for number in range(2))]
    members.append(node("leaving", health=Health.DRAINING))
    assert set(picked(build(algorithm, members))) == {"good", "bad-0", "bad-1"}


@every_algorithm
def test_in_panic_what_the_client_has_seen_itself_still_holds(algorithm: Algorithm) -> None:
    """The registry comes back and has heard of nobody yet, and one instance has really died."""
    members = [node("dead"), *(node(f"alive-{number}", health=Health.UNHEALTHY) for number in range(3))]
    members[0].ejected = True
    assert set(picked(build(algorithm, members))) == {"alive-0", "alive-1", "alive-2"}


@every_algorithm
def test_in_panic_with_too_many_ejected_everybody_is_called(algorithm: Algorithm) -> None:
    members = [node(f"bad-{number}", health=Health.UNHEALTHY) for number in range(3)]
    for member in members[:2]:
        member.ejected = True
    assert set(picked(build(algorithm, members))) == {"bad-0", "bad-1", "bad-2"}


def test_at_the_panic_threshold_exactly_health_still_holds() -> None:
    members = [node("good"), node("bad", health=Health.UNHEALTHY)]
    assert set(picked(build(Algorithm.RANDOM, members))) == {"good"}


def test_a_panic_threshold_of_zero_turns_panic_off() -> None:
    members = [node("bad", health=Health.UNHEALTHY)]
    assert build(LoadBalancer(panic_threshold=0.0), members).pick(None, (), 0.0) is None


def test_in_panic_all_zones_share() -> None:
    members = [node("near", zone="a", health=Health.UNHEALTHY), node("far", zone="b", health=Health.UNHEALTHY)]
    assert set(picked(build(Algorithm.ROUND_ROBIN, members, zone="a"))) == {"near", "far"}


@every_algorithm
def test_calls_stay_in_the_zone_while_it_is_healthy(algorithm: Algorithm) -> None:
    members = [node("near-0", zone="a"), node("near-1", zone="a"), node("far", zone="b")]
    assert set(picked(build(algorithm, members, zone="a"))) == {"near-0", "near-1"}


@every_algorithm
def test_a_retry_with_nowhere_else_to_go_leaves_the_zone(algorithm: Algorithm) -> None:
    near, far = members = [node("near", zone="a"), node("far", zone="b")]
    picker = build(algorithm, members, zone="a")
    assert picker.pick("key", (near,), 0.0) is far
    assert picker.pick("key", (near, far), 0.0) is near


@pytest.mark.parametrize(
    ("settings", "zone"),
    [(LoadBalancer(prefer_same_zone=False), "a"), (LoadBalancer(), ""), (LoadBalancer(), "elsewhere")],
)
def test_without_preference_or_zone_all_endpoints_share(settings: LoadBalancer, zone: str) -> None:
    members = [node("near", zone="a"), node("far", zone="b")]
    assert set(picked(build(settings, members, zone=zone))) == {"near", "far"}


def test_a_service_only_in_the_callers_zone_needs_no_preference() -> None:
    assert set(picked(build(Algorithm.ROUND_ROBIN, [node("x", zone="a"), node("y", zone="a")], zone="a"))) == {"x", "y"}


def test_a_key_stays_on_its_side_when_calls_spill_over() -> None:
    members = [node(f"near-{number}", zone="a") for number in range(4)]
    members += [node(f"far-{number}", zone="b") for number in range(4)]
    for member in members[:2]:
        member.ejected = True
    pickers = [build(Algorithm.RING_HASH, members, zone="a", seed=seed) for seed in range(3)]
    owners = [{pickers[seed].pick(f"user-{number}", (), 0.0) for seed in range(3)} for number in range(200)]
    assert all(len(owner) == 1 for owner in owners)
    assert {next(iter(owner)) for owner in owners} == set(members[2:])


def test_round_robin_takes_each_in_turn_whatever_the_weights() -> None:
    members = [node("a", weight=5), node("b"), node("c")]
    order = [build_order(Algorithm.ROUND_ROBIN, members, seed) for seed in range(20)]
    assert {tuple(names[:3]) for names in order} == {("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")}
    assert all(names[:3] == names[3:] for names in order)


def build_order(algorithm: Algorithm, members: list[Node], seed: int, count: int = 6) -> list[str]:
    picker = build(algorithm, members, seed=seed)
    return [chosen.endpoint.id for _ in range(count) if (chosen := picker.pick(None, (), 0.0)) is not None]


@pytest.mark.parametrize(("weights", "documented"), [((4, 2, 1), "abacaba"), ((5, 2), "abaaaba")])
def test_weighted_round_robin_has_the_order_of_nginx_from_a_random_turn_on(
    weights: tuple[int, ...], documented: str
) -> None:
    members = [node(name, weight=weight) for name, weight in zip("abc", weights, strict=False)]
    orders = {"".join(build_order(Algorithm.WEIGHTED_ROUND_ROBIN, members, seed, 7)) for seed in range(100)}
    assert orders == {documented[start:] + documented[:start] for start in range(7)}


def test_weighted_round_robin_spreads_endpoints_of_one_weight() -> None:
    members = [node("a", weight=5), node("b"), node("c")]
    for seed in range(20):
        order = "".join(build_order(Algorithm.WEIGHTED_ROUND_ROBIN, members, seed, 70))
        assert (order.count("a"), order.count("b"), order.count("c")) == (50, 10, 10)
        assert "aaaa" not in order
        assert "bc" not in order
        assert "cb" not in order


@given(
    weights=st.lists(st.integers(1, 1000), min_size=2, max_size=12),
    seed=st.integers(0, 100),
)
def test_weighted_round_robin_is_exact_over_a_period(weights: list[int], seed: int) -> None:
    weights = [weight % 9 + 1 for weight in weights]
    members = [node(f"e{number}", weight=weight) for number, weight in enumerate(weights)]
    counts = picked(build(Algorithm.WEIGHTED_ROUND_ROBIN, members, seed=seed), 3 * sum(weights))
    assert [counts[member.endpoint.id] for member in members] == [3 * weight for weight in weights]


def test_weighted_round_robin_holds_its_shares_when_its_period_is_too_long_to_remember() -> None:
    weights = [1000 - number for number in range(60)]
    members = [node(f"e{number}", weight=weight) for number, weight in enumerate(weights)]
    picker = build(Algorithm.WEIGHTED_ROUND_ROBIN, members)
    counts = picked(picker, 6000)
    for member, weight in zip(members, weights, strict=True):
        assert abs(counts[member.endpoint.id] - 6000 * weight / sum(weights)) <= 2
    assert len(picked(picker, 100, excluded=tuple(members[:59]))) == 1


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (1000, 1)])
def test_least_request_compares_two_distinct_endpoints(weights: tuple[int, int]) -> None:
    members = [node("busy", weight=weights[0]), node("idle", weight=weights[1])]
    members[0].load.start(0.0)
    assert set(picked(build(Algorithm.LEAST_REQUEST, members))) == {"idle"}


def test_least_request_counts_calls_in_flight_for_the_weight() -> None:
    members = [node("big", weight=3), node("small")]
    for _ in range(2):
        members[0].load.start(0.0)
    members[1].load.start(0.0)
    assert set(picked(build(Algorithm.LEAST_REQUEST, members))) == {"big"}
    for _ in range(2):
        members[0].load.start(0.0)
    assert set(picked(build(Algorithm.LEAST_REQUEST, members))) == {"small"}


class Extreme(Random):
    """Draws nothing but the ends of the range."""

    def random(self) -> float:
        return (0.0, 1.0 - 2.0**-53)[self.getrandbits(1)]


@every_algorithm
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 3), (1000, 1, 1)])
def test_the_ends_of_the_range_of_draws_are_picks_like_others(
    algorithm: Algorithm, weights: tuple[int, int, int]
) -> None:
    members = [node(f"e{number}", weight=weight) for number, weight in enumerate(weights)]
    picker = build_picker(LoadBalancer(algorithm=algorithm), members, zone="", rng=Extreme(3), now=0.0)
    assert all(picker.pick(None, (), 0.0) in members for _ in range(50))


def measured(name: str, latency: float, *, weight: int = 1) -> Node:
    made = node(name, weight=weight)
    made.load.start(0.0)
    made.load.finish(0.0, latency, Outcome.SUCCESS)
    return made


def test_peak_ewma_picks_the_faster_of_two() -> None:
    assert set(picked(build(Algorithm.PEAK_EWMA, [measured("slow", 0.2), measured("fast", 0.1)]), now=1.0)) == {"fast"}


def test_peak_ewma_multiplies_latency_by_calls_in_flight() -> None:
    members = [measured("slow", 0.2), measured("fast", 0.1)]
    for _ in range(2):
        members[1].load.start(1.0)
    assert set(picked(build(Algorithm.PEAK_EWMA, members), now=1.0)) == {"slow"}


def test_peak_ewma_divides_by_weight() -> None:
    members = [measured("big", 0.2, weight=3), measured("small", 0.1)]
    assert set(picked(build(Algorithm.PEAK_EWMA, members), now=1.0)) == {"big"}
    members = [measured("big", 0.2, weight=3), measured("small", 0.05)]
    assert set(picked(build(Algorithm.PEAK_EWMA, members), now=1.0)) == {"small"}


def test_peak_ewma_tries_a_new_endpoint_and_then_waits_for_its_answer() -> None:
    members = [measured("known", 0.1), node("new")]
    picker = build(Algorithm.PEAK_EWMA, members)
    assert picker.pick(None, (), 1.0) is members[1]
    members[1].load.start(1.0)
    assert set(picked(picker, now=1.0)) == {"known"}


def test_ring_hash_sends_a_key_to_the_same_endpoint_from_every_client() -> None:
    here = build(Algorithm.RING_HASH, nodes(8), seed=1)
    there = build(Algorithm.RING_HASH, list(reversed(nodes(8))), seed=2)
    for number in range(500):
        chosen, elsewhere = here.pick(f"user-{number}", (), 0.0), there.pick(f"user-{number}", (), 9.0)
        assert chosen is not None
        assert elsewhere is not None
        assert chosen.endpoint.id == elsewhere.endpoint.id


def test_ring_hash_without_a_key_is_random() -> None:
    picker = build(Algorithm.RING_HASH, nodes(4))
    assert len({picker.pick(None, (), 0.0) for _ in range(100)}) == 4


def test_the_hash_of_a_key_never_changes() -> None:
    assert stable_hash("") == 0xE4A6A0577479B2B4
    assert stable_hash("user-1") == 0x9AAC5A8621EAE188
    assert stable_hash("\udc80") != stable_hash("\udc81"), "metadata that is not UTF-8 is a key too"


def test_ring_hash_uses_the_beginning_of_the_ring_after_its_end() -> None:
    members = nodes(2)
    picker = build(Algorithm.RING_HASH, members)
    highest = max(range(20_000), key=lambda number: stable_hash(str(number)))
    assert picker.pick(str(highest), (), 0.0) in members


@every_algorithm
def test_slow_start_gives_a_new_endpoint_less_and_then_all_of_its_share(algorithm: Algorithm) -> None:
    settings = LoadBalancer(algorithm=algorithm, slow_start=100.0)
    members = [*(measured(f"old-{number}", 0.1) for number in range(3)), measured("new", 0.1)]
    members[-1].added_at = 1000.0
    picker = build(settings, members, now=1000.0)
    shares = [picked(picker, 2000, now=now)["new"] / 2000 for now in (1000.0, 1050.0, 1100.0, 2000.0)]
    assert shares[0] < 0.1
    assert shares[0] <= shares[1] < shares[2] == pytest.approx(0.25, abs=0.07)
    assert shares[3] == pytest.approx(0.25, abs=0.07)


def test_the_members_of_the_first_snapshot_start_at_once() -> None:
    settings = LoadBalancer(algorithm=Algorithm.ROUND_ROBIN, slow_start=100.0)
    assert set(picked(build(settings, nodes(3), now=0.0), 300).values()) == {100}


def test_a_plain_picker_can_take_over_when_the_last_slow_start_ends() -> None:
    settings = LoadBalancer(slow_start=60.0)
    members = [node("first"), node("a", added_at=10.0), node("b", added_at=30.0)]
    assert next_rebuild(settings, members, 20.0) == 90.0
    assert next_rebuild(settings, members, 89.9) == 90.0
    assert next_rebuild(settings, members, 90.0) is None
    assert next_rebuild(LoadBalancer(), members, 20.0) is None
    assert next_rebuild(settings, [], 20.0) is None


def test_nodes_are_told_apart_by_identity() -> None:
    left, right = node("same"), node("same")
    assert left != right
    assert len({left, right}) == 2


def test_a_node_has_its_own_load_and_shows_what_it_is() -> None:
    load = EndpointLoad()
    made = Node(node("orders-1").endpoint, load=load, connection="channel")
    assert made.load is load
    assert made.connection == "channel"
    assert Node(made.endpoint).load is not load
    assert repr(made) == "<Node orders-1 at 10.0.0.1:50051>"
