"""Figures: what a run measured, how it is judged, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the results.

    Attributes:
        id: dotted name.
        value: the figure; where there were rounds, the median over them.
        unit: of the value and the spread; ``x`` for a ratio.
        goal: the value must not be above it; None for a figure without a goal.
        spread: smallest and largest value of any round.
        about: what it is, in words.
        at_least: the value must not be below the goal instead.
    """

    id: str
    value: float
    unit: str
    goal: float | None
    spread: tuple[float, float]
    about: str
    at_least: bool = False

    @property
    def ok(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @classmethod
    def of_rounds(
        cls,
        id: str,
        values: Sequence[float],
        unit: str,
        about: str,
        goal: float | None = None,
        *,
        at_least: bool = False,
    ) -> Figure:
        """The figure that several rounds measured."""
        return cls(id, median(values), unit, goal, (min(values), max(values)), about, at_least)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of the values do not exceed, by the nearest-rank method."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def write(figures: Sequence[Figure], path: Path) -> None:
    """Writes ``results.json``: one row a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(figure), "ok": figure.ok} for figure in figures]
    path.write_text(json.dumps(rows, indent=2) + "\n")


def show(figures: Sequence[Figure], console: Console) -> None:
    """Prints the table."""
    table = Table("figure", "value", "spread", "goal", "", "what it is", title="grpc-mesh benchmarks")
    for column in table.columns[1:4]:
        column.justify = "right"
    verdicts = {None: "", True: "[green]ok[/]", False: "[red]missed[/]"}
    for figure in figures:
        form = _form(figure.unit)
        low, high = figure.spread
        table.add_row(
            figure.id,
            f"{form(figure.value)} {figure.unit}",
            f"{form(low)} .. {form(high)}",
            "" if figure.goal is None else f"{'>=' if figure.at_least else '<='} {form(figure.goal)}",
            verdicts[figure.ok],
            figure.about,
        )
    console.print(table)


def _form(unit: str) -> Callable[[float], str]:
    return "{:.3f}".format if unit == "x" else "{:.0f}".format if unit == "1/s" else "{:.1f}".format
