"""Checks of control planes, one by one and together: reachable, of one version and time, with room. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.v1 import operations_pb2

from mesh_cli.check.facts import Facts, PlaneFacts
from mesh_cli.check.findings import Finding, failure, or_passed, passed, skipped, some, warning
from mesh_cli.check.versions import compatible, satisfies
from mesh_client.core.renewal import in_words

GROUP = "control planes"

SKEW_SEEN = 2.0
"""Seconds by which clocks may differ; beyond it logs of several hosts are out of order."""
SKEW_HARMFUL = 50.0
"""Seconds by which they must not: a certificate is valid from 60 s before it is made."""
CONSUL_SKEW = 5.0
"""Seconds by which Consul's clock, which is known to the second, may differ."""
CONNECTIONS = 3
"""Of each server to its control plane: discovery, registration, trust bundle."""
USED_UP = 0.8
"""Share of a limit beyond which it is nearly used up."""


def check_planes(facts: Facts) -> list[Finding]:
    """All of them."""
    findings = [*check_reachable(facts), *check_versions(facts)]
    for plane in facts.reached:
        findings += [*check_clock(plane), *check_room(plane)]
    return [*findings, *check_process_clocks(facts)]


def check_reachable(facts: Facts) -> list[Finding]:
    """Every control plane that was named answers."""
    found: list[Finding] = []
    for plane in facts.planes:
        if plane.problem:
            fix = "start it, or correct --control-plane or MESH_CONTROL_PLANE"
            found.append(failure(GROUP, "reachable", f"{plane.address}: {plane.problem}", fix))
        else:
            up = in_words(plane.status.uptime.seconds + plane.status.uptime.nanos / 1e9)
            name = plane.status.control_plane
            found.append(passed(GROUP, "reachable", f"{plane.address} is {name}, up for {up}"))
    domains = {plane.status.trust_domain for plane in facts.reached}
    if len(domains) > 1:
        detail = f"they are of several trust domains: {some(sorted(domain or 'none' for domain in domains))}"
        found.append(failure(GROUP, "trust domain", detail, "name the control planes of one mesh"))
    return found


def check_versions(facts: Facts) -> list[Finding]:
    """What runs is of versions that work together, and within their bounds."""
    if not facts.reached:
        return []
    mine, bounds = facts.host.version, facts.host.bounds.get("grpcio", "")
    found: list[Finding] = []
    seen: set[str] = set()
    for plane in facts.reached:
        if plane.diagnosis is None:
            detail = f"{plane.address} is of a version that cannot be diagnosed"
            found.append(warning(GROUP, "versions", detail, "upgrade it"))
            continue
        processes = {f"the control plane at {plane.address}": plane.diagnosis.process}
        processes |= {_name(process): process for process in plane.processes if process.service != "control-plane"}
        for name, process in processes.items():
            seen.add(process.version)
            if not compatible(mine, process.version):
                detail = f"{name} is of grpc-mesh {process.version}, this command of {mine}"
                found.append(warning(GROUP, "versions", detail, "upgrade the older one"))
            if process.grpc_version and not satisfies(process.grpc_version, bounds):
                detail = f"{name} runs with grpcio {process.grpc_version}; {bounds} is needed"
                found.append(warning(GROUP, "versions", detail, "install the packages of its environment anew"))
        for kind in plane.diagnosis.clients:
            library, _, version = kind.user_agent.partition("/")
            if library == "grpc-mesh-python" and not compatible(mine, version):
                detail = f"clients are of grpc-mesh {version}, this command of {mine}: {some(kind.nodes)}"
                found.append(warning(GROUP, "versions", detail, "upgrade the older ones"))
    return or_passed(found, GROUP, "versions", f"grpc-mesh {some(sorted(seen | {mine}))}")


