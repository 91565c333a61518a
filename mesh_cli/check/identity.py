"""Checks of who is who: credentials, certificates, roots, and where a rotation stands. Pure."""

from __future__ import annotations

from mesh_cli.check.facts import Facts, OperatorFacts, PlaneFacts
from mesh_cli.check.findings import Finding, failure, or_passed, passed, skipped, some, warning
from mesh_cli.rotation import next_step
from mesh_client.core.renewal import in_words

GROUP = "identity"

SOON = 30 * 86_400.0
"""Seconds before the end of a root or an issuer at which somebody has to look; an issuer is replaced much earlier."""
VERY_SOON = 7 * 86_400.0
LATE = 1 / 6
"""Share of its life that a workload's certificate has left when its renewal, due with a third left, is late."""
OPERATOR_LATE = 1 / 10
"""Of an operator's, which a person renews."""


def check_identity(facts: Facts) -> list[Finding]:
    """All of it."""
    findings = check_operator(facts.operator, facts.now)
    for plane in facts.reached:
        if plane.authority is None:
            continue
        findings += [*check_authority(plane, facts.now), *check_own_certificate(plane, facts.now)]
    return [*findings, *check_workloads(facts)]


def check_operator(operator: OperatorFacts, now: float) -> list[Finding]:
    """Whoever runs the command has credentials."""
    name = "operator"
    if operator.insecure:
        fix = "run the control plane without --insecure"
        return [warning(GROUP, name, "asked in plaintext: nobody in this mesh proves who they are", fix)]
    if operator.problem:
        fix = "make credentials with `mesh operator create NAME` where the control plane runs"
        return [failure(GROUP, name, operator.problem, fix)]
    left = operator.expires - now
    detail = f"{operator.name}'s certificate ends in {in_words(left)}"
    if left < OPERATOR_LATE * operator.life:
        return [warning(GROUP, name, detail, f"`mesh operator create {operator.name}` where the control plane runs")]
    return [passed(GROUP, name, detail)]


def check_authority(plane: PlaneFacts, now: float) -> list[Finding]:
    """Roots and issuer last, and no rotation is left half done."""
    authority = plane.authority
    if authority is None:
        return []
    found = []
    for root in authority.roots:
        fix = "rotate it: `mesh ca rotate add`, then overlap, then retire"
        found += _ending(f"the trust root {root.fingerprint[:16]}", root.expires.seconds - now, fix)
    fix = "look into the control plane's log, which says why it is not renewed"
    found += _ending(f"the issuer of {plane.address}", authority.issuer_expires.seconds - now, fix)
    if step := next_step(authority):
        found.append(warning(GROUP, "rotation", f"a rotation of the trust root is under way. {step}", "finish it"))
    if not any(root.signing for root in authority.roots):
        found.append(failure(GROUP, "roots", "no trust root signs", fix))
    roots = f"{len(authority.roots)} trusted root{'' if len(authority.roots) == 1 else 's'}"
    return or_passed(found, GROUP, "roots", f"{roots}, bundle {authority.bundle_version}")


def check_own_certificate(plane: PlaneFacts, now: float) -> list[Finding]:
    """The control plane renews its own certificate."""
    diagnosis, name = plane.diagnosis, "control plane's certificate"
    if diagnosis is None or not diagnosis.HasField("certificate_expires"):
        return [skipped(GROUP, name, f"{plane.address} does not say when it ends")]
    left = diagnosis.certificate_expires.seconds - now
    life = diagnosis.leaf_lifetime.seconds + diagnosis.leaf_lifetime.nanos / 1e9
    fix = "look into the control plane's log, which says why it is not renewed"
    if left <= 0:
        return [failure(GROUP, name, f"that of {plane.address} has ended", fix)]
    if left < LATE * life:
        return [warning(GROUP, name, f"that of {plane.address} ends in {in_words(left)}", fix)]
    return [passed(GROUP, name, f"that of {plane.address} ends in {in_words(left)}")]


def check_workloads(facts: Facts) -> list[Finding]:
    """Workloads that are connected renew their certificates in time, and none is revoked."""
    late, ended, revoked = [], [], []
    connected = {client.workload_id: client.node_id for plane in facts.reached for client in plane.status.clients} | {
        "": ""
    }
    number = 0
    for plane in facts.reached:
        if plane.authority is None or plane.diagnosis is None:
            continue
        life = plane.diagnosis.leaf_lifetime.seconds + plane.diagnosis.leaf_lifetime.nanos / 1e9
        for workload in plane.authority.workloads:
            node = connected.pop(workload.id, "")
            if not node:
                continue
            number += 1
            left = workload.expires.seconds - facts.now
            if workload.revoked:
                revoked.append(node)
            elif left <= 0:
                ended.append(node)
            elif left < LATE * life:
                late.append(f"{node} ({in_words(left)})")
    fix = "look into their logs; `mesh logs SERVICE --logger mesh_client.identity` shows why they are not renewed"
    found = []
    if ended:
        found.append(failure(GROUP, "workloads", f"certificates have ended of {some(ended)}", fix))
    if late:
        found.append(
            warning(GROUP, "workloads", f"certificates are near their end, and not renewed, of {some(late)}", fix)
        )
    if revoked:
        detail = f"revoked, and connected still: {some(revoked)}"
        found.append(warning(GROUP, "workloads", detail, "their connections end with their age; stop them"))
    if not any(plane.authority is not None for plane in facts.reached):
        return []
    return or_passed(found, GROUP, "workloads", f"{number} connected, each with a certificate that lasts")


def _ending(what: str, left: float, fix: str) -> list[Finding]:
    if left <= 0:
        return [failure(GROUP, "roots", f"{what} has ended", fix)]
    if left < VERY_SOON:
        return [failure(GROUP, "roots", f"{what} ends in {in_words(left)}", fix)]
    if left < SOON:
        return [warning(GROUP, "roots", f"{what} ends in {in_words(left)}", fix)]
    return []
