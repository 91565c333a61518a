"""Fan-out: from a source's event to the change being applied in every subscriber."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from benchmarks.figures import Figure, percentile
from benchmarks.processes import Child, child

CLIENT_PROCESSES = 3
SIZES = (100, 1000, 4000)
GOALS = {1000: 100.0}
"""Milliseconds, p99, by the number of subscribers."""
BURST, BURST_SPACING = 40, 0.005
"""Changes, and seconds between them: a burst of 200 ms."""


async def _lags(plane: Child, clients: list[Child], first: int, count: int) -> list[float]:
    """Milliseconds from the last of ``count`` changes to its being applied, for each subscriber."""
    changed_at = await plane.ask([first, count, BURST_SPACING])
    answers = await asyncio.gather(*(client.ask(first + count - 1) for client in clients))
    return [(applied_at - changed_at) * 1000 for answer in answers for applied_at in answer]


async def _size(size: int, rounds: int) -> list[Figure]:
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(child("benchmarks.fanout_plane"))
        share = -(-size // CLIENT_PROCESSES)
        clients = [
            await stack.enter_async_context(
                child("benchmarks.fanout_clients", plane.ready, first, min(share, size - first))
            )
            for first in range(0, size, share)
        ]
        number = 1
        single: list[list[float]] = []
        burst: list[list[float]] = []
        for round_number in range(rounds + 1):
            one = await _lags(plane, clients, number, 1)
            many = await _lags(plane, clients, number + 1, BURST)
            number += 1 + BURST
            if round_number:  # The first round warms up.
                single.append(one)
                burst.append(many)
    goal = GOALS.get(size)
    figures = []
    for name, lags, about in (("one", single, "one change"), ("burst", burst, f"last of {BURST} changes in 200 ms")):
        figures += [
            Figure.of_rounds(
                f"fanout.{size}.{name}.{label}",
                [percentile(each, at) for each in lags],
                "ms",
                f"{about} to applied by {size} subscribers: {label}",
                goal if label == "p99" else None,
            )
            for label, at in (("p50", 0.5), ("p99", 0.99))
        ]
    return figures


async def fan_out(quick: bool) -> list[Figure]:
    """One change and bursts, to 100, 1000 and 4000 subscribers."""
    return [figure for size in SIZES for figure in await _size(size, 3 if quick else 10)]