def check_clock(plane: PlaneFacts) -> list[Finding]:
    """The clocks of this host, the control plane and Consul agree."""
    diagnosis = plane.diagnosis
    if diagnosis is None or not diagnosis.process.HasField("clock"):
        return [skipped(GROUP, "clocks", f"{plane.address} does not say what time it is there")]
    theirs = diagnosis.process.clock.ToNanoseconds() / 1e9
    # It was read somewhere between question and answer (RFC 5905, section 8, with equal ways).
    ahead = theirs - (plane.asked + plane.answered) / 2
    uncertain = (plane.answered - plane.asked) / 2
    found = list(_skew(f"the control plane at {plane.address}", ahead, "this host", uncertain))
    for agent in diagnosis.consul.agents:
        if agent.HasField("clock"):
            off = agent.clock.ToNanoseconds() / 1e9 - theirs
            if abs(off) > CONSUL_SKEW:
                detail = f"the clock of Consul at {agent.address} {_off(off)} that of {plane.address}"
                found.append(warning(GROUP, "clocks", detail, "have both hosts follow a time server (NTP)"))
    agreement = f"{plane.address} and this host agree within {max(abs(ahead), uncertain):.1f} s"
    return or_passed(found, GROUP, "clocks", agreement)


def check_process_clocks(facts: Facts) -> list[Finding]:
    """The clocks of the processes that attend agree with their control plane's."""
    found: list[Finding] = []
    for plane in facts.reached:
        for process in plane.processes:
            if process.HasField("clock_ahead"):
                ahead = process.clock_ahead.seconds + process.clock_ahead.nanos / 1e9
                found += _skew(_name(process), ahead, f"the control plane at {plane.address}")
    return found


def _skew(whose: str, ahead: float, than: str, uncertain: float = 0.0) -> Iterator[Finding]:
    least = max(0.0, abs(ahead) - uncertain)
    detail = f"the clock of {whose} {_off(ahead)} that of {than}"
    fix = "have both hosts follow a time server (NTP)"
    if least > SKEW_HARMFUL:
        yield failure(GROUP, "clocks", f"{detail}: new certificates are not valid yet, or have ended", fix)
    elif least > SKEW_SEEN:
        yield warning(GROUP, "clocks", detail, fix)


def _off(ahead: float) -> str:
    return f"is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'}"


def check_room(plane: PlaneFacts) -> list[Finding]:
    """The control plane has files and places for the clients that it takes."""
    diagnosis = plane.diagnosis
    if diagnosis is None:
        return []
    found: list[Finding] = []
    limit, used, needed = diagnosis.open_files_limit, diagnosis.open_files, CONNECTIONS * diagnosis.max_streams
    if limit and used > USED_UP * limit:
        detail = f"{plane.address} has {used} of {limit} files open, and refuses connections soon"
        found.append(failure(GROUP, "open files", detail, _raise_files(diagnosis, 2 * used)))
    elif limit and limit < needed:
        detail = (
            f"{plane.address} may open {limit} files; for the {diagnosis.max_streams} clients that it takes "
            f"(--max-streams) it needs {needed}"
        )
        found.append(warning(GROUP, "open files", detail, _raise_files(diagnosis, needed)))
    if diagnosis.max_streams and diagnosis.streams > USED_UP * diagnosis.max_streams:
        detail = f"{plane.address} has {diagnosis.streams} of {diagnosis.max_streams} clients that it takes"
        found.append(warning(GROUP, "streams", detail, "raise --max-streams, or start another control plane"))
    room = f"{plane.address} has {diagnosis.streams} clients of {diagnosis.max_streams}"
    return or_passed(found, GROUP, "room", room)


def _raise_files(diagnosis: operations_pb2.GetDiagnosisResponse, wanted: int) -> str:
    hard = diagnosis.open_files_hard_limit
    if hard and hard < wanted:
        return f"raise its hard limit, as by LimitNOFILE={wanted} of a systemd unit"
    return f"start it after `ulimit -n {wanted}`"


def _name(process: operations_pb2.Process) -> str:
    instance = process.instances[0] if process.instances else process.id
    return f"{process.service}/{instance}" if process.service else instance
