from __future__ import annotations

import grpc
import pytest
from mesh.v1 import admin_pb2

from mesh_cli.client import AdminClient, RefusedError, UnreachableError
from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin

COMMANDS = [
    ("status",),
    ("endpoints", "orders"),
    ("policy", "list"),
    ("policy", "get", "orders"),
    ("policy", "delete", "orders"),
    ("removals", "confirm"),
]


def get_status(client: AdminClient) -> admin_pb2.GetStatusResponse:
    return client.call(client.stub.GetStatus, admin_pb2.GetStatusRequest())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_unreachable_control_plane_is_one_clear_line(command: tuple[str, ...], run: Run, nobody: str) -> None:
    result = run(*command, "--control-plane", nobody)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"mesh: cannot reach the control plane at {nobody} (")
    assert "refused" in result.stderr
    assert "`mesh control-plane`" in result.stderr
    assert "MESH_CONTROL_PLANE" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_control_plane_is_named_by_the_environment(
    run: Run, admin: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_CONTROL_PLANE", admin.address)
    assert run("status").exit_code == 0


def test_of_several_control_planes_the_first_that_answers_is_asked(admin: ScriptedAdmin, nobody: str, run: Run) -> None:
    admin.answers["GetStatus"] = samples.quiet_status()
    for addresses in ([nobody, admin.address], [admin.address, nobody]):
        result = run("status", "--control-plane", ",".join(addresses))
        assert (result.exit_code, result.stderr) == (0, "")
        assert f"at {admin.address}," in result.stdout


def test_none_of_several_control_planes_answers(nobody: str, run: Run) -> None:
    result = run("status", "--control-plane", f"{nobody},localhost:1")
    assert result.exit_code == 1
    assert f"at {nobody} or localhost:1 (" in result.stderr


def test_a_host_name_that_does_not_exist_is_unreachable() -> None:
    with (
        AdminClient(["nowhere.invalid:7070"], timeout=5.0) as client,
        pytest.raises(UnreachableError, match=r"at nowhere\.invalid:7070"),
    ):
        get_status(client)


def test_a_control_plane_that_does_not_answer_in_time_is_said_to_be_there(admin: ScriptedAdmin, run: Run) -> None:
    admin.held.clear()
    result = run("status", "--timeout", "0.2", "--control-plane", admin.address)
    assert result.exit_code == 1
    assert result.stderr == (
        f"mesh: the control plane at {admin.address} did not answer within 0.2 s; "
        "it may be overloaded: try a longer --timeout, and look at its log\n"
    )


def test_what_the_control_plane_itself_cannot_reach_is_its_own_answer(admin: ScriptedAdmin) -> None:
    admin.answers["GetStatus"] = Refusal(grpc.StatusCode.UNAVAILABLE, "consul: no cluster leader")
    with AdminClient([admin.address], timeout=5.0) as client:
        with pytest.raises(RefusedError) as caught:
            get_status(client)
        assert (caught.value.code, caught.value.details) == (grpc.StatusCode.UNAVAILABLE, "consul: no cluster leader")


def test_a_server_that_is_no_control_plane_is_said_to_be_none(run: Run) -> None:
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        result = run("status", "--control-plane", address)
    finally:
        server.stop(None).wait()
    assert result.exit_code == 1
    assert "it is not a grpc-mesh control plane" in result.stderr


def test_a_status_of_many_clients_is_received_whole(admin: ScriptedAdmin) -> None:
    status = samples.healthy_status()
    status.clients[0].subscriptions[0].rejection = "x" * 4096
    status.clients.extend([status.clients[0]] * 2_000)
    admin.answers["GetStatus"] = status
    with AdminClient([admin.address], timeout=10.0) as client:
        assert len(get_status(client).clients) == 2_001


@pytest.mark.parametrize(
    "address", ["", "nonsense", "localhost", "localhost:0", "localhost:65536", "::1:7070", "a b:1", ","]
)
def test_an_address_that_is_none_is_wrong_use(address: str, run: Run) -> None:
    result = run("status", "--control-plane", address)
    assert result.exit_code == 2
    assert "--control-plane" in result.stderr
