"""`mesh dashboard`: the link alone on standard output, and what to do where there is no dashboard."""

from __future__ import annotations

import json

import grpc
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import operations_pb2 as pb

from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin

URL = "http://127.0.0.1:7080/#login=ZLwoFbUnbPRLn5Ck5n-Ff3V8bVNZTFHHvCcLpJyXhT4"
LINK = pb.CreateDashboardLinkResponse(url=URL, valid=Duration(seconds=60), session=Duration(seconds=43_200))


def test_the_link_is_written_and_what_it_is_worth_is_said(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["CreateDashboardLink"] = LINK
    shown = run("dashboard", "--control-plane", admin.address)
    assert (shown.exit_code, shown.stdout) == (0, f"{URL}\n")
    assert shown.stderr == "Good once, for 1m00s. Whoever opens it is you for 12h00m.\n"


def test_without_identity_it_is_an_address(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["CreateDashboardLink"] = pb.CreateDashboardLinkResponse(url="http://127.0.0.1:7080/")
    shown = run("dashboard", "--control-plane", admin.address)
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "http://127.0.0.1:7080/\n", "")


def test_json(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["CreateDashboardLink"] = LINK
    shown = run("dashboard", "--json", "--control-plane", admin.address)
    assert json.loads(shown.stdout) == {"url": URL, "valid": 60.0, "session": 43_200.0}
    assert shown.stderr == ""


def test_where_there_is_none_it_is_said_how_to_have_one(run: Run, admin: ScriptedAdmin) -> None:
    refusal = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "this control plane has no dashboard; start it with ...")
    admin.answers["CreateDashboardLink"] = refusal
    shown = run("dashboard", "--control-plane", admin.address)
    assert (shown.exit_code, shown.stderr) == (1, "mesh: this control plane has no dashboard; start it with ...\n")


def test_other_refusals_are_told_as_those_of_every_command(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["CreateDashboardLink"] = Refusal(grpc.StatusCode.PERMISSION_DENIED, "that takes an operator")
    shown = run("dashboard", "--control-plane", admin.address)
    assert (shown.exit_code, "answered PERMISSION_DENIED: that takes an operator" in shown.stderr) == (1, True)
