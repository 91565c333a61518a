"""What `mesh token` and `mesh ca` ask for and show, against scripted answers."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import authority_pb2 as pb

from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin

OLD, NEW = "0a0363a603f8b36d" + 48 * "0", "bc43fee59561cfc1" + 48 * "0"
TOKEN = "mesh1.abc.def"


def at(text: str) -> Timestamp:
    moment = Timestamp()
    moment.FromJsonString(text)
    return moment


def orders_token(uses_left: int = 3) -> pb.JoinToken:
    return pb.JoinToken(
        id="8a1e3cc39be0f858",
        service="orders",
        expires=at("2026-11-23T13:00:00Z"),
        uses_left=uses_left,
        uses=3,
        created_by="spiffe://mesh.internal/operator/alice",
    )


def workload(number: str, who: str, ends: str, bundle: str, attested_by: str, *, revoked: bool = False) -> pb.Workload:
    return pb.Workload(
        id=number,
        spiffe_id=f"spiffe://mesh.internal/{who}",
        serial="1",
        expires=at(ends),
        root=OLD,
        bundle_version=bundle,
        attested_by=attested_by,
        revoked=revoked,
    )


def authority(*roots: pb.TrustRoot) -> pb.GetCertificateAuthorityResponse:
    ends, token = "2026-11-24T12:00:00Z", "join token"
    return pb.GetCertificateAuthorityResponse(
        trust_domain="mesh.internal",
        bundle_version="8712e7268d47fcdb",
        roots=roots or [root(OLD, signing=True, workloads=2), root(NEW, unconfirmed=1)],
        workloads=[
            workload("1d2f0a9b8c7e6f50", "service/orders", ends, "8712e7268d47fcdb", f"{token} 8a1e3cc39be0f858"),
            workload("6a37e8ea78e22dc3", "operator/alice", "2026-12-23T12:00:00Z", "", "operator"),
            workload("9b5d1c3e7a2f4860", "service/payments", ends, "346d5ea9742ce7dd", f"{token} 56574661480e7111"),
            workload(
                "c0ffee0123456789",
                "service/orders",
                "2026-11-23T18:00:00Z",
                "346d5ea9742ce7dd",
                f"{token} 8a1e3cc39be0f858",
                revoked=True,
            ),
        ],
        issuer="own root",
        issuer_expires=at("2027-11-23T12:00:00Z"),
    )


def root(fingerprint: str, *, signing: bool = False, workloads: int = 0, unconfirmed: int = 0) -> pb.TrustRoot:
    return pb.TrustRoot(
        fingerprint=fingerprint,
        expires=at("2036-11-20T12:00:00Z"),
        signing=signing,
        workloads=workloads,
        unconfirmed=unconfirmed,
    )


def test_a_token_is_on_standard_output_alone_and_what_it_is_for_beside_it(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["CreateJoinToken"] = pb.CreateJoinTokenResponse(token=TOKEN, details=orders_token())
    result = run(
        *("token", "create", "--service", "orders", "--ttl", "1.5h", "--uses", "3", "--control-plane", admin.address)
    )
    assert (result.exit_code, result.stdout) == (0, f"{TOKEN}\n")
    assert result.stderr == "Token 8a1e3cc39be0f858 lets 3 workloads join as orders until 2026-11-23T13:00:00Z.\n"
    request = admin.requests[-1]
    assert isinstance(request, pb.CreateJoinTokenRequest)
    assert (request.service, request.ttl.ToSeconds(), request.uses) == ("orders", 5400, 3)


def test_a_token_can_go_to_a_file_that_its_owner_alone_reads(run: Run, admin: ScriptedAdmin, tmp_path: Path) -> None:
    admin.answers["CreateJoinToken"] = pb.CreateJoinTokenResponse(token=TOKEN, details=orders_token())
    file = tmp_path / "orders.token"
    create = ("token", "create", "--service", "orders", "--file", str(file), "--control-plane", admin.address)
    result = run(*create)
    assert (result.exit_code, result.stdout) == (0, "")
    assert TOKEN not in result.stderr
    assert file.read_text() == f"{TOKEN}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shown = json.loads(run(*create, "--json").stdout)
    assert (shown["token"], shown["details"]["expires"]) == ("", "2026-11-23T13:00:00Z")
    nowhere = run(*create[:-3], str(tmp_path / "none" / "x"), *create[-2:])
    assert nowhere.exit_code == 1
    assert "cannot be written" in nowhere.stderr
    assert TOKEN not in nowhere.stderr


@pytest.mark.parametrize("ttl", ["1", "h", "1w", "-1h", "1h30m", ""])
def test_a_time_that_is_none_is_wrong_use(run: Run, admin: ScriptedAdmin, ttl: str) -> None:
    result = run("token", "create", "--service", "orders", f"--ttl={ttl}", "--control-plane", admin.address)
    assert result.exit_code == 2
    assert "90s, 10m, 24h or 30d" in " ".join(result.stderr.replace("│", " ").split())
    assert admin.requests == []


def test_tokens_are_listed_without_themselves(
    run: Run, admin: ScriptedAdmin, golden: Callable[[str, str], None]
) -> None:
    other = pb.JoinToken(
        id="56574661480e7111",
        service="payments",
        expires=at("2026-11-23T14:00:00Z"),
        uses_left=1,
        uses=1,
        created_by="spiffe://mesh.internal/operator/bob",
    )
    admin.answers["ListJoinTokens"] = pb.ListJoinTokensResponse(tokens=[orders_token(2), other])
    result = run("token", "list", "--control-plane", admin.address)
    assert result.exit_code == 0
    golden("token_list.txt", result.stdout)
    shown = json.loads(run("token", "list", "--json", "--control-plane", admin.address).stdout)
    assert [token["id"] for token in shown["tokens"]] == ["8a1e3cc39be0f858", "56574661480e7111"]
    admin.answers["ListJoinTokens"] = pb.ListJoinTokensResponse()
    assert run("token", "list", "--control-plane", admin.address).stdout == "There are no join tokens.\n"


def test_a_token_is_revoked_by_its_id(run: Run, admin: ScriptedAdmin) -> None:
    result = run("token", "revoke", "8a1e3cc39be0f858", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (0, "Token 8a1e3cc39be0f858 is worthless now.\n")
    assert admin.requests[-1] == pb.RevokeJoinTokenRequest(id="8a1e3cc39be0f858")
    assert json.loads(run("token", "revoke", "x", "--json", "--control-plane", admin.address).stdout) == {}
    admin.answers["RevokeJoinToken"] = Refusal(grpc.StatusCode.NOT_FOUND, "no")
    result = run("token", "revoke", "nobody", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (
        1,
        "mesh: there is no join token 'nobody'; `mesh token list` shows those that are good\n",
    )


def test_the_authority_is_shown_with_its_roots_and_workloads(
    run: Run, admin: ScriptedAdmin, golden: Callable[[str, str], None]
) -> None:
    admin.answers["GetCertificateAuthority"] = authority()
    result = run("ca", "status", "--control-plane", admin.address)
    assert result.exit_code == 0
    golden("ca_status.txt", result.stdout)
    shown = json.loads(run("ca", "status", "--json", "--control-plane", admin.address).stdout)
    assert [root["fingerprint"] for root in shown["roots"]] == [OLD, NEW]
    assert shown["issuer_expires"] == "2027-11-23T12:00:00Z"


@pytest.mark.parametrize(
    ("roots", "said"),
    [
        ([root(OLD, signing=True, workloads=2), root(NEW)], "Next: `mesh ca rotate overlap`"),
        ([root(OLD, workloads=2), root(NEW, signing=True)], "2 workloads of the old one will renew soon"),
        ([root(OLD), root(NEW, signing=True)], "Next: `mesh ca rotate retire`"),
    ],
)
def test_a_rotation_says_what_comes_next(roots: list[pb.TrustRoot], said: str, run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetCertificateAuthority"] = authority(*roots)
    assert said in run("ca", "status", "--control-plane", admin.address).stdout


def test_without_workloads_and_rotation_it_says_so(run: Run, admin: ScriptedAdmin) -> None:
    answer = authority(root(OLD, signing=True))
    del answer.workloads[:]
    admin.answers["GetCertificateAuthority"] = answer
    shown = run("ca", "status", "--control-plane", admin.address).stdout
    assert "No workload has a certificate." in shown
    assert "Next" not in shown


@pytest.mark.parametrize(
    ("step", "value", "force"),
    [
        ("add", pb.ROTATION_STEP_ADD, False),
        ("overlap", pb.ROTATION_STEP_OVERLAP, True),
        ("retire", pb.ROTATION_STEP_RETIRE, False),
    ],
)
def test_each_step_of_a_rotation_is_asked_for_and_shows_the_state_after_it(
    step: str, value: pb.RotationStep.ValueType, force: bool, run: Run, admin: ScriptedAdmin
) -> None:
    admin.answers["RotateTrustRoot"] = pb.RotateTrustRootResponse(authority=authority())
    options = ("--force",) if force else ()
    result = run("ca", "rotate", step, *options, "--control-plane", admin.address)
    assert result.exit_code == 0
    assert "Trust domain mesh.internal" in result.stdout
    assert admin.requests[-1] == pb.RotateTrustRootRequest(step=value, force=force)
    shown = json.loads(run("ca", "rotate", step, "--json", "--control-plane", admin.address).stdout)
    assert shown["authority"]["trust_domain"] == "mesh.internal"
    admin.answers["RotateTrustRoot"] = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "2 workloads would be cut off")
    result = run("ca", "rotate", step, "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (1, "mesh: 2 workloads would be cut off\n")
    admin.answers["RotateTrustRoot"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    assert "answered INTERNAL: broken" in run("ca", "rotate", step, "--control-plane", admin.address).stderr


def test_workloads_are_revoked_by_id_or_service(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["RevokeWorkload"] = pb.RevokeWorkloadResponse(workload_ids=["1d2f0a9b8c7e6f50"])
    result = run("ca", "revoke", "--workload", "1d2f0a9b8c7e6f50", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (0, "Revoked 1 workload: 1d2f0a9b8c7e6f50\n")
    assert admin.requests[-1] == pb.RevokeWorkloadRequest(workload_id="1d2f0a9b8c7e6f50")
    shown = run("ca", "revoke", "--service", "orders", "--json", "--control-plane", admin.address).stdout
    assert json.loads(shown) == {"workload_ids": ["1d2f0a9b8c7e6f50"]}
    assert admin.requests[-1] == pb.RevokeWorkloadRequest(service="orders")
    admin.answers["RevokeWorkload"] = Refusal(grpc.StatusCode.NOT_FOUND, "no")
    result = run("ca", "revoke", "--service", "orders", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (
        1,
        "mesh: there is no workload of orders; `mesh ca status` shows those that exist\n",
    )


@pytest.mark.parametrize("which", [(), ("--workload", "x", "--service", "orders"), ("--service", "No Service")])
def test_revoking_needs_one_of_both(which: tuple[str, ...], run: Run, admin: ScriptedAdmin) -> None:
    assert run("ca", "revoke", *which, "--control-plane", admin.address).exit_code == 2
    assert admin.requests == []
