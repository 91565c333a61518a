"""The kinds of policies that commands are for, and how they speak of them."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.v1 import admin_pb2, edge_pb2, policy_pb2

from control_plane import policy_text
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import Policy

Message = policy_text.Message


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """One kind."""

    model: type[Policy]
    number: admin_pb2.PolicyKind.ValueType
    command: str
    """Of `mesh`."""
    nothing: str
    """What holds where no policy is stored."""
    none_stored: str
    """Said of an empty list."""

    @property
    def named_by(self) -> str:
        """The field that holds the name: ``service`` or ``edge``."""
        return self.model.NAMED_BY

    def called(self, name: str) -> str:
        """How messages call what the policy is for."""
        return self.model.called(name)

    def of(self, stored: admin_pb2.StoredPolicy) -> Message | None:
        """The policy, if what is stored is valid."""
        if self.model is EdgePolicy:
            return stored.edge_policy if stored.HasField("edge_policy") else None
        return stored.policy if stored.HasField("policy") else None

    def default(self, name: str) -> Message:
        """What is as good as none."""
        if self.model is EdgePolicy:
            return edge_pb2.EdgePolicy(edge=name)
        return policy_pb2.ServicePolicy(service=name)


SERVICE = PolicyKind(
    ServicePolicy,
    admin_pb2.POLICY_KIND_SERVICE,
    "policy",
    "the defaults apply",
    "No policies are stored; every service gets the defaults.",
)
EDGE = PolicyKind(
    EdgePolicy,
    admin_pb2.POLICY_KIND_EDGE,
    "edge",
    "it exposes nothing",
    "No policies of edges are stored; nothing is exposed.",
)
