"""Shows a running demo: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Mapping

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mesh_cli.demo.load import Customers
from mesh_cli.demo.promises import Promise, figure
from mesh_cli.demo.system import System
from mesh_client.core.breaker import BreakerState
from mesh_client.mesh import Mesh

_REFRESH = 0.2
_SHOWN_EVENTS = 5
_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"up": "green", "killed": "bold red", "hung": "bold yellow", "failing": "bold red", "leaving": "cyan"}


class Screen:
    """Tells what happens. Use `following` around a running system to see it live.

    Args:
        console: where to.
        live: redraw a table in place; by default on a terminal that is not a build's log.
    """

    def __init__(
        self, console: Console, *, live: bool | None = None, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.live = console.is_terminal and not environment.get("CI") if live is None else live
        self._console = console
        self._began = time.monotonic()
        self._events: deque[Text] = deque(maxlen=_SHOWN_EVENTS)
        self._title = ""
        self._rates: deque[int] = deque([0] * 40, maxlen=40)
        self._seen = 0

    def scenario(self, number: int, of: int, title: str) -> None:
        """A scenario begins."""
        self._title = f"{number}/{of} {title}"
        if not self.live:
            self._console.print(Text(f"{self._clock()} == {self._title}", "bold"))

    def tell(self, text: str) -> None:
        """One line about what happens now."""
        line = Text(f"{self._clock()}    {text}")
        if self.live:
            self._events.append(line)
        else:
            self._console.print(line)

    def promise(self, promise: Promise) -> None:
        """A promise was measured."""
        mark = Text("kept  ", "green") if promise.ok else Text("BROKEN", "bold red")
        note = f" ({promise.note})" if promise.note else ""
        self._console.print(
            Text.assemble(f"{self._clock()} ", mark, f" {promise.promise}: {figure(promise)}{note}"), soft_wrap=True
        )

    async def follow(self, system: System, mesh: Mesh, customers: Customers) -> None:
        """Redraws until cancelled; does nothing where nothing is live."""
        if not self.live:
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                done = customers.total.placed + customers.total.failed
                self._rates.append(done - self._seen)
                self._seen = done
                live.update(self._draw(system, mesh, customers), refresh=True)
                await asyncio.sleep(_REFRESH)

    def _draw(self, system: System, mesh: Mesh, customers: Customers) -> Group:
        state = mesh.state()
        ejected = {end.id for known in state.services for end in known.endpoints if end.ejected}
        outstanding = {end.id: end.outstanding for known in state.services for end in known.endpoints}
        table = Table(title=Text(self._title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column, width in (("instance", 16), ("process", 18), ("mesh", 8)):
            table.add_column(column, min_width=width)
        for column in ("in flight", "orders taken"):
            table.add_column(column, justify="right", min_width=len(column))
        for instance in system.instances:
            table.add_row(
                instance.name,
                Text(f"{instance.state} ({instance.process.pid})", _STYLES.get(instance.state, "")),
                Text("ejected", "yellow")
                if instance.name in ejected
                else Text("ok" if instance.name in outstanding else ""),
                str(outstanding.get(instance.name, "")),
                str(customers.total.taken_by.get(instance.name, "") if instance.service == "orders" else ""),
            )
        breakers = [
            Text(f"{known.service} {known.breaker.value}", "" if known.breaker is BreakerState.CLOSED else "bold red")
            for known in state.services
        ]
        total = customers.total
        rate = sum(list(self._rates)[-5:]) / (5 * _REFRESH)
        counts = Text.assemble(
            f"{total.placed} orders placed, ",
            (f"{total.failed} failed", "bold red" if total.failed else "green"),
            f", {rate:.0f}/s  ",
            (_sparkline(self._rates), "cyan"),
        )
        follows = Text(f"control plane: {state.control_plane}", "" if state.in_sync else "yellow")
        return Group(table, counts, Text("breakers: ") + Text(", ").join(breakers), follows, *self._events)

    def _clock(self) -> str:
        return f"{time.monotonic() - self._began:5.1f} s"


def _sparkline(values: deque[int]) -> str:
    top = max(*values, 1)
    return "".join(_BARS[value * (len(_BARS) - 1) // top] for value in values)
