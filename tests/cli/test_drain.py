"""`mesh drain` against scripted answers; tests/integration/test_full_drain.py has it on a real mesh."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from mesh.v1 import operations_pb2 as pb

from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin, scripted_admin

Golden = Callable[[str, str], None]


def drained(name: str, acknowledged: int, *pending: str, by_itself: bool = False) -> pb.DrainedEndpoint:
    return pb.DrainedEndpoint(
        endpoint_id=name, complete=not pending, acknowledged=acknowledged, pending=pending, by_itself=by_itself
    )


def answer(*endpoints: pb.DrainedEndpoint) -> pb.DrainEndpointsResponse:
    return pb.DrainEndpointsResponse(endpoints=endpoints)


def test_an_instance_is_drained(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["DrainEndpoints"] = answer(drained("orders-1", 3))
    shown = run("drain", "orders", "orders-1", "--timeout", "2.5", "--control-plane", admin.address)
    assert (shown.exit_code, shown.stderr) == (0, "")
    golden("drain.txt", shown.stdout)
    expected = pb.DrainEndpointsRequest(service="orders", endpoint_ids=["orders-1"])
    expected.timeout.FromMilliseconds(2500)
    assert admin.requests == [expected]


def test_who_has_not_acknowledged_is_told_and_is_a_failure(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["DrainEndpoints"] = answer(
        drained("orders-1", 1),
        drained("orders-2", 2, "gateway-02", "\x1b[31mevil"),
        drained("orders-3", 0, by_itself=True),
    )
    shown = run("drain", "orders", "--force", "--control-plane", admin.address)
    assert shown.exit_code == 1
    golden("drain_pending.txt", shown.stdout)
    golden("drain.json", run("drain", "orders", "--force", "--json", "--control-plane", admin.address).stdout)
    (asked, _) = admin.requests
    assert isinstance(asked, pb.DrainEndpointsRequest)
    assert asked.force


def test_the_clients_of_all_control_planes_count(run: Run, admin: ScriptedAdmin, nobody: str) -> None:
    admin.answers["DrainEndpoints"] = answer(drained("orders-1", 2))
    with scripted_admin() as other:
        other.answers["DrainEndpoints"] = answer(drained("orders-1", 1, "web-7"))
        shown = run("drain", "orders", "orders-1", "--control-plane", f"{admin.address},{other.address}")
    assert shown.stdout == ("orders-1: drained; 3 clients have acknowledged it, and these have not yet: web-7\n")
    assert shown.exit_code == 1
    half = run("drain", "orders", "orders-1", "--control-plane", f"{admin.address},{nobody}")
    assert half.exit_code == 1
    assert half.stdout == "orders-1: drained; 2 clients have acknowledged it\n"
    assert half.stderr.startswith("mesh: not done for the clients of one control plane: cannot reach")


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (
            Refusal(grpc.StatusCode.FAILED_PRECONDITION, "orders would have no healthy endpoint left"),
            "mesh: orders would have no healthy endpoint left; if that is meant, give --force\n",
        ),
        (
            Refusal(grpc.StatusCode.NOT_FOUND, "orders has no endpoint orders-9; there are: orders-1"),
            "mesh: orders has no endpoint orders-9; there are: orders-1\n",
        ),
    ],
)
def test_what_cannot_be_done_is_said(refusal: Refusal, words: str, run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["DrainEndpoints"] = refusal
    shown = run("drain", "orders", "orders-9", "--control-plane", admin.address)
    assert (shown.exit_code, shown.stdout, shown.stderr) == (1, "", words)


def test_without_a_control_plane_nothing_is_done(run: Run, nobody: str, admin: ScriptedAdmin) -> None:
    shown = run("drain", "orders", "--control-plane", nobody)
    assert (shown.exit_code, "cannot reach the control plane" in shown.stderr) == (1, True)
    admin.answers["DrainEndpoints"] = Refusal(grpc.StatusCode.INTERNAL, "a defect")
    assert "answered INTERNAL: a defect" in run("drain", "orders", "--control-plane", admin.address).stderr


def test_it_can_be_taken_back(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["UndrainEndpoints"] = pb.UndrainEndpointsResponse(endpoint_ids=["orders-2", "orders-1"])
    shown = run("drain", "orders", "--undo", "--control-plane", admin.address)
    assert shown.stdout == "orders-1: called again\norders-2: called again\n"
    golden("drain_undo.json", run("drain", "orders", "--undo", "--json", "--control-plane", admin.address).stdout)
    admin.answers["UndrainEndpoints"] = pb.UndrainEndpointsResponse()
    nothing = run("drain", "orders", "orders-1", "--undo", "--control-plane", admin.address)
    assert (nothing.exit_code, nothing.stdout) == (0, "No operator had drained any of them.\n")
    admin.answers["UndrainEndpoints"] = Refusal(grpc.StatusCode.FAILED_PRECONDITION, "orders-1 leaves by itself")
    assert run("drain", "orders", "--undo", "--control-plane", admin.address).stderr == (
        "mesh: orders-1 leaves by itself\n"
    )


def test_a_service_without_endpoints_has_nothing_to_drain(run: Run, admin: ScriptedAdmin) -> None:
    shown = run("drain", "orders", "--control-plane", admin.address)
    assert (shown.exit_code, shown.stdout) == (0, "orders has no endpoints.\n")
