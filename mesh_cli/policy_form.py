"""Policies as people read them: YAML, the effective policy with every default, and the difference of two."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import cast

import yaml
from mesh.v1 import policy_pb2
from rich.text import Text

from mesh_cli.output import Json, printable, to_json
from mesh_client.core.errors import InvalidPolicyError
from mesh_client.core.policy import ServicePolicy

_DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}
_CONTEXT = 3


def stated(policy: policy_pb2.ServicePolicy) -> dict[str, Json]:
    """What a policy message states, as its YAML form has it; durations are numbers of seconds."""
    return to_json(policy, sparse=True)


def effective(policy: policy_pb2.ServicePolicy) -> dict[str, Json]:
    """The policy with every default filled in, as clients obey it.

    What this version of the model does not accept is shown as it is: a newer control plane may know more.
    """
    document = stated(policy)
    try:
        return cast("dict[str, Json]", ServicePolicy.parse(document).dump())
    except InvalidPolicyError:
        return document


def settings(policy: policy_pb2.ServicePolicy) -> list[str]:
    """Names of the top-level settings that differ from the defaults."""
    full = effective(policy)
    defaults = ServicePolicy(service=policy.service or "defaults").dump()
    return [name for name, value in full.items() if name != "service" and defaults.get(name) != value]


def to_yaml(document: dict[str, Json]) -> str:
    """A policy as YAML in the model's order of fields."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def stated_yaml(policy: policy_pb2.ServicePolicy) -> str:
    """A stored policy as YAML that `mesh policy apply` takes, without what it leaves to the defaults."""
    document = stated(policy)
    try:
        model = ServicePolicy.parse(document)
    except InvalidPolicyError:
        return to_yaml(document)
    return to_yaml({"service": model.service, **model.model_dump(mode="json", exclude_defaults=True)})


def difference(before: dict[str, Json], after: dict[str, Json], before_name: str, after_name: str) -> Iterator[str]:
    """A unified diff of two policies, line by line, without line ends; nothing when they are equal."""
    return difflib.unified_diff(
        to_yaml(before).splitlines(),
        to_yaml(after).splitlines(),
        printable(before_name),
        printable(after_name),
        n=_CONTEXT,
        lineterm="",
    )


def coloured(line: str) -> Text:
    """One line of a diff in its colour."""
    style = "bold" if line.startswith(("+++", "---")) else _DIFF_COLOURS.get(line[:1], "")
    return Text(printable(line), style=style)
