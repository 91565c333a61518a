"""The control plane dies and comes back."""

from __future__ import annotations

from mesh_cli.demo.promises import Promise, at_most, exactly
from mesh_cli.demo.stage import Stage
from mesh_cli.demo.system import SERVICES

_BACK_WITHIN = 10.0


class ControlPlaneKilled:
    """``kill -9`` of the control plane; a new one takes its address later."""

    title = "Control plane killed and restarted under load"

    async def play(self, stage: Stage) -> list[Promise]:
        """No order may fail, nobody may be forgotten, and changes must arrive again."""
        system, customers, between = stage.system, stage.customers, stage.profile.orders_between
        there = {service: {instance.name for instance in system.of(service)} for service in SERVICES}
        async with customers.watched() as tally:
            stage.view.tell("kill -9 control-plane")
            await system.kill_control_plane()
            await customers.finish(between)
            stage.view.tell("start it again")
            await system.start_control_plane()
            back = await stage.until(lambda: stage.mesh.state().in_sync, 3 * _BACK_WITHIN)
            stage.view.tell("customers hear of it again; a further instance of orders starts")
            newcomer = await system.start("orders", len(system.of("orders")) + 1)
            arrived = await stage.until(lambda: tally.taken_by[newcomer.name] > 0, _BACK_WITHIN)
            stage.view.tell(f"{newcomer.name} takes orders; now every lease that the old control plane gave runs out")
            await customers.finish(int(stage.profile.rate * stage.profile.lease_seconds) or between // 2)
            listed = {service: await stage.operator.endpoints(service) for service in SERVICES}
        forgotten = sorted(name for service in SERVICES for name in there[service] - listed[service])
        return [
            exactly(
                "control_plane.failed",
                "kill -9 and restart of the control plane: failed orders",
                tally.failed + tally.repeated,
                0,
                f"of {tally.sent}",
                tally.explain() or tally.rest().lstrip("; "),
            ),
            at_most("control_plane.back", "time until its clients follow it again", back, _BACK_WITHIN, "s"),
            at_most(
                "control_plane.changes",
                "time until a new instance takes orders, by way of the new control plane",
                arrived,
                _BACK_WITHIN,
                "s",
            ),
            exactly(
                "control_plane.forgotten",
                "instances that the new control plane does not know",
                len(forgotten),
                0,
                f"of {sum(map(len, there.values()))}",
                ", ".join(forgotten),
            ),
        ]
