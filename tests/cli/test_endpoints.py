from __future__ import annotations

from collections.abc import Callable

import grpc
from mesh.v1 import admin_pb2

from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin

Golden = Callable[[str, str], None]


def test_endpoints_are_shown_as_a_table(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["ListEndpoints"] = samples.inventory_endpoints()
    result = run("endpoints", "inventory", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("endpoints.txt", result.stdout)
    assert admin.requests == [admin_pb2.ListEndpointsRequest(service="inventory")]


def test_endpoints_are_written_as_stable_json(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["ListEndpoints"] = samples.inventory_endpoints()
    result = run("endpoints", "inventory", "--json", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden("endpoints.json", result.stdout)


def test_nothing_is_said_of_the_guard_when_it_holds_nothing(run: Run, admin: ScriptedAdmin) -> None:
    answer = samples.inventory_endpoints()
    del answer.endpoints[4]
    admin.answers["ListEndpoints"] = answer
    assert "guard" not in run("endpoints", "inventory", "--control-plane", admin.address).stdout


def test_a_known_service_without_endpoints_is_said_to_be_that(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["ListEndpoints"] = admin_pb2.ListEndpointsResponse(version="e3b0c44298fc1c14")
    result = run("endpoints", "inventory", "--control-plane", admin.address)
    assert result.exit_code == 0
    assert "The service is known, but has no endpoints" in result.stdout


def test_an_unknown_service_is_an_error_that_says_where_the_known_ones_are(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["ListEndpoints"] = Refusal(grpc.StatusCode.NOT_FOUND, "unknown service")
    result = run("endpoints", "inventroy", "--control-plane", admin.address)
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr == "mesh: the mesh does not know a service 'inventroy'; `mesh status` lists those that it knows\n"
    )


def test_another_refusal_is_shown_as_the_control_plane_put_it(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["ListEndpoints"] = Refusal(grpc.StatusCode.INTERNAL, "broken")
    result = run("endpoints", "inventory", "--control-plane", admin.address)
    assert result.exit_code == 1
    assert result.stderr == f"mesh: the control plane at {admin.address} answered INTERNAL: broken\n"


def test_a_name_that_no_service_can_have_is_wrong_use(run: Run, admin: ScriptedAdmin) -> None:
    result = run("endpoints", "Not_A_Name", "--control-plane", admin.address)
    assert result.exit_code == 2
    assert "DNS label" in result.stderr
    assert not admin.requests
