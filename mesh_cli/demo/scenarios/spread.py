"""How each algorithm spreads orders over the instances."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import mesh_client
from mesh_cli.demo import policies
from mesh_cli.demo.load import Tally, new_key
from mesh_cli.demo.promises import Promise, at_least, at_most, exactly
from mesh_cli.demo.stage import Stage
from mesh_client.core.policy import Algorithm

_CONCURRENCY = 8
_ORDERS_PER_KEY = 4


class Spread:
    """Applies one algorithm after the other and counts who took the orders."""

    title = "Spread of the calls, by algorithm"

    async def play(self, stage: Stage) -> list[Promise]:
        """One promise for each of the six."""
        await stage.customers.pause()
        promises = []
        for algorithm in Algorithm:
            stage.view.tell(f"policy of orders: {algorithm.value}")
            await stage.operator.apply(policies.orders(algorithm))
            if algorithm is Algorithm.RING_HASH:
                promises.append(await _stickiness(stage))
            else:
                tally = await stage.customers.burst(stage.profile.spread_orders, _CONCURRENCY)
                promises.append(_judge(stage, algorithm, tally))
        await stage.operator.apply(policies.orders())
        stage.customers.go_on()
        return promises


def _judge(stage: Stage, algorithm: Algorithm, tally: Tally) -> Promise:
    id = f"spread.{algorithm.value.lower()}"
    instances = stage.system.of("orders")
    weights = {instance.name: stage.system.layout.weight("orders", instance.number) for instance in instances}
    shares = {name: 100.0 * tally.taken_by[name] / max(tally.placed, 1) for name in weights}
    note = _shown(tally.taken_by)
    if tally.failed:
        return exactly(id, f"{algorithm.value}: every order is placed", tally.failed, 0, "failed", tally.explain())
    if algorithm in (Algorithm.LEAST_REQUEST, Algorithm.PEAK_EWMA):
        # They follow load and latency, so a fixed share would be wrong.
        return at_least(id, f"{algorithm.value} leaves nobody idle: smallest share", min(shares.values()), 3, "%", note)
    if algorithm is Algorithm.ROUND_ROBIN:
        fair = dict.fromkeys(weights, 100.0 / len(weights))
        words, goal = "ROUND_ROBIN is even: largest deviation", 3.0
    else:
        fair = {name: 100.0 * weight / sum(weights.values()) for name, weight in weights.items()}
        words, goal = f"{algorithm.value} follows the weights 1:1:2: largest deviation", 3.0
    if algorithm is Algorithm.RANDOM:
        # Four standard deviations of a binomial share: one run in some thousands misses by chance.
        goal = float(math.ceil(400.0 * math.sqrt(0.25 / tally.placed)))
    deviation = max(abs(shares[name] - fair[name]) for name in weights)
    return at_most(id, words, deviation, goal, "points", note)


async def _stickiness(stage: Stage) -> Promise:
    homes: defaultdict[str, set[str]] = defaultdict(set)
    taken_by: Counter[str] = Counter()
    for _ in range(_ORDERS_PER_KEY):
        for number in range(stage.profile.hash_keys):
            with mesh_client.hash_key(f"customer-{number}"):
                order = await stage.customers.place(new_key())
            homes[f"customer-{number}"].add(order.taken_by)
            taken_by[order.taken_by] += 1
    sticky = sum(len(home) == 1 for home in homes.values())
    share = 100.0 * sticky / len(homes)
    note = f"{len(homes)} customers on {len(taken_by)} instances: {_shown(taken_by)}"
    return exactly("spread.ring_hash", "RING_HASH keeps each customer at one instance", share, 100, "%", note)


def _shown(taken_by: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(taken_by.items()))
