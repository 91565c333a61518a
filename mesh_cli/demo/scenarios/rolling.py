"""A deployment: every instance is replaced under load."""

from __future__ import annotations

import asyncio
import time

from mesh_cli.demo.promises import Promise, exactly
from mesh_cli.demo.stage import Stage
from mesh_cli.demo.system import Instance


class RollingRestart:
    """SIGTERM and a successor for every instance of orders and inventory, one at a time in each service."""

    title = "Rolling restart under load"

    async def play(self, stage: Stage) -> list[Promise]:
        """No order may fail, and every instance must leave with exit code 0."""
        customers, between = stage.customers, stage.profile.orders_between
        leaving = [*stage.system.of("orders"), *stage.system.of("inventory")]
        began = time.monotonic()
        async with customers.watched() as tally:
            await asyncio.gather(*(self._restart(stage, service) for service in ("orders", "inventory")))
            elapsed = time.monotonic() - began
            await customers.finish(between // 2)
        dirty = [instance.name for instance in leaving if stage.system.exit_codes.get(instance.name) != 0]
        return [
            exactly(
                "rolling.failed",
                "rolling restart of orders and inventory: failed orders",
                tally.failed + tally.repeated,
                0,
                f"of {tally.sent}",
                tally.explain() or f"{len(leaving)} instances in {elapsed:.1f} s{tally.rest()}",
            ),
            exactly(
                "rolling.exits",
                "instances that did not leave with exit code 0",
                len(dirty),
                0,
                f"of {len(leaving)}",
                ", ".join(dirty),
            ),
        ]

    async def _restart(self, stage: Stage, service: str) -> None:
        for instance in stage.system.of(service):
            await self._replace(stage, instance)

    async def _replace(self, stage: Stage, instance: Instance) -> None:
        stage.view.tell(f"SIGTERM {instance.name}; it drains and leaves")
        await stage.system.stop(instance)
        successor = await stage.system.start(instance.service, instance.number)
        await stage.operator.until_listed(successor.service, successor.name)
        stage.view.tell(f"{successor.name} has taken its place")
