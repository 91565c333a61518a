"""100,000 picks of each balancer, with a seeded generator and a fake clock; each tolerance is stated beside it."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random

import pytest

from mesh_client.core.balancer import Node, Picker, build_picker
from mesh_client.core.model import Endpoint, Health, Locality, Outcome
from mesh_client.core.policy import Algorithm, LoadBalancer

PICKS = 100_000
WEIGHTED = [Algorithm.LEAST_REQUEST, Algorithm.WEIGHTED_ROUND_ROBIN, Algorithm.RANDOM]


def node(name: str, *, weight: int = 1, zone: str = "", added_at: float = -math.inf) -> Node:
    return Node(Endpoint(name, "10.0.0.1", 50051, weight=weight, locality=Locality(zone=zone)), added_at=added_at)


def nodes(count: int, *, zone: str = "") -> list[Node]:
    return [node(f"orders-{zone}{number}", zone=zone) for number in range(count)]


def build(settings: LoadBalancer, members: list[Node], *, zone: str = "", seed: int = 7, now: float = 0.0) -> Picker:
    return build_picker(settings, members, zone=zone, rng=Random(seed), now=now)


def pick_many(picker: Picker, count: int = PICKS, *, now: float = 0.0, keyed: bool = False) -> Counter[Node]:
    """Picks of calls that are over before the next one begins."""
    counts: Counter[Node] = Counter()
    for number in range(count):
        chosen = picker.pick(f"user-{number}" if keyed else None, (), now)
        assert chosen is not None
        counts[chosen] += 1
    return counts


def run(
    picker: Picker, rng: Random, latency: Callable[[Node], float], *, rate: float, calls: int = PICKS
) -> tuple[Counter[Node], list[float]]:
    """Calls that arrive at random, ``rate`` a second, and take their endpoint's exponential latency.

    Returns the calls of each endpoint and the latency of each call.
    """
    counts: Counter[Node] = Counter()
    latencies = []
    ends: list[tuple[float, int, float, Node]] = []
    now = 0.0
    for number in range(calls):
        now += rng.expovariate(rate)
        while ends and ends[0][0] <= now:
            end, _, started_at, ended = heapq.heappop(ends)
            ended.load.finish(started_at, end, Outcome.SUCCESS)
        chosen = picker.pick(None, (), now)
        assert chosen is not None
        chosen.load.start(now)
        took = rng.expovariate(1.0 / latency(chosen))
        counts[chosen] += 1
        latencies.append(took)
        heapq.heappush(ends, (now + took, number, now, chosen))
    return counts, latencies


def tenfold(slow: Node, chosen: Node) -> float:
    """Average latency in seconds when one endpoint takes ten times as long as the others."""
    return 0.1 if chosen is slow else 0.01


@pytest.mark.parametrize("algorithm", [Algorithm.ROUND_ROBIN, Algorithm.WEIGHTED_ROUND_ROBIN])
def test_rotation_is_exactly_equal(algorithm: Algorithm) -> None:
    counts = pick_many(build(LoadBalancer(algorithm=algorithm), nodes(10)))
    assert set(counts.values()) == {PICKS // 10}


@pytest.mark.parametrize("algorithm", [Algorithm.LEAST_REQUEST, Algorithm.RANDOM, Algorithm.PEAK_EWMA])
def test_random_choice_is_equal_within_four_standard_deviations(algorithm: Algorithm) -> None:
    counts = pick_many(build(LoadBalancer(algorithm=algorithm), nodes(10)))
    deviation = math.sqrt(PICKS * 0.1 * 0.9)
    assert all(abs(count - PICKS / 10) < 4 * deviation for count in counts.values())


def test_a_ring_shares_keys_within_a_quarter() -> None:
    counts = pick_many(build(LoadBalancer(algorithm=Algorithm.RING_HASH), nodes(10)), keyed=True)
    assert all(abs(count - PICKS / 10) < 0.25 * PICKS / 10 for count in counts.values())


@pytest.mark.parametrize("algorithm", WEIGHTED)
def test_shares_follow_weights_within_three_percent(algorithm: Algorithm) -> None:
    members = [node(f"orders-{weight}", weight=weight) for weight in (1, 2, 3, 4, 10)]
    counts = pick_many(build(LoadBalancer(algorithm=algorithm), members))
    for member in members:
        assert counts[member] == pytest.approx(PICKS * member.endpoint.weight / 20, rel=0.03)


def test_shares_on_a_ring_follow_weights_within_a_quarter() -> None:
    members = [node(f"orders-{weight}", weight=weight) for weight in (10, 20, 30, 40)]
    counts = pick_many(build(LoadBalancer(algorithm=Algorithm.RING_HASH), members), keyed=True)
    for member in members:
        assert counts[member] == pytest.approx(PICKS * member.endpoint.weight / 100, rel=0.25)


@pytest.mark.parametrize("algorithm", [Algorithm.LEAST_REQUEST, Algorithm.PEAK_EWMA])
def test_shares_follow_weights_under_load_too_within_a_tenth(algorithm: Algorithm) -> None:
    """At 90% of what the servers can do: each works on four calls for its weight at once, 10 ms each."""
    members = [node(f"orders-{number}", weight=weight) for number, weight in enumerate((1, 1, 2, 2, 4))]
    picker = build(LoadBalancer(algorithm=algorithm), members)
    counts, _ = run(
        picker,
        Random(11),
        lambda chosen: 0.01 * max(1.0, chosen.load.outstanding / (4.0 * chosen.endpoint.weight)),
        rate=3600.0,
    )
    for member in members:
        assert counts[member] == pytest.approx(PICKS * member.endpoint.weight / 10, rel=0.1)


def test_two_choices_bound_the_highest_load_where_random_choice_does_not() -> None:
    """100,000 calls that never end, on 100 endpoints.

    Two choices exceed the average by about log2(ln n) + O(1), independent of the number of calls; random choice by
    about sqrt(2 * average * ln n), here 96 (Mitzenmacher; Berenbrink et al. for the heavily loaded case).
    """
    excess = {}
    for algorithm in (Algorithm.LEAST_REQUEST, Algorithm.RANDOM):
        members = nodes(100)
        picker = build(LoadBalancer(algorithm=algorithm), members)
        for _ in range(PICKS):
            chosen = picker.pick(None, (), 0.0)
            assert chosen is not None
            chosen.load.start(0.0)
        excess[algorithm] = max(member.load.outstanding for member in members) - PICKS // 100
    assert excess[Algorithm.LEAST_REQUEST] <= 5
    assert excess[Algorithm.RANDOM] >= 50


def test_least_request_sends_a_tenfold_slower_endpoint_less_than_half_of_its_turn() -> None:
    members = nodes(10)
    picker = build(LoadBalancer(algorithm=Algorithm.LEAST_REQUEST), members)
    counts, _ = run(picker, Random(3), partial(tenfold, members[0]), rate=1000.0)
    assert counts[members[0]] < 0.5 * PICKS / 10


def test_peak_ewma_avoids_a_tenfold_slower_endpoint() -> None:
    """The slow endpoint gets under 2% of the calls instead of 10%, and the average latency is near the fast ones'."""
    average = {}
    slow_calls = {}
    for algorithm in (Algorithm.PEAK_EWMA, Algorithm.ROUND_ROBIN):
        members = nodes(10)
        slow = members[0]
        picker = build(LoadBalancer(algorithm=algorithm), members)
        counts, latencies = run(picker, Random(3), partial(tenfold, slow), rate=1000.0)
        average[algorithm] = sum(latencies) / len(latencies)
        slow_calls[algorithm] = counts[slow]
    assert 0 < slow_calls[Algorithm.PEAK_EWMA] < 0.02 * PICKS
    assert average[Algorithm.PEAK_EWMA] < 0.0115
    assert average[Algorithm.ROUND_ROBIN] > 0.018


