"""Whether Consul is as the control plane needs it: every agent, its clock, and what the token may do."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from control_plane.sources.blocking_query import Failure
from control_plane.sources.consul_answers import policy_prefix
from control_plane.sources.consul_http import ConsulAddress, ConsulError, ConsulReader, ConsulToken
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.policy import ServicePolicy

PATIENCE = 3.0
"""Seconds that an agent has for each answer."""

_ANY = "mesh-check-any"
"""In place of a name that nothing has."""


class Acls(enum.Enum):
    """Whether Consul asks for tokens."""

    UNKNOWN = "unknown"
    ENABLED = "enabled"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class AgentState:
    """One agent. Empty texts mean that there is none."""

    address: str
    problem: str = ""
    leader: str = ""
    clock: float | None = None
    """Seconds since the epoch, whole ones."""


@dataclass(frozen=True, slots=True)
class Right:
    """Something that a token may do or not, and how Consul is asked for it."""

    rule: str
    needed: bool
    reason: str
    resource: str
    access: str
    segment: str = ""


@dataclass(frozen=True, slots=True)
class ConsulDiagnosis:
    """What was found out."""

    agents: tuple[AgentState, ...]
    acls: Acls = Acls.UNKNOWN
    rights: tuple[tuple[Right, bool], ...] = ()
    """With whether the token has each; empty where that could not be found out."""


def _prefix(kind: type[ServicePolicy | EdgePolicy], access: str, reason: str) -> Right:
    prefix = policy_prefix(kind)
    return Right(f'key_prefix "{prefix}" {{ policy = "{access}" }}', True, reason, "key", access, prefix + _ANY)


RIGHTS = (
    Right('service_prefix "" { policy = "read" }', True, "endpoints are not seen", "service", "read", _ANY),
    Right('node_prefix "" { policy = "read" }', True, "endpoints are not seen", "node", "read", _ANY),
    _prefix(ServicePolicy, "read", "policies are not obeyed"),
    _prefix(ServicePolicy, "write", "mesh policy apply and delete fail"),
    _prefix(EdgePolicy, "read", "policies of edges are not obeyed"),
    _prefix(EdgePolicy, "write", "mesh edge apply and delete fail"),
    Right('acl = "write"', False, "make tokens for everything", "acl", "write"),
    Right('operator = "write"', False, "change the cluster", "operator", "write"),
    Right('key_prefix "" { policy = "write" }', False, "write every key", "key", "write", _ANY),
    Right('service_prefix "" { policy = "write" }', False, "register every service", "service", "write", _ANY),
    Right('node_prefix "" { policy = "write" }', False, "change every node", "node", "write", _ANY),
    Right('agent_prefix "" { policy = "write" }', False, "reconfigure agents", "agent", "write", _ANY),
)
"""What the control plane needs of a token, and what none needs that it has."""


async def diagnose(addresses: Sequence[ConsulAddress], token: ConsulToken) -> ConsulDiagnosis:
    """Asks every agent; what the token may do, the first that answers. Never raises."""
    agents = await asyncio.gather(*(_agent(address, token) for address in addresses))
    for address, agent in zip(addresses, agents, strict=True):
        if not agent.problem:
            acls, rights = await _rights(address, token)
            return ConsulDiagnosis(tuple(agents), acls, rights)
    return ConsulDiagnosis(tuple(agents))


async def _agent(address: ConsulAddress, token: ConsulToken) -> AgentState:
    try:
        async with ConsulReader([address], token, grace=PATIENCE) as reader:
            answer = await reader.get("/v1/status/leader")
    except ConsulError as error:
        return AgentState(str(address), problem=str(error))
    leader = answer.body if isinstance(answer.body, str) else ""
    return AgentState(str(address), leader=leader, clock=_clock(answer.date))


async def _rights(address: ConsulAddress, token: ConsulToken) -> tuple[Acls, tuple[tuple[Right, bool], ...]]:
    questions = [{"Resource": each.resource, "Access": each.access, "Segment": each.segment} for each in RIGHTS]
    try:
        async with ConsulReader([address], token, grace=PATIENCE) as reader:
            # The path is that of Consul's own web page.
            answer = await reader.post("/v1/internal/acl/authorize", questions)
    except ConsulError as error:
        if error.failure is Failure.FORBIDDEN and "ACL support disabled" in str(error):
            return Acls.DISABLED, ()
        # A token that Consul does not know has no rights, and may not even ask.
        forbidden = error.failure is Failure.FORBIDDEN
        return (Acls.ENABLED, tuple((right, False) for right in RIGHTS)) if forbidden else (Acls.UNKNOWN, ())
    verdicts = answer.body if isinstance(answer.body, list) else []
    if len(verdicts) != len(RIGHTS) or not all(isinstance(each, dict) for each in verdicts):
        return Acls.UNKNOWN, ()
    return Acls.ENABLED, tuple((right, each.get("Allow") is True) for right, each in zip(RIGHTS, verdicts, strict=True))


def _clock(date: str) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
