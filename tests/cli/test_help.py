from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli import samples
from tests.cli.commands import COMMANDS
from tests.cli.conftest import Run
from tests.cli.scripted import ScriptedAdmin


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
