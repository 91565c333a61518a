"""Every command of `mesh`, found by walking through its tree: what is held of all of them is held of new ones too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from mesh_cli.app import app


def walk() -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words of each command and group, with what typer has made of it."""
    yield from _below((), typer.main.get_command(app))


def _below(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, each in getattr(command, "commands", {}).items():
        yield from _below((*words, name), each)


def options(command: Any) -> set[str]:
    """The long and short names of a command's options."""
    return {name for parameter in command.params for name in parameter.opts if name.startswith("-")}


EVERY = dict(walk())
COMMANDS = list(EVERY)
LEAVES = {words: command for words, command in EVERY.items() if not hasattr(command, "commands")}
ASKING = {words: command for words, command in LEAVES.items() if {"--operator", "--timeout"} <= options(command)}
"""Those that ask a control plane, as an operator."""
