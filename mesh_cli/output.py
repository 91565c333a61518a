"""What the `mesh` command writes: consoles, tables, ages, JSON, and errors in one line."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec

import typer
from google.protobuf.duration_pb2 import Duration
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from control_plane import message_json
from mesh_client.core.errors import MeshError

Json = message_json.Json
seconds, moment, to_json = message_json.seconds, message_json.moment, message_json.to_json

Parameters = ParamSpec("Parameters")

PIPE_WIDTH = 200
"""Columns of what is not written to a terminal: a table is never cut for `grep`."""


class Failure(MeshError):  # noqa: N818 - it is an outcome of a command whose message has been written already
    """A command failed and has written why. Ends it with exit code 1."""


def console(*, stderr: bool = False) -> Console:
    """A console on the current standard output or error: no markup in what others named, no colour in a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False, soft_wrap=False)


def printable(text: str) -> str:
    """The text with control characters escaped: clients name themselves, and a terminal obeys escapes."""
    return "".join(_escape(character) if unicodedata.category(character)[0] == "C" else character for character in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class Indented:
    """A text with so many spaces before each of its lines, and none behind: a pipe takes every space for text."""

    def __init__(self, text: Text, by: int) -> None:
        self._text = text
        self._by = by

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._text.wrap(console, max(1, options.max_width - self._by)):
            line.rstrip()
            yield Text.assemble(" " * self._by, line)


def table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table without lines, whose rows can be cut up by other tools; columns in ``right`` are aligned to the right."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def add_row(to: Table, *cells: str | Text) -> None:
    """Adds a row of plain text; what others named cannot style the terminal."""
    to.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells))


def age(value: float | Duration) -> str:
    """A span of time in its two largest units: ``3.2s``, ``42s``, ``4m12s``, ``2h05m``, ``3d04h``."""
    span = seconds(value) if isinstance(value, Duration) else value
    if span < 10:
        return f"{math.floor(span * 10) / 10:g}s"
    whole = int(span)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def count(number: int, noun: str) -> str:
    """``1 endpoint``, ``2 endpoints``; "policy" gives "policies", "process" gives "processes"."""
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {plural}"


def write_json(value: Json, *, compact: bool = False) -> None:
    """Writes JSON to standard output: indented, or in one line so that a stream of them can be read line by line."""
    text = json.dumps(value, indent=None if compact else 2, separators=(",", ":") if compact else None)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_error(message: str) -> None:
    """Writes one error to standard error, in one line however long it is."""
    console(stderr=True).print(Text.assemble(("mesh: ", "bold red"), printable(message)), soft_wrap=True)


def write_warning(message: str) -> None:
    """Writes one warning to standard error, in one line however long it is."""
    console(stderr=True).print(Text.assemble(("mesh: ", "bold yellow"), printable(message)), soft_wrap=True)


def reports_errors(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Turns an expected error of a command into one line on standard error and exit code 1, never a traceback."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except Failure:
            raise typer.Exit(1) from None
        except MeshError as error:
            write_error(str(error))
            raise typer.Exit(1) from None

    return run


def names(of: Sequence[str]) -> str:
    """A list of names in a sentence, or a dash."""
    return ", ".join(map(printable, of)) or "-"
