"""Facts by which `mesh check` tells whether a control plane and what it depends on are as they must be."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from mesh.v1 import operations_pb2 as pb

from control_plane.catalog import Catalog
from control_plane.convert import duration_to_proto
from control_plane.discovery import StreamHub
from control_plane.operations.own_log import describe_this_process
from control_plane.options import ControlPlaneOptions

if TYPE_CHECKING:
    from control_plane.identity.certificate_authority import CertificateAuthority
    from control_plane.sources.consul_diagnosis import ConsulDiagnosis

_NODES = 5
_VERSIONS = 100
"""Kinds of clients that are told apart: they name themselves."""

AskConsul = Callable[[], Awaitable["ConsulDiagnosis"]]


class Diagnosis:
    """Gathers them.

    Args:
        options: of the control plane.
        catalog: what operators have drained.
        hub: who is connected.
        authority: whose certificate it shows; None without identity.
        ask_consul: looks at Consul; None for another registry.
    """

    def __init__(
        self,
        options: ControlPlaneOptions,
        catalog: Catalog,
        hub: StreamHub,
        authority: CertificateAuthority | None,
        ask_consul: AskConsul | None,
    ) -> None:
        self._options = options
        self._catalog = catalog
        self._hub = hub
        self._authority = authority
        self._ask_consul = ask_consul

    async def gather(self, process: str) -> pb.GetDiagnosisResponse:
        """Everything at this moment.

        Args:
            process: id of this process.
        """
        consul = None if self._ask_consul is None else await self._ask_consul()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        made = pb.GetDiagnosisResponse(
            process=describe_this_process(self._options.control_plane_id, process),
            open_files_limit=_limit(soft),
            open_files_hard_limit=_limit(hard),
            open_files=_open_files(),
            max_streams=self._options.max_streams,
            registry=self._options.registry,
            clients=self._clients(),
            drains=self._drains(),
            consul=None if consul is None else _consul(consul),
        )
        made.streams = sum(each.clients for each in made.clients)
        if self._authority is not None:
            made.leaf_lifetime.CopyFrom(duration_to_proto(self._options.identity.leaf_lifetime))
            if (expires := self._authority.own_certificate_expires) is not None:
                made.certificate_expires.FromNanoseconds(round(expires * 1e9))
        return made

    def _clients(self) -> list[pb.ClientVersion]:
        found: dict[str, pb.ClientVersion] = {}
        for client in self._hub.clients():
            agent = "" if client.node is None else client.node.user_agent
            if agent not in found and len(found) >= _VERSIONS:
                agent = "others"
            kind = found.setdefault(agent, pb.ClientVersion(user_agent=agent))
            kind.clients += 1
            if client.node is not None and len(kind.nodes) < _NODES:
                kind.nodes.append(client.node.id)
        return [found[agent] for agent in sorted(found)]

    def _drains(self) -> list[pb.OperatorDrain]:
        drains = []
        for each in self._catalog.operator_drains():
            drain = pb.OperatorDrain(service=each.service, endpoint_id=each.endpoint_id, operator=each.operator)
            drain.since.FromNanoseconds(round(each.at * 1e9))
            drains.append(drain)
        return drains


def _limit(limit: int) -> int:
    return 0 if limit == resource.RLIM_INFINITY else limit


def _open_files() -> int:
    with contextlib.suppress(OSError):  # where there is no procfs
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - thousands of names, of which only the number counts
    return 0


def _consul(found: ConsulDiagnosis) -> pb.ConsulDiagnosis:
    from control_plane.sources.consul_diagnosis import Acls

    acls = {
        Acls.UNKNOWN: pb.CONSUL_ACLS_UNSPECIFIED,
        Acls.ENABLED: pb.CONSUL_ACLS_ENABLED,
        Acls.DISABLED: pb.CONSUL_ACLS_DISABLED,
    }
    made = pb.ConsulDiagnosis(acls=acls[found.acls])
    for agent in found.agents:
        message = made.agents.add(address=agent.address, problem=agent.problem, leader=agent.leader)
        if agent.clock is not None:
            message.clock.FromNanoseconds(round(agent.clock * 1e9))
    for right, granted in found.rights:
        made.rights.add(rule=right.rule, needed=right.needed, reason=right.reason, granted=granted)
    return made
