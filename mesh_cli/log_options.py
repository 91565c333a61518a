"""Options of commands that run until they are stopped: how much they log, and in which form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import typer

from mesh_client.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, Logs, configure_logs

LevelName = Literal["debug", "info", "warning", "error", "critical"]
FormatName = Literal["json", "text"]

LogLevel = Annotated[
    LevelName,
    typer.Option("--log-level", envvar=LEVEL_VARIABLE, case_sensitive=False, help="The least that is logged."),
]
LogFormat = Annotated[
    FormatName | None,
    typer.Option(
        "--log-format",
        envvar=FORMAT_VARIABLE,
        case_sensitive=False,
        help="One line of it for each event. Default: text on a terminal, JSON elsewhere.",
        show_default=False,
    ),
]


@contextmanager
def logged(service: str, instance: str, level: LevelName, form: FormatName | None) -> Iterator[Logs]:
    """The log of this process, within the block, on standard error."""
    logs = configure_logs(service=service, instance=instance, level=level, form=form)
    try:
        yield logs
    finally:
        logs.close()
