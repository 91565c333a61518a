"""The checks of `mesh check` on facts that the tests make up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import admin_pb2, authority_pb2, edge_service_pb2, operations_pb2, policy_pb2

from mesh_cli.check import host, identity, planes, registry, services
from mesh_cli.check.command import check_all
from mesh_cli.check.facts import PRIVATE, WRITABLE, Facts, FileFact, HostFacts, OperatorFacts, PlaneFacts, PortFact
from mesh_cli.check.findings import Finding, Outcome, some, tally
from mesh_cli.check.versions import compatible, numbers, satisfies
from tests.cli import samples

NOW = 1_764_000_000.0
DAY = 86_400.0
PASS, WARN, FAIL, SKIP = Outcome.PASS, Outcome.WARN, Outcome.FAIL, Outcome.SKIP


def at(seconds: float) -> Timestamp:
    made = Timestamp()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def span(seconds: float) -> Duration:
    return samples.span(seconds)


def a_host(**options: Any) -> HostFacts:
    return HostFacts(
        **{
            "python": "3.11.7",
            "packages": {"grpcio": "1.85.1", "protobuf": "7.36.2"},
            "bounds": {"grpcio": ">=1.85.1", "protobuf": "<9,>=7.35.1"},
            "version": "0.1.0",
            "open_files": 65_536,
            "open_files_hard": 1_048_576,
            "user": 1000,
            "ports": (PortFact("127.0.0.1:7070"), PortFact("127.0.0.1:7071")),
            "free_bytes": 10 * 2**30,
            **options,
        }
    )


def a_diagnosis(**options: Any) -> operations_pb2.GetDiagnosisResponse:
    return operations_pb2.GetDiagnosisResponse(
        **{
            "process": a_process("control-plane-1f0c", "control-plane", clock=at(NOW)),
            "open_files_limit": 65_536,
            "open_files_hard_limit": 65_536,
            "open_files": 40,
            "max_streams": 10_000,
            "streams": 1,
            "registry": "embedded",
            "leaf_lifetime": span(DAY),
            "certificate_expires": at(NOW + DAY / 2),
            **options,
        }
    )


def a_process(name: str = "orders-1", service: str = "orders", **options: Any) -> operations_pb2.Process:
    return operations_pb2.Process(
        **{
            "service": service,
            "instances": [name],
            "id": "p1",
            "version": "0.1.0",
            "grpc_version": "1.85.1",
            **options,
        }
    )


def an_authority(**options: Any) -> authority_pb2.GetCertificateAuthorityResponse:
    return authority_pb2.GetCertificateAuthorityResponse(
        **{
            "bundle_version": "8712e7268d47fcdb",
            "roots": [authority_pb2.TrustRoot(fingerprint="0a" * 32, expires=at(NOW + 3650 * DAY), signing=True)],
            "issuer_expires": at(NOW + 300 * DAY),
            "workloads": [a_workload("1d2f0a9b8c7e6f50", NOW + DAY / 2)],
            **options,
        }
    )


def a_workload(id: str, expires: float, **options: Any) -> authority_pb2.Workload:
    return authority_pb2.Workload(
        **{"id": id, "spiffe_id": "spiffe://mesh.internal/service/orders", "expires": at(expires), **options}
    )


def a_plane(address: str = "10.0.0.2:7070", **options: Any) -> PlaneFacts:
    status = samples.healthy_status()
    status.clients[0].workload_id = "1d2f0a9b8c7e6f50"
    return PlaneFacts(
        address,
        **{
            "status": status,
            "diagnosis": a_diagnosis(),
            "authority": an_authority(),
            "processes": (a_process(),),
            "asked": NOW - 0.01,
            "answered": NOW + 0.01,
            **options,
        },
    )


def facts(*reached: PlaneFacts, **options: Any) -> Facts:
    return Facts(
        **{
            "now": NOW,
            "host": a_host(),
            "operator": OperatorFacts(name="alice", expires=NOW + 20 * DAY, life=30 * DAY),
            "planes": reached or (a_plane(),),
            **options,
        }
    )


def a_consul(**options: Any) -> operations_pb2.ConsulDiagnosis:
    rights = [
        operations_pb2.ConsulRight(rule='node_prefix "" { policy = "read" }', needed=True, reason="r", granted=True),
        operations_pb2.ConsulRight(
            rule='key_prefix "mesh/policies/" { policy = "write" }', needed=True, reason="w", granted=True
        ),
        operations_pb2.ConsulRight(rule='acl = "write"', needed=False, reason="make tokens for everything"),
    ]
    return operations_pb2.ConsulDiagnosis(
        **{
            "agents": [
                operations_pb2.ConsulAgent(address="10.0.0.5:8500", leader="10.0.0.5:8300", clock=at(NOW)),
                operations_pb2.ConsulAgent(address="10.0.0.6:8500", leader="10.0.0.5:8300", clock=at(NOW)),
            ],
            "acls": operations_pb2.CONSUL_ACLS_ENABLED,
            "rights": rights,
            **options,
        }
    )


def outcomes(findings: Iterable[Finding]) -> list[Outcome]:
    return [finding.outcome for finding in findings]


def only(findings: Sequence[Finding], outcome: Outcome, *words: str) -> Finding:
    """The one finding, which has this outcome and says this."""
    (finding,) = findings
    assert finding.outcome is outcome, finding
    text = f"{finding.detail}\n{finding.fix}"
    assert all(word in text for word in words), text
    assert bool(finding.fix) == (outcome in (WARN, FAIL)), finding
    return finding


def test_a_mesh_in_which_all_is_well_passes_every_check() -> None:
    consul = a_plane("10.0.0.3:7070", diagnosis=a_diagnosis(registry="consul://10.0.0.5", consul=a_consul()))
    found = check_all(facts(a_plane(), consul))
    assert set(outcomes(found)) == {PASS}, [finding for finding in found if finding.outcome is not PASS]
    assert tally(found)[PASS] == len(found) > 25


def test_a_mesh_without_identity_has_no_certificates_to_check() -> None:
    plaintext = facts(a_plane(authority=None), operator=OperatorFacts(insecure=True))
    only(identity.check_identity(plaintext), WARN, "plaintext")


# -- this host


def test_a_missing_or_old_package_is_a_failure() -> None:
    found = host.check_packages(a_host(packages={"grpcio": "1.80.0", "protobuf": None}))
    assert outcomes(found) == [FAIL, FAIL]
    assert found[0].detail == "grpcio 1.80.0 is installed; >=1.85.1 is needed"
    assert found[1].detail == "protobuf is not installed"
    only(host.check_packages(a_host(python="3.10.2")), FAIL, "Python 3.10.2 is too old")


@pytest.mark.parametrize(
    ("environment", "outcome", "words"),
    [
        ({"MESH_TOKEN_FLIE": "x"}, WARN, "did you mean MESH_TOKEN_FILE?"),
        ({"MESH_XYZZY_PLUGH": "x"}, WARN, "unset it"),
        ({"MESH_INSECURE": "1"}, WARN, "plaintext"),
        ({"MESH_INSECURE": "true", "MESH_TOKEN_FILE": "x"}, FAIL, "MESH_INSECURE and MESH_TOKEN_FILE are set"),
        ({"MESH_INSECURE": "1", "MESH_IDENTITY_DIR": "x"}, FAIL, "MESH_INSECURE and MESH_IDENTITY_DIR are set"),
        ({"MESH_ATTESTATION": "consul", "MESH_TOKEN_FILE": "x"}, FAIL, "keep one of them"),
        ({"MESH_TOKEN": "(set)"}, WARN, "MESH_TOKEN_FILE"),
        ({"CONSUL_HTTP_TOKEN": "(set)", "CONSUL_HTTP_TOKEN_FILE": "x"}, WARN, "the file is not read"),
        ({"CONSUL_HTTP_ADDR": "x"}, WARN, "MESH_REGISTRY"),
        ({"http_proxy": "x", "MESH_REGISTRY": "consul://x"}, WARN, "no_proxy"),
        ({"GRPC_VERBOSITY": "debug"}, WARN, "handshakes"),
        ({"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}, WARN, "slower"),
        ({"GRPC_TRACE": "all"}, WARN, "standard error"),
        ({"PYTHONASYNCIODEBUG": "1"}, WARN, "asyncio"),
    ],
)
def test_variables_that_mislead_are_found(environment: dict[str, str], outcome: Outcome, words: str) -> None:
    only(host.check_environment(environment), outcome, words)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MESH_CONTROL_PLANE": "x", "MESH_INSECURE": "0", "MESH_TOKEN_FILE": "x"},
        {"http_proxy": "x"},
        {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "upb"},
    ],
)
def test_variables_that_are_as_they_should_be_pass(environment: dict[str, str]) -> None:
    only(host.check_environment(environment), PASS)


def test_every_variable_that_the_code_reads_is_known() -> None:
    root = Path(__file__).parents[2]
    read = {
        name
        for folder in ("mesh_client", "mesh_cli", "control_plane", "gateway", "services")
        for path in (root / folder).rglob("*.py")
        if path.name != "host.py"
        for name in re.findall(r'"(MESH_[A-Z_]+[A-Z])"', path.read_text(encoding="utf-8"))
    }
    read |= {f"MESH_{name}" for name in ("SERVICE", "ZONE", "REGION")}
    assert read == host.VARIABLES


def a_file(**options: Any) -> FileFact:
    return FileFact(**{"path": "/x/token", "purpose": "the join token", "forbidden": PRIVATE, "owner": 1000, **options})


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (a_file(mode=0o644), ("can be read by others (mode 0644)", "chmod 600 /x/token")),
        (a_file(mode=0o664, forbidden=WRITABLE), ("can be changed by others", "chmod 644 /x/token")),
        (a_file(owner=7), ("belongs to user 7", "chown 1000 /x/token")),
        (a_file(exists=False, required=True), ("is not there",)),
        (a_file(problem="Permission denied"), ("cannot be looked at: Permission denied",)),
    ],
)
def test_files_that_others_have_access_to_are_failures(file: FileFact, words: tuple[str, ...]) -> None:
    only(host.check_files(a_host(files=(file,))), FAIL, *words)


def test_files_that_are_their_owners_alone_pass() -> None:
    files = (a_file(), a_file(owner=0), a_file(exists=False), a_file(mode=0o644, forbidden=WRITABLE))
    only(host.check_files(a_host(files=files)), PASS, "nobody else has access to the join token")
    only(host.check_files(a_host()), PASS, "none are named")


def test_few_files_are_a_warning_with_a_remedy_that_is_possible() -> None:
    only(host.check_open_files(a_host(open_files=1024)), WARN, "may open 1024 files", "ulimit -n 1048576")
    only(host.check_open_files(a_host(open_files=1024, open_files_hard=0)), WARN, "ulimit -n 65536")
    only(host.check_open_files(a_host(open_files=1024, open_files_hard=2048)), WARN, "LimitNOFILE")
    only(host.check_open_files(a_host(open_files=0)), PASS, "without a limit")


def test_what_a_start_needs_is_checked_before_it() -> None:
    assert set(outcomes(host.check_before_start(a_host()))) == {PASS}
    only(host.check_names(a_host(unresolved={"cp.internal": "Name or service not known"})), FAIL, "cp.internal")
    taken = (PortFact("127.0.0.1:7070", "it is taken"), PortFact("127.0.0.1:7071"))
    only(host.check_ports(a_host(ports=taken)), WARN, "cannot listen on 127.0.0.1:7070: it is taken")
    only(host.check_disk(a_host(free_bytes=2**20)), WARN, "1 MiB are free")
    only(host.check_disk(a_host(free_bytes=None)), FAIL, "--data-dir")


# -- control planes


def test_a_control_plane_that_does_not_answer_is_a_failure_and_the_others_are_checked() -> None:
    found = check_all(facts(PlaneFacts("10.0.0.9:7070", problem="cannot reach it"), a_plane()))
    failed = [finding for finding in found if finding.outcome is not PASS]
    only(failed, FAIL, "10.0.0.9:7070: cannot reach it")


def test_without_any_control_plane_there_is_nothing_else_to_tell() -> None:
    found = check_all(facts(PlaneFacts("10.0.0.9:7070", problem="cannot reach it")))
    assert [finding.name for finding in found if finding.group != "this host"] == ["reachable", "operator"]


def test_control_planes_of_several_meshes_are_a_failure() -> None:
    status = samples.quiet_status()
    found = planes.check_reachable(facts(a_plane(), a_plane("10.0.0.3:7070", status=status)))
    assert outcomes(found) == [PASS, PASS, FAIL]
    assert found[-1].detail == "they are of several trust domains: mesh.internal, none"


def test_versions_that_do_not_fit_are_warnings() -> None:
    diagnosis = a_diagnosis(
        process=a_process("cp-1", "control-plane", version="0.2.0", grpc_version="1.80.0"),
        clients=[
            operations_pb2.ClientVersion(user_agent="grpc-mesh-python/0.1.7", clients=1, nodes=["orders-1"]),
            operations_pb2.ClientVersion(user_agent="grpc-mesh-python/0.3.0", clients=1, nodes=["web-1"]),
            operations_pb2.ClientVersion(user_agent="my-own/9.9", clients=1, nodes=["go-1"]),
        ],
    )
    processes = (a_process(version="0.0.9"), a_process("cp-1", "control-plane", version="9.9"))
    found = planes.check_versions(facts(a_plane(diagnosis=diagnosis, processes=processes)))
    assert outcomes(found) == [WARN] * 4
    assert [finding.detail for finding in found] == [
        "the control plane at 10.0.0.2:7070 is of grpc-mesh 0.2.0, this command of 0.1.0",
        "the control plane at 10.0.0.2:7070 runs with grpcio 1.80.0; >=1.85.1 is needed",
        "orders/orders-1 is of grpc-mesh 0.0.9, this command of 0.1.0",
        "clients are of grpc-mesh 0.3.0, this command of 0.1.0: web-1",
    ]
    only(planes.check_versions(facts(a_plane(diagnosis=None))), WARN, "cannot be diagnosed")


@pytest.mark.parametrize(
    ("ahead", "outcome"), [(0.0, PASS), (1.9, PASS), (-1.9, PASS), (3.0, WARN), (-3.0, WARN), (61.0, FAIL)]
)
def test_clocks_that_differ_are_found(ahead: float, outcome: Outcome) -> None:
    diagnosis = a_diagnosis(process=a_process("cp-1", "control-plane", clock=at(NOW + ahead)))
    only(planes.check_clock(a_plane(diagnosis=diagnosis)), outcome)


def test_what_a_slow_answer_leaves_open_is_not_held_against_a_clock() -> None:
    diagnosis = a_diagnosis(process=a_process("cp-1", "control-plane", clock=at(NOW + 5.0)))
    slow = a_plane(diagnosis=diagnosis, asked=NOW - 4.0, answered=NOW + 4.0)
    only(planes.check_clock(slow), PASS, "agree within 5.0 s")


def test_clocks_of_consul_and_of_processes_are_compared_with_the_control_planes() -> None:
    consul = a_consul()
    consul.agents[0].clock.CopyFrom(at(NOW - 30.0))
    consul.agents[1].ClearField("clock")
    diagnosis = a_diagnosis(consul=consul)
    only(planes.check_clock(a_plane(diagnosis=diagnosis)), WARN, "Consul at 10.0.0.5:8500 is 30.0 s behind that of")
    processes = (
        a_process("orders-1", clock_ahead=span(-3.0)),
        a_process("orders-2", clock_ahead=span(90.0)),
        a_process("", "", id="p9", instances=[], clock_ahead=span(0.1)),
    )
    late, early = planes.check_process_clocks(facts(a_plane(processes=processes)))
    assert (late.outcome, early.outcome) == (WARN, FAIL)
    assert late.detail == "the clock of orders/orders-1 is 3.0 s behind that of the control plane at 10.0.0.2:7070"
    for unknown in (None, a_diagnosis(process=a_process())):
        only(planes.check_clock(a_plane(diagnosis=unknown)), SKIP, "does not say what time it is")


def test_room_that_runs_out_is_found() -> None:
    def room(**options: Any) -> list[Finding]:
        return planes.check_room(a_plane(diagnosis=a_diagnosis(**options)))

    only(room(open_files_limit=1024), WARN, "it needs 30000", "ulimit -n 30000")
    only(room(open_files_limit=1024, open_files_hard_limit=4096), WARN, "LimitNOFILE=30000")
    only(room(open_files_limit=1024, open_files=900), FAIL, "has 900 of 1024 files open", "ulimit -n 1800")
    only(room(streams=9_000), WARN, "has 9000 of 10000 clients", "--max-streams")
    only(room(open_files_limit=0), PASS)
    assert planes.check_room(a_plane(diagnosis=None)) == []


# -- identity


def test_who_asks_is_checked_first() -> None:
    only(identity.check_operator(OperatorFacts(insecure=True), NOW), WARN, "plaintext")
    only(identity.check_operator(OperatorFacts(problem="there are none"), NOW), FAIL, "there are none")
    soon = OperatorFacts(name="alice", expires=NOW + 2 * DAY, life=30 * DAY)
    only(identity.check_operator(soon, NOW), WARN, "alice's certificate ends in 2 days", "mesh operator create alice")


@pytest.mark.parametrize(("left", "outcome"), [(20 * DAY, WARN), (6 * DAY, FAIL), (-1.0, FAIL)])
def test_roots_and_issuers_near_their_end_are_found(left: float, outcome: Outcome) -> None:
    root = authority_pb2.TrustRoot(fingerprint="0a" * 32, expires=at(NOW + left), signing=True)
    only(identity.check_authority(a_plane(authority=an_authority(roots=[root])), NOW), outcome, "0a0a0a0a0a0a0a0a")
    ending = a_plane(authority=an_authority(issuer_expires=at(NOW + left)))
    only(identity.check_authority(ending, NOW), outcome, "the issuer of 10.0.0.2:7070")


def test_a_rotation_that_is_not_finished_is_a_warning() -> None:
    def root(name: str, *, signing: bool = False, **options: int) -> authority_pb2.TrustRoot:
        return authority_pb2.TrustRoot(fingerprint=name * 32, expires=at(NOW + 3650 * DAY), signing=signing, **options)

    def rotating(*roots: authority_pb2.TrustRoot) -> list[Finding]:
        return identity.check_authority(a_plane(authority=an_authority(roots=roots)), NOW)

    only(rotating(root("a", signing=True), root("b", unconfirmed=1)), WARN, "1 workload did not confirm yet")
    only(rotating(root("a", signing=True), root("b", unconfirmed=0)), WARN, "mesh ca rotate overlap")
    only(rotating(root("a", workloads=2), root("b", signing=True)), WARN, "2 workloads of the old one")
    only(rotating(root("a"), root("b", signing=True)), WARN, "mesh ca rotate retire")
    only(rotating(root("a")), FAIL, "no trust root signs")
    assert identity.check_authority(a_plane(authority=None), NOW) == []


@pytest.mark.parametrize(("left", "outcome"), [(DAY / 2, PASS), (DAY / 10, WARN), (-1.0, FAIL)])
def test_the_control_planes_own_certificate_is_looked_at(left: float, outcome: Outcome) -> None:
    plane = a_plane(diagnosis=a_diagnosis(certificate_expires=at(NOW + left)))
    only(identity.check_own_certificate(plane, NOW), outcome)


def test_a_control_plane_that_does_not_say_when_its_certificate_ends_is_skipped() -> None:
    for diagnosis in (None, operations_pb2.GetDiagnosisResponse()):
        only(identity.check_own_certificate(a_plane(diagnosis=diagnosis), NOW), SKIP, "does not say")


def test_certificates_of_those_who_are_connected_are_renewed_in_time() -> None:
    def workloads(*them: authority_pb2.Workload) -> list[Finding]:
        return identity.check_workloads(facts(a_plane(authority=an_authority(workloads=them))))

    connected = "1d2f0a9b8c7e6f50"
    only(workloads(a_workload(connected, NOW + DAY / 2)), PASS, "1 connected")
    only(workloads(a_workload(connected, NOW + DAY / 10)), WARN, "near their end", "orders-7f3a91 (2 h)")
    only(workloads(a_workload(connected, NOW - 1.0)), FAIL, "have ended of orders-7f3a91")
    only(workloads(a_workload(connected, NOW + DAY / 2, revoked=True)), WARN, "revoked, and connected still")
    only(workloads(a_workload("0000000000000000", NOW - 1.0)), PASS, "0 connected")
    assert identity.check_workloads(facts(a_plane(authority=None))) == []
    only(identity.check_workloads(facts(a_plane(diagnosis=None))), PASS)


# -- registry


def test_a_source_that_cannot_be_read_is_a_failure() -> None:
    only(
        registry.check_sources(a_plane(status=samples.troubled_status())),
        FAIL,
        "10.0.0.2:7070 has not been able to read consul for 12 s: HTTP 500: No cluster leader",
    )


def consul(**options: Any) -> list[Finding]:
    return registry.check_consul(a_plane(diagnosis=a_diagnosis(consul=a_consul(**options))))


def test_agents_that_cannot_be_asked_are_found() -> None:
    good = operations_pb2.ConsulAgent(address="10.0.0.5:8500", leader="10.0.0.5:8300")
    bad = operations_pb2.ConsulAgent(address="10.0.0.6:8500", problem="connection refused")
    only(consul(agents=[good, bad]), WARN, "10.0.0.6:8500, from 10.0.0.2:7070: connection refused")
    only(consul(agents=[bad]), FAIL, "connection refused")
    only(consul(agents=[operations_pb2.ConsulAgent(address="10.0.0.5:8500")]), FAIL, "knows no leader")
    only(consul(), PASS, "10.0.0.5:8500, 10.0.0.6:8500")
    assert registry.check_consul(a_plane()) == []
    assert registry.check_consul(a_plane(diagnosis=None)) == []


def test_rights_are_exactly_as_needed() -> None:
    def rights(*granted: bool) -> list[Finding]:
        made = a_consul()
        for right, each in zip(made.rights, granted, strict=True):
            right.granted = each
        return registry.check_consul(a_plane(diagnosis=a_diagnosis(consul=made)))

    only(rights(True, True, False), PASS)
    only(rights(False, True, False), FAIL, 'the token lacks node_prefix "" { policy = "read" }: r')
    only(rights(True, False, False), WARN, 'the token lacks key_prefix "mesh/policies/" { policy = "write" }: w')
    only(rights(True, True, True), WARN, "more than is needed: make tokens for everything")
    only(rights(False, False, False), FAIL, "does not accept the control plane's token", "node_prefix")
    only(consul(acls=operations_pb2.CONSUL_ACLS_DISABLED, rights=[]), WARN, "asks for no tokens")
    only(consul(acls=operations_pb2.CONSUL_ACLS_UNSPECIFIED, rights=[]), PASS)


def test_held_removals_are_a_failure() -> None:
    found = registry.check_removals(a_plane(status=samples.troubled_status()))
    only(found, FAIL, "holds the removal of 6 endpoints of inventory, payments back", "mesh removals confirm")


# -- what runs


def test_policies_that_are_not_obeyed_are_failures() -> None:
    status = samples.troubled_status()
    edge = status.policy_problems.add(service="public", kind=admin_pb2.POLICY_KIND_EDGE)
    edge.errors.add(path="services", message="Field required")
    found = services.check_policies(a_plane(status=status))
    assert outcomes(found) == [FAIL] * len(found)
    assert found[0].detail == (
        "that of payments is not obeyed, but the defaults: retry.max_attempts: Input should be less than or equal to "
        "10, is not a mapping"
    )
    assert "that of orders is not obeyed, but version 77ab04c1d9e2f358: timeout" in found[1].detail
    assert found[-1].detail.startswith("that of the edge public is not obeyed")
    assert found[-1].fix == "correct it with `mesh edge apply`"


def test_policies_that_cannot_be_read_are_skipped() -> None:
    only(services.check_policies(a_plane(policies=None)), SKIP, "cannot read what is stored now")
    only(services.check_rules(facts(a_plane(policies=None))), PASS)


def test_rules_that_name_services_that_nobody_has_seen_are_warnings() -> None:
    def stored(*callers: str) -> admin_pb2.StoredPolicy:
        rule = policy_pb2.AuthorizationRule(callers=callers, methods=["*"])
        return admin_pb2.StoredPolicy(
            service="payments", policy=policy_pb2.ServicePolicy(service="payments", authorization=[rule])
        )

    known = ("inventory", "orders", "*", "operator:alice")
    only(services.check_rules(facts(a_plane(policies=(stored(*known),)))), PASS)
    only(
        services.check_rules(facts(a_plane(policies=(stored("oders", "oders", "orders"),)))),
        WARN,
        "that of payments allows callers that nobody has seen: oders",
    )
    only(services.check_rules(facts(a_plane(authority=None, policies=(stored("inventory"),)))), PASS)


def test_services_without_a_healthy_endpoint_are_found() -> None:
    status = samples.healthy_status()
    for service, subscribers in (("payments", 2), ("idle", 0)):
        status.services.add(service=service, unhealthy=1, subscribers=subscribers)
    found = services.check_services(facts(a_plane(status=status), a_plane("10.0.0.3:7070", status=status)))
    assert outcomes(found) == [FAIL, WARN]
    assert "payments has no healthy endpoint (1 unhealthy, 0 draining); 4 clients subscribe" in found[0].detail


def test_drains_that_are_forgotten_or_known_to_some_are_found() -> None:
    def drained(seconds: float) -> operations_pb2.GetDiagnosisResponse:
        drain = operations_pb2.OperatorDrain(
            service="orders",
            endpoint_id="orders-1",
            operator="spiffe://mesh.internal/operator/alice",
            since=at(NOW - seconds),
        )
        return a_diagnosis(drains=[drain])

    only(services.check_drains(facts(a_plane(diagnosis=drained(60.0)))), PASS, "1 drained")
    only(
        services.check_drains(facts(a_plane(diagnosis=drained(7_300.0)))),
        WARN,
        "orders/orders-1 was drained by alice 2 h ago",
        "mesh drain orders orders-1 --undo",
    )
    both = (a_plane(diagnosis=drained(60.0)), a_plane("10.0.0.3:7070", diagnosis=drained(60.0)))
    only(services.check_drains(facts(*both)), PASS)
    some_of_them = (both[0], a_plane("10.0.0.3:7070"), a_plane("10.0.0.4:7070", diagnosis=None))
    only(
        services.check_drains(facts(*some_of_them)),
        WARN,
        "is drained for the clients of 10.0.0.2:7070, and not of 10.0.0.3:7070, 10.0.0.4:7070",
    )


def test_clients_that_reject_or_ask_for_what_is_not_there_are_found() -> None:
    found = services.check_clients(a_plane(status=samples.troubled_status()))
    assert outcomes(found) == [FAIL, WARN]
    assert "gateway-02 does not take 77ab04c1d9e2f358 of orders and keeps 66aa04c1d9e2f357" in found[0].detail
    assert found[1].detail == "gateway-02 asks for services that no registry lists: oders"


def test_clients_that_lag_are_found_once_they_had_time() -> None:
    behind = samples.healthy_status()
    behind.clients[0].subscriptions[1].current_version = "b7de01a2c3f4e5d6"
    caught_up = samples.healthy_status()
    caught_up.clients[0].subscriptions[1].acknowledged_version = "b7de01a2c3f4e5d6"
    gone = samples.quiet_status()
    only(services.check_clients(a_plane(status=behind)), PASS)
    for later in (caught_up, gone):
        only(services.check_clients(a_plane(status=behind, later=later)), PASS)
    only(
        services.check_clients(a_plane(status=behind, later=behind)),
        WARN,
        "orders-7f3a91 has not acknowledged what is current of inventory",
        "mesh logs orders",
    )
    behind.clients[0].service = ""
    only(services.check_clients(a_plane(status=behind, later=behind)), WARN, "mesh logs SERVICE")


def test_edges_that_do_not_run_by_their_policies_are_found() -> None:
    def edge(**options: Any) -> list[Finding]:
        status = samples.healthy_status()
        status.edges.add(**{"edge": "public", "has_policy": True, **options})
        return services.check_edges(a_plane(status=status))

    def gateway(outcome: edge_service_pb2.EdgeOutcome.ValueType) -> admin_pb2.EdgeGatewayStatus:
        report = edge_service_pb2.EdgeReport(policy_version="b", outcome=outcome, detail="no such method")
        return admin_pb2.EdgeGatewayStatus(id="edge-1", report=report)

    good = gateway(edge_service_pb2.EDGE_OUTCOME_APPLIED)
    only(edge(gateways=[good]), PASS, "public: run by their policies")
    only(edge(gateways=[good], unknown_upstreams=["oders"]), WARN, "services that no registry lists: oders")
    only(edge(), WARN, "no gateway that follows it")
    only(edge(gateways=[good], has_policy=False), WARN, "so it exposes nothing")
    only(edge(gateways=[admin_pb2.EdgeGatewayStatus(id="edge-1")]), WARN, "has said nothing yet")
    rejected = gateway(edge_service_pb2.EDGE_OUTCOME_REJECTED)
    only(edge(gateways=[rejected]), FAIL, "edge-1 of public cannot obey b and keeps none: no such method")
    only(edge(gateways=[gateway(edge_service_pb2.EDGE_OUTCOME_FAILED)]), FAIL, "cannot be told b")
    assert services.check_edges(a_plane()) == []


# -- versions and words


def test_versions_are_compared() -> None:
    assert numbers("1.85.1rc1") == (1, 85, 1)
    assert numbers("main") == ()
    assert compatible("0.1.0", "0.1.9")
    assert not compatible("0.1.0", "0.2.0")
    assert compatible("1.2.0", "1.9.0")
    assert not compatible("1.2.0", "2.0.0")
    for version, bounds, held in (
        ("1.85.1", ">=1.85.1", True),
        ("1.85", ">=1.85.1", False),
        ("7.36", "<9,>=7.35.1", True),
        ("9.0", "<9,>=7.35.1", False),
        ("9", "<=9", True),
        ("9", ">9", False),
        ("1.85.7", "==1.85.*", True),
        ("1.86", "==1.85.*", False),
        ("1", "", True),
    ):
        assert satisfies(version, bounds) is held, (version, bounds)


def test_of_many_names_the_first_are_told() -> None:
    assert some(["a", "b"]) == "a, b"
    assert some(map(str, range(7))) == "0, 1, 2, 3, 4 and 2 more"
    assert replace(a_host(), user=0).user == 0
