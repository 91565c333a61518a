"""``mesh edge``: what it shares with `mesh policy` is tested there; here is what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import yaml
from mesh.v1 import admin_pb2

from control_plane.convert import edge_policy_to_proto
from mesh_client.core.edge_policy import EdgePolicy
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin
from tests.edge_policies import P256

Golden = Callable[[str, str], None]
Write = Callable[..., str]

KIND = admin_pb2.POLICY_KIND_EDGE
OLD = "{edge: public, services: {shop.v1.InventoryService: {upstream: inventory}}}"
PUBLIC = f"""\
edge: public
services:
  shop.v1.InventoryService:
    upstream: inventory
    timeout: 2s
  shop.v1.OrderService:
    upstream: orders
    authentication: [jwt]
    methods:
      GetOrder: {{authentication: [none]}}
consumers:
  web:
    jwt_issuers:
    - issuer: https://login.example
      algorithm: ES256
      public_key: |
{"".join(f"        {line}" for line in P256.splitlines(keepends=True))}"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working directory; its name."""
    monkeypatch.chdir(tmp_path)

    def make(text: str, name: str = "public.yaml") -> str:
        (tmp_path / name).write_text(text)
        return name

    return make


def stored(document: str, version: str) -> admin_pb2.StoredPolicy:
    policy = EdgePolicy.parse(yaml.safe_load(document))
    message = edge_policy_to_proto(policy)
    return admin_pb2.StoredPolicy(service=policy.edge, stored_version=version, edge_policy=message)


def invalid(edge: str = "partners") -> admin_pb2.StoredPolicy:
    errors = [admin_pb2.FieldError(path="services.a.B.upstream", message="Field required")]
    return admin_pb2.StoredPolicy(service=edge, stored_version="9", errors=errors)


def test_policies_are_checked_without_a_control_plane(run: Run, write: Write, nobody: str) -> None:
    result = run("edge", "validate", write(PUBLIC + "---\naccess_log: true\n"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "public.yaml, document 1: policy of edge public is valid",
        "public.yaml, document 2: policy of edge edge is valid",
    ]


def test_every_bad_field_is_named_with_its_line(run: Run, write: Write) -> None:
    text = "edge: public\nservices:\n  a.B:\n    authentication: [jwt]\n---\nservice: orders\n---\nedge: public\n"
    result = run("edge", "validate", write(text))
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "mesh: public.yaml, document 1: services.a.B.upstream: Field required (line 3)",
        "mesh: public.yaml, document 2: service: Extra inputs are not permitted (line 6)",
    ]
    answer = json.loads(run("edge", "validate", "--json", "public.yaml").stdout)
    assert [item["edge"] for item in answer["documents"]] == [None, None, "public"]
    again = run("edge", "validate", write("edge: a\n---\nedge: a\n"))
    assert again.stderr == "mesh: public.yaml, document 2: edge: 'a' is stated already by public.yaml, document 1\n"
    assert "expected at least one YAML document with `edge: NAME`" in run("edge", "validate", write("")).stderr


