from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import yaml
from mesh.v1 import admin_pb2, policy_pb2

from control_plane.convert import policy_to_proto
from mesh_client.core.policy import ServicePolicy
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin

Golden = Callable[[str, str], None]

PAYMENTS = """\
service: payments
authorization:
  - callers: [orders]
    methods: [shop.v1.PaymentService/*]
  - callers: [refunds, "operator:anna"]
    methods: [shop.v1.PaymentService/GetPayment, shop.v1.PaymentService/Refund]
"""
INVENTORY = "service: inventory\nauthorization: [{callers: [orders], methods: ['*']}]\n"
CHARGE = "shop.v1.PaymentService/Charge"


def stored(document: str, version: str) -> admin_pb2.StoredPolicy:
    policy = policy_to_proto(ServicePolicy.parse(yaml.safe_load(document)))
    return admin_pb2.StoredPolicy(service=policy.service, stored_version=version, policy=policy)


@pytest.fixture
def policies(admin: ScriptedAdmin) -> ScriptedAdmin:
    payments, inventory = stored(PAYMENTS, "7"), stored(INVENTORY, "3")
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(policy=payments)
    admin.answers["ListPolicies"] = admin_pb2.ListPoliciesResponse(policies=[inventory, payments])
    return admin


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "payments.yaml").write_text(PAYMENTS)
    (tmp_path / "both.yaml").write_text(f"{PAYMENTS}---\n{INVENTORY}")
    return "payments.yaml"


