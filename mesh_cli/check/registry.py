"""Checks of the registry: sources, Consul and the rights in it, held removals. Pure."""

from __future__ import annotations

from mesh.v1 import operations_pb2

from mesh_cli.check.facts import Facts, PlaneFacts
from mesh_cli.check.findings import Finding, failure, or_passed, some, warning
from mesh_client.core.renewal import in_words

GROUP = "registry"


def check_registry(facts: Facts) -> list[Finding]:
    """All of it, as each control plane sees it."""
    findings: list[Finding] = []
    for plane in facts.reached:
        findings += [*check_sources(plane), *check_consul(plane), *check_removals(plane)]
    return findings


def check_sources(plane: PlaneFacts) -> list[Finding]:
    """What the control plane reads can be read."""
    found = []
    for source in plane.status.sources:
        if not source.connected:
            since = in_words(source.since.seconds)
            detail = f"{plane.address} has not been able to read {source.name} for {since}: {source.detail}"
            fix = "repair it; what it said last stays published until then"
            found.append(failure(GROUP, "sources", detail, fix))
    names = some(source.name for source in plane.status.sources)
    return or_passed(found, GROUP, "sources", f"{plane.address} reads {names}")


def check_consul(plane: PlaneFacts) -> list[Finding]:
    """Consul can be reached, has a leader, and gives the control plane the rights that it needs, and no more."""
    if plane.diagnosis is None or not plane.diagnosis.HasField("consul"):
        return []
    consul = plane.diagnosis.consul
    found = []
    well = [agent for agent in consul.agents if not agent.problem]
    for agent in consul.agents:
        if agent.problem:
            make = warning if well else failure
            fix = "repair it, or take it out of --registry"
            found.append(make(GROUP, "consul", f"{agent.address}, from {plane.address}: {agent.problem}", fix))
        elif not agent.leader:
            detail = f"{agent.address} knows no leader: nothing can be registered or changed"
            found.append(
                failure(GROUP, "consul", detail, "see why the servers elect none: `consul operator raft list-peers`")
            )
    found += _rights(consul)
    return or_passed(found, GROUP, "consul", f"{some(agent.address for agent in well)}: leader and rights are there")


def _rights(consul: operations_pb2.ConsulDiagnosis) -> list[Finding]:
    if consul.acls == operations_pb2.CONSUL_ACLS_DISABLED:
        detail = "Consul asks for no tokens: whoever reaches it can register endpoints and change policies"
        return [warning(GROUP, "rights", detail, "switch ACLs on, with default_policy = deny")]
    if not consul.rights:
        return []
    found = []
    missing = [right for right in consul.rights if right.needed and not right.granted]
    # Without any right the token is none; one finding says more than six.
    if missing and len(missing) == sum(right.needed for right in consul.rights):
        detail = "Consul does not accept the control plane's token, or it may do nothing that is needed"
        return [failure(GROUP, "rights", detail, "give it a token with: " + "; ".join(right.rule for right in missing))]
    for right in missing:
        # Who changes policies by other means can do without the right to write them.
        make = failure if '"read"' in right.rule else warning
        found.append(
            make(GROUP, "rights", f"the token lacks {right.rule}: {right.reason}", "add the rule to its policy")
        )
    more = [right for right in consul.rights if not right.needed and right.granted]
    if more:
        detail = f"the token may do more than is needed: {some((right.reason for right in more), 10)}"
        found.append(
            warning(GROUP, "rights", detail, "give the control plane a token of its own, with what docs/cli.md lists")
        )
    return found


def check_removals(plane: PlaneFacts) -> list[Finding]:
    """The mass removal guard holds nothing."""
    if not plane.status.HasField("removal_hold"):
        return or_passed((), GROUP, "removals", f"{plane.address} holds none back")
    hold = plane.status.removal_hold
    detail = (
        f"{plane.address} holds the removal of {hold.endpoints} endpoints of {some(hold.services)} back, "
        f"for {in_words(hold.remaining.seconds)} more"
    )
    fix = "`mesh removals confirm` if they are really gone; otherwise repair the registry"
    return [failure(GROUP, "removals", detail, fix)]
