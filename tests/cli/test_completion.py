"""What the shell completes: names from the control plane, at once or not at all, and never an error."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mesh.v1 import admin_pb2, endpoint_pb2, operations_pb2
from typer.testing import CliRunner

from mesh_cli import options
from mesh_cli.app import app
from tests.cli import samples
from tests.cli.scripted import ScriptedAdmin

Complete = Callable[..., list[str]]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Complete:
    """What bash is told when the tabulator key is pressed after some words; nothing else may be written."""
    monkeypatch.setattr(options, "_COMPLETION_TIMEOUT", 30.0)

    def ask(words: str, address: str, **variables: str) -> list[str]:
        environment = {
            "_MESH_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
            "MESH_CONTROL_PLANE": address,
            **variables,
        }
        result = CliRunner(env=environment).invoke(app, [], prog_name="mesh")
        assert result.stderr == ""
        assert result.exit_code == 0
        return result.stdout.split()

    return ask


@pytest.fixture
def answering(admin: ScriptedAdmin) -> ScriptedAdmin:
    """A control plane that knows services, edges, processes and endpoints."""
    admin.answers["GetStatus"] = samples.troubled_status()
    admin.answers["ListProcesses"] = operations_pb2.ListProcessesResponse(
        processes=[
            operations_pb2.Process(service="orders", instances=["orders-1", "other name"]),
            operations_pb2.Process(service="orders", instances=["orders-2"]),
        ]
    )
    admin.answers["ListEndpoints"] = admin_pb2.ListEndpointsResponse(
        endpoints=[admin_pb2.EndpointStatus(endpoint=endpoint_pb2.Endpoint(id=f"orders-{each}")) for each in (7, 8)]
    )
    return admin


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("mesh endpoints ", ["inventory", "orders", "payments"]),
        ("mesh endpoints o", ["orders"]),
        ("mesh endpoints --control-plane {address} o", ["orders"]),
        ("mesh policy get i", ["inventory"]),
        ("mesh edge get p", ["public", "partners"]),
        ("mesh drain o", ["orders"]),
        ("mesh drain orders ", ["orders-7", "orders-8"]),
        ("mesh drain orders orders-7 orders-8", ["orders-8"]),
        ("mesh logs o", ["orders"]),
        ("mesh logs l", ["level", "list"]),
        ("mesh logs --foll", ["--follow"]),
        ("mesh logs orders --foll", ["--follow"]),
        ("mesh logs show o", ["orders"]),
        ("mesh logs orders --instance ", ["orders-1", "orders-2"]),
        ("mesh logs level orders deb", ["debug"]),
        ("mesh logs level orders --instance orders-2", ["orders-2"]),
        ("mesh che", ["check"]),
        ("mesh check --st", ["--strict"]),
    ],
)
def test_names_and_words_are_completed(
    words: str, completed: list[str], complete: Complete, answering: ScriptedAdmin
) -> None:
    assert complete(words.format(address=answering.address), answering.address) == completed


@pytest.mark.parametrize(
    "words", ["mesh endpoints ", "mesh edge get ", "mesh drain orders ", "mesh logs orders --instance "]
)
def test_nothing_is_completed_without_a_control_plane(words: str, complete: Complete, nobody: str) -> None:
    assert complete(words, nobody) == []


def test_nothing_is_completed_by_what_hangs_or_speaks_something_else(
    complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "_COMPLETION_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        begun = time.monotonic()
        addresses = ",".join([f"127.0.0.1:{hanging.getsockname()[1]}"] * 9)
        assert complete("mesh endpoints ", addresses) == []
        assert time.monotonic() - begun < 5.0


@pytest.mark.parametrize(
    "variables",
    [
        {"MESH_INSECURE": "", "XDG_CONFIG_HOME": "/nonexistent"},
        {"MESH_INSECURE": "", "MESH_OPERATOR": "{directory}"},
        {"MESH_CONTROL_PLANE": "nonsense"},
    ],
    ids=["no credentials", "broken credentials", "no address"],
)
def test_what_is_wrong_is_not_said_in_the_middle_of_the_line(
    variables: dict[str, str], complete: Complete, nobody: str, tmp_path: Path
) -> None:
    (tmp_path / "operator.key").touch(0o600)
    settings = {name: value.format(directory=tmp_path) for name, value in variables.items()}
    assert complete("mesh endpoints ", settings.pop("MESH_CONTROL_PLANE", nobody), **settings) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_for_shells_can_be_shown(shell: str) -> None:
    # Without the variable typer looks at which shell runs this.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "mesh_cli", "--show-completion", shell]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
    assert "complete_" + shell in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_real_bash_completes(answering: ScriptedAdmin, tmp_path: Path) -> None:
    # The command, but for how long it waits: a busy machine may not answer within what a user would wait for.
    command = tmp_path / "mesh"
    command.write_text(
        f"#!{sys.executable}\nfrom mesh_cli import options\nfrom mesh_cli.main import main\n"
        "options._COMPLETION_TIMEOUT = 30.0\nmain()\n"
    )
    command.chmod(0o755)
    script = """
eval "$(mesh --show-completion bash)"
COMP_WORDS=(mesh endpoints o); COMP_CWORD=2
_mesh_completion mesh
printf '%s\\n' "${COMPREPLY[@]}"
"""
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MESH_CONTROL_PLANE": answering.address,
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("orders\n", "")