def test_an_allowed_call_is_said_to_be_with_the_rule_that_allows_it(
    run: Run, policies: ScriptedAdmin, golden: Golden
) -> None:
    result = run("policy", "check", "orders", CHARGE, "--control-plane", policies.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("policy_check_allowed.txt", result.stdout)


def test_a_denied_call_is_exit_code_1_and_says_why(run: Run, policies: ScriptedAdmin, golden: Golden) -> None:
    result = run(
        "policy", "check", "refunds", f"/{CHARGE}", "--service", "payments", "--control-plane", policies.address
    )
    assert (result.exit_code, result.stderr) == (1, "")
    golden("policy_check_denied.txt", result.stdout)


def test_the_answer_as_json(run: Run, policies: ScriptedAdmin, golden: Golden) -> None:
    options = ("--json", "--control-plane", policies.address)
    allowed = run("policy", "check", "operator:anna", "shop.v1.PaymentService/Refund", *options)
    denied = run("policy", "check", "operator:anna", CHARGE, *options)
    assert (allowed.exit_code, denied.exit_code) == (0, 1)
    golden("policy_check.json", allowed.stdout + denied.stdout)


def test_the_stored_version_of_the_service_that_is_asked_for_decides(run: Run, policies: ScriptedAdmin) -> None:
    run("policy", "check", "orders", CHARGE, "--service", "payments", "--control-plane", policies.address)
    assert policies.requests == [admin_pb2.GetPolicyRequest(service="payments")]


def test_a_file_decides_without_a_control_plane(run: Run, file: str, nobody: str) -> None:
    arguments = ("policy", "check", "refunds", CHARGE, "--control-plane", nobody)
    result = run(*arguments, "--file", file)
    assert result.exit_code == 1
    assert result.stdout.endswith("by the policy of payments: payments.yaml, document 1\n")
    assert run(*arguments, "--file", "both.yaml").stdout.startswith("denied: refunds may not call")
    other = run("policy", "check", "orders", CHARGE, "--file", "both.yaml", "--service", "inventory")
    assert other.exit_code == 0
    assert other.stdout.startswith("allowed: orders may call shop.v1.PaymentService/Charge of inventory: ")
    assert run(*arguments, "--file", "-", stdin=PAYMENTS).exit_code == 1


@pytest.mark.parametrize(
    ("caller", "code"),
    [("orders", 0), ("spiffe://mesh.internal/service/orders", 0), ("spiffe://mesh.internal/operator/orders", 1)],
)
def test_a_caller_may_be_given_by_its_spiffe_id(caller: str, code: int, run: Run, file: str) -> None:
    assert run("policy", "check", caller, CHARGE, "--file", file).exit_code == code


def test_what_is_open_is_said_to_be(run: Run, admin: ScriptedAdmin, file: str) -> None:
    admin.answers["GetPolicy"] = Refusal(grpc.StatusCode.NOT_FOUND, "no policy is stored for orders")
    result = run("policy", "check", "a", "b.C/D", "--service", "orders", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout.splitlines()) == (
        0,
        [
            (
                "allowed: a may call b.C/D of orders: "
                "without authorization rules everybody of the mesh may call everything"
            ),
            "by the policy of orders: none is stored, so the defaults apply",
        ],
    )
    health = run("policy", "check", "a", "grpc.health.v1.Health/Check", "--file", file)
    assert health.exit_code == 0
    assert "the health service is open to everybody of the mesh" in health.stdout


def test_a_long_rule_is_shortened(run: Run) -> None:
    names = ", ".join(f"caller-{number}" for number in range(12))
    text = f"service: orders\nauthorization: [{{callers: [{names}], methods: ['*']}}]\n"
    shown = run("policy", "check", "caller-11", "a.B/C", "--file", "-", stdin=text).stdout
    assert "allows caller-0, caller-1, caller-2, caller-3, caller-4 and 7 more to call *" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("orders", "b.C/D", "--file", "both.yaml"), "Policies with rules for b.C: none; say which one decides with"),
        (("orders", CHARGE, "--file", "both.yaml", "--service", "oders"), "both.yaml: holds no policy of oders"),
        (("orders", CHARGE, "--file", "missing.yaml"), "missing.yaml: cannot be read"),
        (("orders", CHARGE, "--file", "-"), "stdin, document 1: not a valid policy; see `mesh policy validate -`"),
    ],
)
def test_what_cannot_be_told_is_exit_code_2_with_the_reason(
    arguments: tuple[str, ...], message: str, run: Run, file: str
) -> None:
    result = run("policy", "check", *arguments, stdin="service: Orders\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_an_unreachable_control_plane_is_no_answer(run: Run, nobody: str) -> None:
    result = run("policy", "check", "orders", CHARGE, "--control-plane", nobody)
    assert (result.exit_code, result.stdout) == (2, "")


def test_a_refusal_of_the_control_plane_is_no_answer(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetPolicy"] = Refusal(grpc.StatusCode.PERMISSION_DENIED, "not you")
    result = run("policy", "check", "a", "b.C/D", "--service", "orders", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "PERMISSION_DENIED: not you" in result.stderr


def test_an_invalid_stored_policy_is_no_answer(run: Run, admin: ScriptedAdmin) -> None:
    errors = [admin_pb2.FieldError(path="authorization", message="bad")]
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(
        policy=admin_pb2.StoredPolicy(service="orders", stored_version="9", errors=errors)
    )
    arguments = ("policy", "check", "a", "b.C/D", "--service", "orders", "--control-plane", admin.address)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "stored version 9 of orders is invalid and not obeyed" in result.stderr
    policy = policy_pb2.ServicePolicy(service="orders", load_balancer=policy_pb2.LoadBalancer(algorithm="PSYCHIC"))
    admin.answers["GetPolicy"] = admin_pb2.GetPolicyResponse(
        policy=admin_pb2.StoredPolicy(service="orders", stored_version="9", policy=policy)
    )
    result = run(*arguments)
    assert result.exit_code == 2
    assert "stored version 9 of orders is not understood by this version of the command" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("*", CHARGE),
        ("Orders", CHARGE),
        ("operator:*", CHARGE),
        ("spiffe://mesh.internal/orders", CHARGE),
        ("orders", "Charge"),
        ("orders", "shop.v1.PaymentService/*"),
        ("orders", "*"),
        ("orders", CHARGE, "--service", "Payments"),
    ],
)
def test_what_is_no_caller_method_or_service_is_wrong_use(arguments: tuple[str, ...], run: Run) -> None:
    assert run("policy", "check", *arguments).exit_code == 2


def test_json_of_a_file_names_it(run: Run, file: str) -> None:
    answer = json.loads(run("policy", "check", "orders", CHARGE, "--json", "--file", file).stdout)
    assert (answer["file"], answer["stored_version"], answer["rule"]) == ("payments.yaml", None, 0)