def test_peak_ewma_comes_back_to_an_endpoint_that_has_recovered() -> None:
    members = nodes(10)
    picker = build(LoadBalancer(algorithm=Algorithm.PEAK_EWMA), members)
    arrivals = 0

    def latency(chosen: Node) -> float:
        nonlocal arrivals
        arrivals += 1
        return 1.0 if chosen is members[0] and arrivals < 10_000 else 0.01

    counts, _ = run(picker, Random(5), latency, rate=1000.0)
    assert counts[members[0]] > 0.25 * PICKS / 10


@pytest.mark.parametrize("weights", [[1] * 10, [1, 2, 3, 4, 5, 5, 4, 3, 2, 1]])
def test_a_ring_moves_only_the_keys_of_the_endpoint_that_leaves(weights: list[int]) -> None:
    members = [node(f"orders-{number}", weight=weight) for number, weight in enumerate(weights)]
    settings = LoadBalancer(algorithm=Algorithm.RING_HASH)
    before, after = build(settings, members), build(settings, members[1:])
    moved = 0
    for number in range(PICKS):
        owner = before.pick(f"user-{number}", (), 0.0)
        if owner is not after.pick(f"user-{number}", (), 0.0):
            assert owner is members[0]
            moved += 1
    # Its fair share and a quarter, for the unevenness of a ring.
    assert moved <= 1.25 * PICKS * weights[0] / sum(weights)


def test_a_ring_moves_keys_to_the_endpoint_that_joins_and_nowhere_else() -> None:
    members = nodes(11)
    settings = LoadBalancer(algorithm=Algorithm.RING_HASH)
    before, after = build(settings, members[:10]), build(settings, members)
    moved = 0
    for number in range(PICKS):
        owner = after.pick(f"user-{number}", (), 0.0)
        if owner is not before.pick(f"user-{number}", (), 0.0):
            assert owner is members[10]
            moved += 1
    # Its fair share of 1/11 and a quarter, for the unevenness of a ring.
    assert 0.75 * PICKS / 11 < moved < 1.25 * PICKS / 11


