"""``python -m benchmarks [--quick] [--only NAME]``: measures, prints a table, writes the results as JSON."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console

from benchmarks import calls, certificates, consul, edge, events, everything, fanout, guard, secure_calls
from benchmarks.figures import Figure, show, write

RESULTS = Path(__file__).parent / "out" / "results.json"

SUITES: dict[str, Callable[[bool], Awaitable[list[Figure]]]] = {
    "unary": calls.unary,
    "stream": calls.streams,
    "mtls": secure_calls.unary,
    "guard": guard.cost,
    "everything": everything.cost,
    "edge": edge.rest,
    "fanout": fanout.fan_out,
    "consul": consul.first_call,
    "certificates": certificates.issuance,
    "events": events.throughput_and_latency,
}


async def _measure(names: list[str], quick: bool, console: Console) -> list[Figure]:
    figures: list[Figure] = []
    for name in names:
        started = time.monotonic()
        console.print(f"[dim]{name} ...[/]", end=" ")
        figures += await SUITES[name](quick)
        console.print(f"[dim]{time.monotonic() - started:.0f} s[/]")
    return figures


def main() -> int:
    """Runs what was asked for; 1 when a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a look, not a measurement")
    parser.add_argument("--only", action="append", choices=SUITES, help="this part alone; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    arguments = parser.parse_args()
    console = Console()
    figures = asyncio.run(_measure(arguments.only or list(SUITES), arguments.quick, console))
    show(figures, console)
    write(figures, arguments.out)
    console.print(f"written to {arguments.out}")
    return 1 if any(figure.ok is False for figure in figures) else 0


if __name__ == "__main__":
    sys.exit(main())
