from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import yaml
from mesh.v1 import admin_pb2, policy_pb2

from control_plane.convert import policy_to_proto
from mesh_cli.policy_form import settings, stated_yaml
from mesh_client.core.policy import ServicePolicy
from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin

Golden = Callable[[str, str], None]
Write = Callable[..., str]

KIND = admin_pb2.POLICY_KIND_SERVICE
BAD = """\
service: orders
timeout: soon
retry:
  max_attempts: 11
  retries: 3
---
service: payments
load_balancer: {algorithm: FASTEST}
---
service: inventory
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working directory; its name."""
    monkeypatch.chdir(tmp_path)

    def make(text: str | bytes, name: str = "orders.yaml") -> str:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return make


def as_sent(document: str) -> policy_pb2.ServicePolicy:
    """The policy as the control plane sends it."""
    return policy_to_proto(ServicePolicy.parse(yaml.safe_load(document)))


def stored(document: str, version: str) -> admin_pb2.StoredPolicy:
    policy = as_sent(document)
    return admin_pb2.StoredPolicy(service=policy.service, stored_version=version, policy=policy)


def invalid(service: str = "payments") -> admin_pb2.StoredPolicy:
    """A stored policy that is not obeyed."""
    errors = [admin_pb2.FieldError(path="retry.max_attempts", message="Input should be less than or equal to 10")]
    return admin_pb2.StoredPolicy(service=service, stored_version="9", errors=errors)


# validate


def test_a_valid_policy_is_said_to_be_valid_without_a_control_plane(run: Run, write: Write, nobody: str) -> None:
    result = run("policy", "validate", write(samples.ORDERS))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "orders.yaml, document 1: policy of orders is valid\n"


def test_every_bad_field_of_every_document_is_named_with_its_place(run: Run, write: Write, golden: Golden) -> None:
    result = run("policy", "validate", write(BAD))
    assert result.exit_code == 1
    assert result.stdout == "orders.yaml, document 3: policy of inventory is valid\n"
    golden("policy_validate_errors.txt", result.stderr)


def test_validation_as_json_holds_each_document_with_its_errors(run: Run, write: Write, golden: Golden) -> None:
    result = run("policy", "validate", "--json", write(BAD))
    assert (result.exit_code, result.stderr) == (1, "")
    golden("policy_validate.json", result.stdout)


def test_policies_are_read_from_standard_input(run: Run) -> None:
    result = run("policy", "validate", "-", stdin=samples.ORDERS)
    assert (result.exit_code, result.stdout) == (0, "stdin, document 1: policy of orders is valid\n")


def test_json_is_a_policy_too(run: Run, write: Write) -> None:
    assert run("policy", "validate", write('{"service": "orders", "timeout": "2s"}', "orders.json")).exit_code == 0