def test_a_policy_is_stored_and_what_may_not_be_meant_is_said(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(
        after=stored(PUBLIC, "7"),
        changed=True,
        warnings=[admin_pb2.FieldError(path="services.a.B.upstream", message="no registry lists a service 'b' now")],
    )
    result = run("edge", "apply", write(PUBLIC), "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (0, "edge public: stored version 7\n")
    assert result.stderr == (
        "mesh: public.yaml, document 1: services.a.B.upstream: no registry lists a service 'b' now\n"
    )
    assert admin.requests == [
        admin_pb2.ValidatePolicyRequest(document=PUBLIC, kind=KIND),
        admin_pb2.ApplyPolicyRequest(document=PUBLIC, kind=KIND),
    ]
    as_json = json.loads(run("edge", "apply", "--json", "public.yaml", "--control-plane", admin.address).stdout)
    (made,) = as_json["policies"]
    assert (made["edge"], made["stored_version"], made["warnings"][0]["path"]) == (
        "public",
        "7",
        "services.a.B.upstream",
    )


def test_a_dry_run_shows_the_difference(run: Run, admin: ScriptedAdmin, write: Write, golden: Golden) -> None:
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(
        before=stored(OLD, "7"), after=stored(PUBLIC, ""), changed=True
    )
    result = run("edge", "apply", "--dry-run", write(PUBLIC), "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("edge_dry_run.txt", result.stdout)
    assert admin.requests[-1] == admin_pb2.ApplyPolicyRequest(document=PUBLIC, kind=KIND, dry_run=True)


def test_a_first_policy_is_compared_with_nothing_exposed(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(after=stored(OLD, ""), changed=True)
    shown = run("edge", "apply", "--dry-run", write(OLD), "--control-plane", admin.address).stdout
    assert shown.startswith("--- edge public (defaults)\n+++ edge public (public.yaml)\n")
    assert "-services: {}\n+services:\n+  shop.v1.InventoryService:\n" in shown


def test_a_lost_race_says_how_to_go_on(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    admin.answers["ApplyPolicy"] = Refusal(grpc.StatusCode.ABORTED, "version 8 is stored, not 7")
    result = run("edge", "apply", write(PUBLIC), "--if-version", "7", "--control-plane", admin.address)
    assert result.exit_code == 1
    assert (
        "edge public: not stored: version 8 is stored, not 7; read what is stored now with `mesh edge get public`"
        in (result.stderr)
    )


def test_a_stored_policy_is_shown_as_yaml_that_apply_takes(
    run: Run, admin: ScriptedAdmin, golden: Golden, write: Write
) -> None:
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=stored(PUBLIC, "7"))
    result = run("edge", "get", "public", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("edge_get.yaml", result.stdout)
    for options in ([], ["--effective"]):
        shown = run("edge", "get", "public", *options, "--control-plane", admin.address).stdout
        assert EdgePolicy.parse(yaml.safe_load(shown)) == EdgePolicy.parse(yaml.safe_load(PUBLIC))
    assert admin.requests[0] == admin_pb2.GetPolicyRequest(service="public", kind=KIND)
    as_json = json.loads(run("edge", "get", "public", "--json", "--control-plane", admin.address).stdout)
    assert (as_json["edge"], as_json["stored_version"], as_json["errors"]) == ("public", "7", [])
    assert EdgePolicy.parse(as_json["policy"]) == EdgePolicy.parse(yaml.safe_load(PUBLIC))


def test_an_edge_without_a_policy_is_said_to_expose_nothing(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetPolicy"] = Refusal(grpc.StatusCode.NOT_FOUND, "no policy is stored for edge public")
    result = run("edge", "get", "public", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (
        1,
        "mesh: edge public has no policy of its own, so it exposes nothing; see the defaults with --effective\n",
    )
    effective = run("edge", "get", "public", "--effective", "--control-plane", admin.address)
    assert yaml.safe_load(effective.stdout) == EdgePolicy(edge="public").dump()


def test_an_invalid_stored_policy_is_an_error_with_the_paths(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=invalid())
    result = run("edge", "get", "partners", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "mesh: edge partners, stored version 9: services.a.B.upstream: Field required\n"


def test_stored_policies_are_listed(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    assert run("edge", "list", "--control-plane", admin.address).stdout == (
        "No policies of edges are stored; nothing is exposed.\n"
    )
    admin.answers["ListPolicies"] = admin_pb2.ListPoliciesResponse(policies=[invalid(), stored(PUBLIC, "7")])
    golden("edge_list.txt", run("edge", "list", "--control-plane", admin.address).stdout)
    as_json = json.loads(run("edge", "list", "--json", "--control-plane", admin.address).stdout)
    assert [item["edge"] for item in as_json["policies"]] == ["partners", "public"]
    assert admin.requests[0] == admin_pb2.ListPoliciesRequest(kind=KIND)


def test_a_policy_is_deleted(run: Run, admin: ScriptedAdmin) -> None:
    result = run("edge", "delete", "public", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (0, "edge public: deleted; it exposes nothing\n")
    as_json = run("edge", "delete", "public", "--if-version", "7", "--json", "--control-plane", admin.address)
    assert json.loads(as_json.stdout) == {"edge": "public", "deleted": True}
    assert admin.requests[-1] == admin_pb2.DeletePolicyRequest(service="public", if_version="7", kind=KIND)
