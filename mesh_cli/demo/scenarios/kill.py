"""Instances that die under load."""

from __future__ import annotations

import math
from functools import partial

from mesh_cli.demo.promises import Promise, at_most, exactly
from mesh_cli.demo.stage import Stage

_AVOIDED_WITHIN = 5.0


class KilledInstances:
    """``kill -9`` of one instance of orders and one of inventory."""

    title = "kill -9 under load"

    async def play(self, stage: Stage) -> list[Promise]:
        """No order may fail, and nobody may wait long."""
        system, customers, between = stage.system, stage.customers, stage.profile.orders_between
        victims = [system.of("orders")[0], system.of("inventory")[0]]
        ejected = math.inf
        retries = stage.service("orders").retries
        async with customers.watched() as tally:
            await customers.finish(between // 2)
            for victim in victims:
                stage.view.tell(f"kill -9 {victim.name}")
                victim.state = "killed"
                await victim.process.kill()
                if victim.service == "orders":
                    ejected = await stage.until(partial(stage.avoids, victim.service, victim.name), _AVOIDED_WITHIN)
                await customers.finish(between)
        retries = stage.service("orders").retries - retries
        for victim in victims:
            stage.view.tell(f"start a replacement of {victim.name}")
            replacement = await system.start(victim.service, victim.number)
            await stage.operator.until_listed(victim.service, replacement.name)
        return [
            exactly(
                "kill.failed",
                f"kill -9 of {' and of '.join(victim.name for victim in victims)}: failed orders",
                tally.failed,
                0,
                f"of {tally.sent}",
                tally.explain() or _saved(retries, tally.slowest_percent()) + tally.rest(),
            ),
            at_most(
                "kill.avoided",
                f"time until {victims[0].name} is not tried any more",
                ejected,
                _AVOIDED_WITHIN,
                "s",
                "the policy ejects after three failures in a row",
            ),
        ]


def _saved(retries: int, slowest_percent: float) -> str:
    """What it took. Retries of orders' own calls are counted in its processes, not here."""
    repeated = "1 retry saved a call" if retries == 1 else f"{retries} retries saved calls"
    return f"{repeated} of the customers; 99% of the orders within {slowest_percent * 1000:.0f} ms"
