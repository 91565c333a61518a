"""Policies as people read them: YAML, the effective policy with every default, and the difference of two."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import cast

import yaml
from mesh.v1 import edge_pb2, policy_pb2

from control_plane.message_json import Json, to_json
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import InvalidPolicyError
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import Policy

Message = policy_pb2.ServicePolicy | edge_pb2.EdgePolicy

_MODELS: Mapping[str, type[Policy]] = {"mesh.v1.ServicePolicy": ServicePolicy, "mesh.v1.EdgePolicy": EdgePolicy}
_CONTEXT = 3


def model_of(policy: Message) -> type[Policy]:
    """The model that the message is of."""
    return _MODELS[policy.DESCRIPTOR.full_name]


def stated(policy: Message) -> dict[str, Json]:
    """What a policy message states, as its YAML form has it; durations are numbers of seconds."""
    return to_json(policy, sparse=True)


def effective(policy: Message) -> dict[str, Json]:
    """The policy with every default filled in, as clients obey it.

    What this version of the model does not accept is shown as it is: a newer control plane may know more.
    """
    document = stated(policy)
    try:
        return cast("dict[str, Json]", model_of(policy).parse(document).dump())
    except InvalidPolicyError:
        return document


def to_yaml(document: dict[str, Json]) -> str:
    """A policy as YAML in the model's order of fields."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines, such as keys, as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def stated_yaml(policy: Message) -> str:
    """A stored policy as YAML that `mesh policy apply` takes, without what it leaves to the defaults."""
    document = stated(policy)
    try:
        model = model_of(policy).parse(document)
    except InvalidPolicyError:
        return to_yaml(document)
    return to_yaml({model.NAMED_BY: model.name, **model.model_dump(mode="json", exclude_defaults=True)})


def difference(before: dict[str, Json], after: dict[str, Json], before_name: str, after_name: str) -> Iterator[str]:
    """A unified diff of two policies, line by line, without line ends; nothing when they are equal."""
    return difflib.unified_diff(
        to_yaml(before).splitlines(),
        to_yaml(after).splitlines(),
        before_name,
        after_name,
        n=_CONTEXT,
        lineterm="",
    )
