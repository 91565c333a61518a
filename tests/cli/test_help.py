from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.scripted import ScriptedAdmin

COMMANDS = [
    (),
    ("control-plane",),
    ("status",),
    ("endpoints",),
    ("trace",),
    ("check",),
    ("drain",),
    ("demo",),
    ("up",),
    ("policy",),
    ("policy", "apply"),
    ("policy", "validate"),
    ("policy", "get"),
    ("policy", "list"),
    ("policy", "delete"),
    ("policy", "check"),
    ("policy", "schema"),
    ("edge",),
    ("edge", "apply"),
    ("edge", "validate"),
    ("edge", "get"),
    ("edge", "list"),
    ("edge", "delete"),
    ("edge", "schema"),
    ("logs",),
    ("logs", "show"),
    ("logs", "level"),
    ("logs", "list"),
    ("removals",),
    ("removals", "confirm"),
    ("operator",),
    ("operator", "create"),
    ("token",),
    ("token", "create"),
    ("token", "list"),
    ("token", "revoke"),
    ("ca",),
    ("ca", "status"),
    ("ca", "roots"),
    ("ca", "revoke"),
    ("ca", "rotate"),
    ("ca", "rotate", "add"),
    ("ca", "rotate", "overlap"),
    ("ca", "rotate", "retire"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_help_has_an_example_of_that_command(command: tuple[str, ...], run: Run) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: mesh {' '.join(command)}".strip() in " ".join(result.stdout.split())


@pytest.mark.parametrize("command", [("frobnicate",), ("policy", "frobnicate"), ("status", "--frobnicate")])
def test_wrong_use_is_exit_code_2(command: tuple[str, ...], run: Run) -> None:
    assert run(*command).exit_code == 2


def test_the_version_is_shown(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, "grpc-mesh 0.1.0\n")


@pytest.mark.parametrize("words", ["mesh endpoints ", "mesh endpoints o"])
def test_the_shell_completes_names_of_services(
    words: str, run: Run, admin: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh_cli.options._COMPLETION_TIMEOUT", 30.0)
    admin.answers["GetStatus"] = samples.healthy_status()
    assert _completions(words, admin.address, monkeypatch) == (
        ["inventory", "orders"] if words.endswith(" ") else ["orders"]
    )


def test_the_shell_completes_names_of_edges(run: Run, admin: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_cli.options._COMPLETION_TIMEOUT", 30.0)
    admin.answers["GetStatus"] = samples.troubled_status()
    assert _completions("mesh edge get p", admin.address, monkeypatch) == ["public", "partners"]


def test_the_shell_completes_nothing_without_a_control_plane(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _completions("mesh endpoints ", nobody, monkeypatch) == []


def _completions(words: str, address: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash is told when the tabulator key is pressed after ``words``."""
    from typer.testing import CliRunner

    from mesh_cli.app import app

    environment = {
        "_MESH_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "MESH_CONTROL_PLANE": address,
    }
    return CliRunner(env=environment).invoke(app, [], prog_name="mesh").stdout.split()


def test_the_command_runs_as_a_process_and_as_a_module(admin: ScriptedAdmin) -> None:
    admin.answers["GetStatus"] = samples.quiet_status()
    command = [sys.executable, "-m", "mesh_cli", "status", "--control-plane", admin.address]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Control plane control-plane-1f0c at ")


@pytest.mark.parametrize("package", ["typer", "rich", "yaml"])
def test_a_missing_package_of_the_command_is_named_with_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from mesh_cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"mesh: the package {package!r} is missing; install it with pip install 'grpc-mesh[cli]'\n"
    )


@pytest.mark.parametrize("command", ["demo", "up"])
def test_the_demo_without_the_example_application_is_one_clear_line(command: str) -> None:
    code = "import sys; sys.modules['services'] = None; from mesh_cli.main import main; main()"
    arguments = [sys.executable, "-c", code, command]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("mesh: the example application is not installed")
    assert result.stderr.count("\n") == 1


def test_a_broken_installation_is_not_taken_for_a_missing_package() -> None:
    code = "import sys; sys.modules['mesh_cli.app'] = None; from mesh_cli.main import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr
