"""What the demo promises, with the figure that it measured."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise."""

    id: str
    """Stable name, for machines."""
    promise: str
    """What is promised, in words."""
    value: float
    unit: str
    goal: str
    """What ``value`` must be, such as ``= 0`` or ``<= 3``."""
    ok: bool
    note: str = ""
    """What else was measured."""


def exactly(id: str, promise: str, value: float, goal: float, unit: str, note: str = "") -> Promise:
    """A promise kept when the figure is the goal."""
    return Promise(id, promise, value, unit, f"= {goal:g}", value == goal, note)


def at_most(id: str, promise: str, value: float, goal: float, unit: str, note: str = "") -> Promise:
    """A promise kept when the figure is the goal or less; an infinite one means "never" and breaks it."""
    return Promise(id, promise, value, unit, f"<= {goal:g}", value <= goal, note)


def at_least(id: str, promise: str, value: float, goal: float, unit: str, note: str = "") -> Promise:
    """A promise kept when the figure is the goal or more."""
    return Promise(id, promise, value, unit, f">= {goal:g}", value >= goal, note)


def figure(promise: Promise) -> str:
    """The measured figure as people read it."""
    if not math.isfinite(promise.value):
        return "never"
    digits = 0 if promise.value == int(promise.value) else 1 if promise.value >= 10 else 2
    return f"{promise.value:.{digits}f} {promise.unit}"


def closing_table(promises: Sequence[Promise]) -> Table:
    """All promises with their figures, in groups of one scenario each."""
    table = Table(title="Promises", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("promise", overflow="fold")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("goal", justify="right", no_wrap=True)
    table.add_column("kept", no_wrap=True)
    for promise, following in itertools.zip_longest(promises, promises[1:]):
        kept = Text("yes", style="green") if promise.ok else Text("NO", style="bold red")
        words = Text(promise.promise)
        if promise.note:
            words.append(f"\n  {promise.note}", "dim")
        last = following is None or following.id.split(".")[0] != promise.id.split(".")[0]
        table.add_row(words, figure(promise), promise.goal, kept, end_section=last)
    return table


def write_json(promises: Sequence[Promise], path: Path) -> None:
    """Writes the promises as a JSON array of objects; the file appears whole or not at all. Null stands for never."""
    rows = [asdict(promise) for promise in promises]
    for row in rows:
        if not math.isfinite(row["value"]):
            row["value"] = None
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(rows, indent=2) + "\n")
    fresh.replace(path)
