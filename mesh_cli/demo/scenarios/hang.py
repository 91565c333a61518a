"""An instance that hangs: it accepts connections and answers nothing."""

from __future__ import annotations

import time

from mesh_cli.demo.policies import PER_TRY_TIMEOUT
from mesh_cli.demo.promises import Promise, at_most, exactly
from mesh_cli.demo.stage import Stage

_EJECTED_WITHIN = 4 * PER_TRY_TIMEOUT + 1.0
_BACK_WITHIN = 10.0


class HungInstance:
    """SIGSTOP of one instance of orders, and SIGCONT later."""

    title = "A hung instance (SIGSTOP)"

    async def play(self, stage: Stage) -> list[Promise]:
        """It is ejected soon, no order fails, and it is used again when it answers again."""
        system, customers, between = stage.system, stage.customers, stage.profile.orders_between
        victim = system.of("orders")[1]
        async with customers.watched() as tally:
            await customers.finish(between // 2)
            stage.view.tell(f"SIGSTOP {victim.name}")
            await system.freeze(victim)
            ejected = await stage.until(lambda: victim.name in stage.ejected("orders"), 10.0)
            stage.view.tell(f"{victim.name} is ejected")
            await customers.finish(between)
            stage.view.tell(f"SIGCONT {victim.name}")
            system.thaw(victim)
            before, began = tally.taken_by[victim.name], time.monotonic()
            await stage.until(lambda: tally.taken_by[victim.name] > before, _BACK_WITHIN)
            back = time.monotonic() - began
        return [
            exactly(
                "hang.failed",
                f"{victim.name} hangs: failed orders",
                tally.failed,
                0,
                f"of {tally.sent}",
                tally.explain() or f"99% of the orders within {tally.slowest_percent() * 1000:.0f} ms{tally.rest()}",
            ),
            at_most(
                "hang.ejected",
                "time to its ejection",
                ejected,
                _EJECTED_WITHIN,
                "s",
                f"the policy ejects after three attempts in a row over {PER_TRY_TIMEOUT} s",
            ),
            at_most("hang.back", "time to its next order, once it runs again", back, _BACK_WITHIN, "s"),
        ]