def test_one_service_stated_twice_is_an_error(run: Run, write: Write) -> None:
    first = write("service: orders\n", "a.yaml")
    second = write("service: orders\n", "b.yaml")
    result = run("policy", "validate", first, second)
    assert result.exit_code == 1
    assert result.stderr == "mesh: b.yaml, document 1: service: 'orders' is stated already by a.yaml, document 1\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no policy; expected at least one YAML document with `service: NAME`"),
        (b"---\n# nothing here\n...\n", "holds no policy; expected at least one YAML document with `service: NAME`"),
        (b"service: \xff\xfe\n", "is not UTF-8 text: byte 9 is 0xff"),
        (b"service: orders\nretry: }\n", "not YAML: line 2"),
        (b"- service\n", "expected a mapping"),
        (b"service: orders\nservice: payments\n", "given twice"),
    ],
)
def test_what_is_not_a_policy_file_is_a_clear_error(content: bytes, message: str, run: Run, write: Write) -> None:
    result = run("policy", "validate", write(content, "bad.yaml"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("mesh: bad.yaml")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "why"), [("missing.yaml", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_a_clear_error(name: str, why: str, run: Run, write: Write) -> None:
    result = run("policy", "validate", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"mesh: {name}: cannot be read: {why}\n"


# apply


def test_a_policy_is_stored_and_its_version_shown(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(after=stored(samples.ORDERS, "7"), changed=True)
    result = run("policy", "apply", write(samples.ORDERS), "--control-plane", admin.address)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "orders: stored version 7\n", "")
    assert admin.requests == [
        admin_pb2.ValidatePolicyRequest(document=samples.ORDERS, kind=KIND),
        admin_pb2.ApplyPolicyRequest(document=samples.ORDERS, kind=KIND),
    ]


def test_what_was_stored_before_is_shown(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    after = stored(samples.ORDERS, "8")
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(before=invalid("orders"), after=after, changed=True)
    result = run("policy", "apply", write(samples.ORDERS), "--control-plane", admin.address)
    assert result.stdout == "orders: stored version 8, was 9\n"


def test_storing_what_is_stored_changes_nothing(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    same = stored(samples.ORDERS, "7")
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(before=same, after=same)
    result = run("policy", "apply", write(samples.ORDERS), "--control-plane", admin.address)
    assert result.stdout == "orders: unchanged, stored version 7\n"


def test_a_new_comment_is_stored_and_changes_no_effect(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    before, after = stored(samples.ORDERS, "7"), stored(samples.ORDERS, "8")
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(before=before, after=after)
    result = run("policy", "apply", write("# why\n" + samples.ORDERS), "--control-plane", admin.address)
    assert result.stdout == "orders: stored version 8, was 7; its effect is the same\n"


def test_nothing_is_stored_when_one_of_several_is_bad(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    result = run("policy", "apply", write(BAD), "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith("mesh: nothing was stored\n")
    assert not admin.requests


def test_nothing_is_stored_when_one_is_bad_as_json(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    result = run("policy", "apply", "--json", write(BAD), "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (1, "")
    assert [item["valid"] for item in json.loads(result.stdout)["policies"]] == [False, False, True]
    assert not admin.requests


def test_what_a_control_plane_of_another_version_rejects_is_not_stored(
    run: Run, admin: ScriptedAdmin, write: Write
) -> None:
    errors = [admin_pb2.FieldError(path="routes", message="Extra inputs are not permitted")]
    admin.answers["ValidatePolicy"] = admin_pb2.ValidatePolicyResponse(errors=errors)
    result = run("policy", "apply", write(samples.ORDERS), "--control-plane", admin.address)
    assert result.exit_code == 1
    assert result.stderr == (
        "mesh: orders.yaml, document 1: routes: Extra inputs are not permitted\nmesh: nothing was stored\n"
    )
    assert [type(request) for request in admin.requests] == [admin_pb2.ValidatePolicyRequest]


@pytest.mark.parametrize(("given", "sent"), [("7", "7"), ("", "")])
def test_the_expected_version_is_sent(given: str, sent: str, run: Run, admin: ScriptedAdmin, write: Write) -> None:
    run("policy", "apply", write(samples.ORDERS), "--if-version", given, "--control-plane", admin.address)
    assert admin.requests[-1] == admin_pb2.ApplyPolicyRequest(document=samples.ORDERS, kind=KIND, if_version=sent)


def test_an_expected_version_for_several_policies_is_wrong_use(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    several = write("service: orders\n---\nservice: payments\n")
    result = run("policy", "apply", several, "--if-version", "7", "--control-plane", admin.address)
    assert result.exit_code == 2
    assert "needs exactly one policy, and there are 2" in result.stderr
    assert not admin.requests


def test_a_lost_race_says_how_to_go_on(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    admin.answers["ApplyPolicy"] = Refusal(grpc.StatusCode.ABORTED, "version 8 is stored, not 7")
    result = run("policy", "apply", write(samples.ORDERS), "--if-version", "7", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "mesh: orders.yaml, document 1: orders: not stored: version 8 is stored, not 7; "
        "read what is stored now with `mesh policy get orders`, and decide again\n"
    )


def test_a_refusal_is_part_of_the_json(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    admin.answers["ApplyPolicy"] = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "")
    result = run("policy", "apply", "--json", write(samples.ORDERS), "--control-plane", admin.address)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["policies"][0]["error"] == {"code": "RESOURCE_EXHAUSTED", "message": ""}
    assert result.stderr == "mesh: orders.yaml, document 1: orders: not stored: RESOURCE_EXHAUSTED\n"


def test_a_dry_run_shows_the_difference_of_the_effective_policies(
    run: Run, admin: ScriptedAdmin, write: Write, golden: Golden
) -> None:
    before = stored("service: orders\ntimeout: 1s\nretry: {max_attempts: 2}\n", "7")
    after = admin_pb2.StoredPolicy(service="orders", policy=as_sent(samples.ORDERS))
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(before=before, after=after, changed=True)
    arguments = ("policy", "apply", "--dry-run", write(samples.ORDERS), "--control-plane", admin.address)
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("policy_dry_run.txt", result.stdout)
    assert admin.requests[-1] == admin_pb2.ApplyPolicyRequest(document=samples.ORDERS, kind=KIND, dry_run=True)
    golden("policy_dry_run.json", run(*arguments, "--json").stdout)


def test_a_dry_run_compares_a_first_policy_with_the_defaults(run: Run, admin: ScriptedAdmin, write: Write) -> None:
    text = "service: orders\ncircuit_breaker: {enabled: false}\n"
    after = admin_pb2.StoredPolicy(service="orders", policy=as_sent(text))
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(after=after, changed=True)
    shown = run("policy", "apply", "--dry-run", write(text), "--control-plane", admin.address).stdout.splitlines()
    assert shown[:2] == ["--- orders (defaults)", "+++ orders (orders.yaml)"]
    assert [line for line in shown[3:] if line[0] in "+-"] == ["-  enabled: true", "+  enabled: false"]
    assert shown[-1] == "orders: would be stored"


def test_a_dry_run_over_an_invalid_policy_compares_with_the_defaults_and_says_why(
    run: Run, admin: ScriptedAdmin, write: Write
) -> None:
    after = admin_pb2.StoredPolicy(service="orders", policy=as_sent("service: orders"))
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(before=invalid("orders"), after=after, changed=True)
    result = run("policy", "apply", "--dry-run", write("service: orders"), "--control-plane", admin.address)
    assert result.stdout == "orders: would be stored in place of version 9; its effect is the same\n"
    after.policy.circuit_breaker.enabled = False
    admin.answers["ApplyPolicy"] = admin_pb2.ApplyPolicyResponse(before=invalid("orders"), after=after, changed=True)
    shown = run("policy", "apply", "--dry-run", "orders.yaml", "--control-plane", admin.address).stdout
    assert shown.startswith("--- orders (stored version 9, which is invalid and not obeyed; defaults)\n")


# get, list, delete


@pytest.mark.parametrize("name", ["stated", "effective"])
def test_a_stored_policy_is_shown_as_yaml_that_apply_takes(
    name: str, run: Run, admin: ScriptedAdmin, golden: Golden, write: Write
) -> None:
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=stored(samples.ORDERS, "7"))
    options = ["--effective"] if name == "effective" else []
    result = run("policy", "get", "orders", *options, "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden(f"policy_get_{name}.yaml", result.stdout)
    assert ServicePolicy.parse(yaml.safe_load(result.stdout)) == ServicePolicy.parse(yaml.safe_load(samples.ORDERS))


def test_a_stored_policy_as_json_holds_durations_as_numbers(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=stored(samples.ORDERS, "7"))
    result = run("policy", "get", "orders", "--json", "--control-plane", admin.address)
    golden("policy_get.json", result.stdout)
    policy = json.loads(result.stdout)["policy"]
    assert ServicePolicy.parse(policy) == ServicePolicy.parse(yaml.safe_load(samples.ORDERS))
    effective = run("policy", "get", "orders", "--json", "--effective", "--control-plane", admin.address)
    assert json.loads(effective.stdout)["policy"] == ServicePolicy.parse(yaml.safe_load(samples.ORDERS)).dump()


def test_what_is_left_out_of_the_yaml_is_exactly_the_defaults() -> None:
    text = "service: orders\nroutes: [{method: a.B/C, retry: {}, split: [{labels: {v: '1'}, weight: 1}]}]\n"
    assert yaml.safe_load(stated_yaml(as_sent(text))) == yaml.safe_load(text)


def test_a_share_of_zero_in_a_split_is_shown(run: Run, admin: ScriptedAdmin) -> None:
    text = "service: orders\nroutes: [{split: [{labels: {v: '1'}, weight: 5}, {labels: {v: '2'}, weight: 0}]}]\n"
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=stored(text, "7"))
    shown = run("policy", "get", "orders", "--effective", "--control-plane", admin.address).stdout
    assert [part["weight"] for part in yaml.safe_load(shown)["routes"][0]["split"]] == [5, 0]


def test_a_policy_of_a_newer_control_plane_is_shown_as_it_is(run: Run, admin: ScriptedAdmin) -> None:
    policy = policy_pb2.ServicePolicy(service="orders", load_balancer=policy_pb2.LoadBalancer(algorithm="PSYCHIC"))
    kept = admin_pb2.StoredPolicy(service="orders", stored_version="7", policy=policy)
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=kept)
    for options in ([], ["--effective"]):
        result = run("policy", "get", "orders", *options, "--control-plane", admin.address)
        assert (result.exit_code, result.stderr) == (0, "")
        assert yaml.safe_load(result.stdout) == {"service": "orders", "load_balancer": {"algorithm": "PSYCHIC"}}
    assert settings(policy) == ["load_balancer"]


def test_an_invalid_stored_policy_is_an_error_with_the_paths(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=invalid())
    result = run("policy", "get", "payments", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "mesh: payments, stored version 9: retry.max_attempts: Input should be less than or equal to 10\n"
    )
    as_json = run("policy", "get", "payments", "--json", "--effective", "--control-plane", admin.address)
    assert (as_json.exit_code, as_json.stderr) == (1, "")
    assert json.loads(as_json.stdout)["policy"] is None


def test_a_service_without_a_policy_is_said_to_have_the_defaults(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetPolicy"] = Refusal(grpc.StatusCode.NOT_FOUND, "no policy is stored for orders")
    result = run("policy", "get", "orders", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "mesh: orders has no policy of its own, so the defaults apply; see the defaults with --effective\n"
    )
    effective = run("policy", "get", "orders", "--effective", "--control-plane", admin.address)
    assert (effective.exit_code, effective.stderr) == (0, "")
    assert effective.stdout.startswith("# the defaults\nservice: orders\n")
    assert yaml.safe_load(effective.stdout) == ServicePolicy(service="orders").dump()


def test_another_refusal_to_show_a_policy_is_shown(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetPolicy"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    result = run("policy", "get", "orders", "--control-plane", admin.address)
    assert result.exit_code == 1
    assert "INTERNAL: broken" in result.stderr


def test_stored_policies_are_listed_with_what_differs_from_the_defaults(
    run: Run, admin: ScriptedAdmin, golden: Golden
) -> None:
    plain = stored("service: inventory", "3")
    admin.answers["ListPolicies"] = admin_pb2.ListPoliciesResponse(
        policies=[plain, stored(samples.ORDERS, "7"), invalid()]
    )
    result = run("policy", "list", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("policy_list.txt", result.stdout)
    as_json = json.loads(run("policy", "list", "--json", "--control-plane", admin.address).stdout)
    assert [item["stored_version"] for item in as_json["policies"]] == ["3", "7", "9"]


def test_that_nothing_is_stored_is_said(run: Run, admin: ScriptedAdmin) -> None:
    shown = run("policy", "list", "--control-plane", admin.address).stdout
    assert shown == "No policies are stored; every service gets the defaults.\n"


def test_a_policy_is_deleted(run: Run, admin: ScriptedAdmin) -> None:
    result = run("policy", "delete", "orders", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (0, "orders: deleted; the defaults apply\n")
    as_json = run("policy", "delete", "orders", "--if-version", "7", "--json", "--control-plane", admin.address)
    assert json.loads(as_json.stdout) == {"service": "orders", "deleted": True}
    assert admin.requests == [
        admin_pb2.DeletePolicyRequest(service="orders", kind=KIND),
        admin_pb2.DeletePolicyRequest(service="orders", kind=KIND, if_version="7"),
    ]


def test_a_policy_that_is_not_there_cannot_be_deleted(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["DeletePolicy"] = Refusal(grpc.StatusCode.NOT_FOUND, "no policy is stored for orders")
    result = run("policy", "delete", "orders", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "mesh: orders: not deleted: no policy is stored for orders\n"


# removals


def test_held_removals_are_confirmed(run: Run, admin: ScriptedAdmin) -> None:
    answers = {0: "Nothing was held.\n", 1: "1 endpoint removed.\n", 6: "6 endpoints removed.\n"}
    for number, expected in answers.items():
        admin.answers["ConfirmRemovals"] = admin_pb2.ConfirmRemovalsResponse(endpoints=number)
        result = run("removals", "confirm", "--control-plane", admin.address)
        assert (result.exit_code, result.stdout) == (0, expected)
    as_json = run("removals", "confirm", "--json", "--control-plane", admin.address)
    assert json.loads(as_json.stdout) == {"endpoints": 6}
