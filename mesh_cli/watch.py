"""Shows an answer once, or again and again: as tables or as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console, RenderableType

from mesh_cli.client import UnreachableError
from mesh_cli.output import Json, console, write_error, write_json

Answer = TypeVar("Answer")


def show(
    fetch: Callable[[], Answer],
    render: Callable[[Answer], RenderableType],
    to_json: Callable[[Answer], Json] | None,
    interval: float | None,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Writes what ``fetch`` returns: once, or every ``interval`` seconds until Ctrl-C.

    While it repeats itself, an unreachable control plane is reported and asked again: it may be restarting. On a
    terminal each answer takes the place of the one before; JSON is then one line an answer.

    Args:
        fetch: asks the control plane.
        render: makes tables of the answer.
        to_json: makes JSON of it; None for tables.
        interval: seconds; None for once.
        wait: sleeps.

    Raises:
        MeshError: what ``fetch`` raises, except as above.
    """
    if interval is None:
        _write(fetch(), render, to_json, repeated=False)
        return
    try:
        while True:
            try:
                _write(fetch(), render, to_json, repeated=True)
            except UnreachableError as error:
                write_error(str(error))
            wait(interval)
    except KeyboardInterrupt:
        return


def _write(
    answer: Answer,
    render: Callable[[Answer], RenderableType],
    to_json: Callable[[Answer], Json] | None,
    *,
    repeated: bool,
) -> None:
    if to_json is not None:
        write_json(to_json(answer), compact=repeated)
        return
    out = console()
    if repeated and out.is_terminal:
        _write_in_place(out, render(answer))
    else:
        out.print(render(answer))


def _write_in_place(out: Console, shown: RenderableType) -> None:
    """Writes over what is on the screen, line by line, so that nothing flickers; what does not fit is cut."""
    with out.capture() as captured:
        out.print(shown)
    lines = captured.get().splitlines()
    room = max(1, out.height - 1)
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more lines; the terminal is not high enough"]
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()
