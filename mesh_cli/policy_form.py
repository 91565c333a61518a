"""Policies on a terminal: the settings that differ from the defaults, and the difference of two in colours."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from control_plane import policy_text
from control_plane.policy_text import Message, model_of
from mesh_cli.output import Json, printable

stated, effective, to_yaml, stated_yaml = (
    policy_text.stated,
    policy_text.effective,
    policy_text.to_yaml,
    policy_text.stated_yaml,
)

_DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def settings(policy: Message) -> list[str]:
    """Names of the top-level settings that differ from the defaults."""
    full = effective(policy)
    named_by = model_of(policy).NAMED_BY
    defaults = model_of(policy).parse({named_by: full.get(named_by, "defaults")}).dump()
    return [name for name, value in full.items() if name != named_by and defaults.get(name) != value]


def difference(before: dict[str, Json], after: dict[str, Json], before_name: str, after_name: str) -> Iterator[str]:
    """A unified diff of two policies, line by line, without line ends; nothing when they are equal."""
    return policy_text.difference(before, after, printable(before_name), printable(after_name))


def coloured(line: str) -> Text:
    """One line of a diff in its colour."""
    style = "bold" if line.startswith(("+++", "---")) else _DIFF_COLOURS.get(line[:1], "")
    return Text(printable(line), style=style)
