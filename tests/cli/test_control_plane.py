from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mesh_cli.control_plane import default_data_dir, missing_extra
from tests.cli.conftest import Run

MESH = [sys.executable, "-m", "mesh_cli"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_control_plane_runs_until_it_is_told_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ["control-plane", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)]
    with subprocess.Popen([*MESH, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            assert ready.startswith("mesh control-plane listening on 127.0.0.1:")
            address = ready.split()[-1]
            status = [*MESH, "status", "--control-plane", address]
            shown = subprocess.run(status, capture_output=True, text=True, check=False, timeout=30)
            assert shown.returncode == 0, shown.stderr
            assert "embedded" in shown.stdout
            process.send_signal(number)
            _, logged = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, logged
    assert "Traceback" not in logged


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a control plane that is expected to fail at once."""
    return subprocess.run(
        [*MESH, "control-plane", "--listen", "127.0.0.1:0", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_a_dashboard_that_others_could_reach_is_wrong_use(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MESH_INSECURE")
    options = ("control-plane", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path))
    shown = run(*options, "--dashboard-listen", "0.0.0.0:7080")
    assert (shown.exit_code, "plaintext" in shown.stderr) == (2, True)
    shown = run(*options, "--insecure", "--dashboard-listen", "10.0.0.1:7080")
    assert (shown.exit_code, "identity (insecure)" in " ".join(shown.stderr.replace("│", " ").split())) == (2, True)
    certificate = tmp_path / "certificate.pem"
    certificate.touch()
    shown = run(*options, "--dashboard-certificate", str(certificate))
    assert (shown.exit_code, "--dashboard-listen" in shown.stderr) == (2, True)


def test_a_port_that_is_taken_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = start("--listen", address, "--data-dir", str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert f"mesh: cannot listen on {address}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_data_directory_that_cannot_be_made_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    result = start("--data-dir", str(blocker / "below"))
    assert (result.returncode, result.stdout) == (1, "")
    assert str(blocker) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_token_file_that_holds_no_token_is_a_failure_that_does_not_show_it(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("two words")
    file.chmod(0o600)
    result = start("--registry", "consul://127.0.0.1:1", "--consul-token-file", str(file))
    assert (result.returncode, result.stdout) == (1, "")
    assert "the Consul token has characters that no token has" in result.stderr
    assert "two words" not in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--listen", "nonsense", "address"),
        ("--registry", "zookeeper://localhost:2181", "registry"),
        ("--registry", "consul://localhost:0", "registry"),
        ("--max-streams", "0", "--max-streams"),
        ("--debounce-quiet", "5", "debounce_quiet"),
        ("--guard-hold", "-1", "--guard-hold"),
        ("--guard-hold", "nan", "--guard-hold"),
        ("--trace-memory", "-1", "--trace-memory"),
        ("--trace-age", "long", "--trace-age"),
        ("--otlp-listen", "0.0.0.0:4317", "otlp_address"),
        ("--jaeger-ui", "jaeger", "jaeger_ui"),
        ("--log-level", "chatty", "--log-level"),
        ("--consul-token-file", "missing", "--consul-token-file"),
    ],
)
def test_a_wrong_option_is_wrong_use_and_named(
    option: str, value: str, expected: str, run: Run, tmp_path: Path
) -> None:
    result = run("control-plane", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path), option, value)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_a_missing_package_is_named_with_what_to_install() -> None:
    code = "import sys; sys.modules['grpc_reflection'] = None; from mesh_cli.main import main; main()"
    command = [sys.executable, "-c", code, "control-plane", "--listen", "127.0.0.1:0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "mesh: the control plane needs the package 'grpc_reflection', which is not installed; "
        "install it with pip install 'grpc-mesh[control-plane]'\n"
    )


def test_a_broken_installation_is_not_taken_for_a_missing_extra() -> None:
    broken = ModuleNotFoundError("No module named 'control_plane.server'", name="control_plane.server")
    with pytest.raises(ModuleNotFoundError):
        missing_extra(broken)


def test_state_is_kept_in_the_state_directory_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "grpc-mesh"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_data_dir() == Path("/home/somebody/.local/state/grpc-mesh")