def test_keys_of_an_excluded_endpoint_spread_over_all_others() -> None:
    members = nodes(10)
    picker = build(LoadBalancer(algorithm=Algorithm.RING_HASH), members)
    counts: Counter[Node | None] = Counter()
    for number in range(PICKS):
        if picker.pick(f"user-{number}", (), 0.0) is members[0]:
            counts[picker.pick(f"user-{number}", (members[0],), 0.0)] += 1
    assert set(counts) == set(members[1:])
    assert max(counts.values()) < 0.3 * counts.total()


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize(
    ("near_usable", "far_usable", "share"),
    [
        (10, 10, 1.0),
        (8, 10, 1.0),  # 1.4 * 0.8 > 1: the spare capacity is meant for this
        (5, 10, 0.7),  # 1.4 * 0.5
        (1, 10, 0.14),
        (4, 2, 2 / 3),  # 0.56 here and 0.28 there, scaled up to 1
    ],
)
def test_calls_leave_the_zone_as_its_endpoints_fail(
    algorithm: Algorithm, near_usable: int, far_usable: int, share: float
) -> None:
    near, far = nodes(10, zone="a"), nodes(10, zone="b")
    for member in near[near_usable:] + far[far_usable:]:
        member.ejected = True
    settings = LoadBalancer(algorithm=algorithm, panic_threshold=0.0)
    counts = pick_many(build(settings, near + far, zone="a"), PICKS // 5, keyed=True)
    # 20,000 picks: four standard deviations of a share of a half are 0.014.
    assert sum(counts[member] for member in near) / (PICKS // 5) == pytest.approx(share, abs=0.015)
    assert all(not member.ejected for member in counts)


@pytest.mark.parametrize("algorithm", [*WEIGHTED, Algorithm.ROUND_ROBIN, Algorithm.RING_HASH])
def test_slow_start_raises_the_share_of_a_new_endpoint_along_a_line(algorithm: Algorithm) -> None:
    """Nine old endpoints and a new one; its weight is a tenth at first and then its age over the window."""
    settings = LoadBalancer(algorithm=algorithm, slow_start=100.0)
    members = [*nodes(9), node("new", added_at=1000.0)]
    picker = build(settings, members, now=1000.0)
    # A ring is uneven by about 8% of a full share, and its steps are coarse; the others are within a tenth.
    tolerance = 0.02 if algorithm is Algorithm.RING_HASH else 0.005
    full = pick_many(build(settings, members, now=2000.0), PICKS // 5, now=2000.0, keyed=True)[members[9]]
    for age in (0.0, 5.0, 25.0, 50.0, 75.0, 100.0):
        factor = max(0.1, age / 100.0)
        counts = pick_many(picker, PICKS // 5, now=1000.0 + age, keyed=True)
        expected = factor / (9 + factor)
        if algorithm is Algorithm.RING_HASH:
            expected *= full / (PICKS // 5) * 10
        assert counts[members[9]] / (PICKS // 5) == pytest.approx(expected, abs=tolerance)


def test_slow_start_holds_on_average_while_time_passes() -> None:
    """Weights change a hundred times on the way; a call every 10 ms still gives the new endpoint its average share."""
    settings = LoadBalancer(algorithm=Algorithm.ROUND_ROBIN, slow_start=100.0)
    members = [*nodes(9), node("new", added_at=0.0)]
    picker = build(settings, members)
    counts: Counter[Node | None] = Counter(picker.pick(None, (), number / 100) for number in range(10_000))
    average = sum(factor / (9 + factor) for factor in (max(0.1, age / 100) for age in range(100))) / 100
    assert counts[members[9]] / 10_000 == pytest.approx(average, rel=0.03)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_below_the_panic_threshold_all_endpoints_share_alike(algorithm: Algorithm) -> None:
    members = nodes(10)
    shares = {}
    for unhealthy in (5, 6):
        for number, member in enumerate(members):
            health = Health.UNHEALTHY if number < unhealthy else Health.HEALTHY
            member.endpoint = Endpoint(member.endpoint.id, "10.0.0.1", 50051, health=health)
        counts = pick_many(build(LoadBalancer(algorithm=algorithm), members), PICKS // 5, keyed=True)
        shares[unhealthy] = sum(counts[member] for member in members[:unhealthy]) / (PICKS // 5)
    assert shares[5] == 0.0, "half of them usable is not below 50%"
    assert shares[6] == pytest.approx(0.6, abs=0.06 if algorithm is Algorithm.RING_HASH else 0.015)


def test_clients_that_start_together_do_not_march_in_step() -> None:
    """1,000 clients, one call each: no endpoint gets more than twice its share."""
    for algorithm in Algorithm:
        counts: Counter[str] = Counter()
        for seed in range(1000):
            members = nodes(10)
            chosen = build(LoadBalancer(algorithm=algorithm), members, seed=seed).pick(None, (), 0.0)
            assert chosen is not None
            counts[chosen.endpoint.id] += 1
        assert max(counts.values()) < 200
