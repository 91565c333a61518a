"""Shows an answer once, or again and again: as tables or as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from rich.console import RenderableType

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
    if repeated:
        out.clear()
    out.print(render(answer))
