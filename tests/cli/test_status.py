from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from mesh.v1 import admin_pb2, edge_service_pb2

from mesh_cli.client import UnreachableError
from mesh_cli.status import gateway_result
from mesh_cli.watch import show
from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.scripted import ScriptedAdmin

Golden = Callable[[str, str], None]


@pytest.mark.parametrize("name", ["quiet", "healthy", "troubled"])
def test_status_is_shown_as_tables(name: str, run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetStatus"] = getattr(samples, f"{name}_status")()
    result = run("status", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden(f"status_{name}.txt", result.stdout.replace(admin.address, "127.0.0.1:7070"))


@pytest.mark.parametrize("name", ["quiet", "troubled"])
def test_status_is_written_as_stable_json(name: str, run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["GetStatus"] = getattr(samples, f"{name}_status")()
    result = run("status", "--json", "--control-plane", admin.address)
    assert (result.exit_code, result.stderr) == (0, "")
    golden(f"status_{name}.json", result.stdout)
    assert set(json.loads(result.stdout)) == {field.name for field in admin_pb2.GetStatusResponse.DESCRIPTOR.fields}


def test_terminal_escapes_in_a_clients_name_are_shown_and_not_obeyed(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["GetStatus"] = samples.troubled_status()
    shown = run("status", "--control-plane", admin.address).stdout
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert r"\x1b[31mevil\x07 [bold]" in shown


def test_a_narrow_terminal_folds_cells_and_loses_nothing(
    run: Run, admin: ScriptedAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin.answers["GetStatus"] = samples.healthy_status()
    monkeypatch.setenv("COLUMNS", "100")
    shown = run("status", "--control-plane", admin.address).stdout
    assert "…" not in shown


def test_watching_repeats_until_interrupted(run: Run, admin: ScriptedAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    answers: Iterator[admin_pb2.GetStatusResponse | UnreachableError]
    answers = iter([samples.quiet_status(), UnreachableError("gone"), samples.healthy_status()])

    def fetch() -> admin_pb2.GetStatusResponse:
        answer = next(answers)
        if isinstance(answer, UnreachableError):
            raise answer
        return answer

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            raise KeyboardInterrupt

    show(fetch, str, lambda answer: {"uptime": answer.uptime.seconds}, 1.5, wait)
    captured = capsys.readouterr()
    assert captured.out == '{"uptime":0}\n{"uptime":11525}\n'
    assert captured.err == "mesh: gone\n"
    assert waited == [1.5, 1.5, 1.5]


def test_watching_shows_tables_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = iter(["first", "second"])

    def wait(seconds: float) -> None:
        if next(remaining, None) is None:
            raise KeyboardInterrupt

    remaining = iter([1])
    show(lambda: next(rounds), str, None, 0.1, wait)
    assert capsys.readouterr().out == "first\nsecond\n"


def test_watching_ends_cleanly_on_ctrl_c(admin: ScriptedAdmin) -> None:
    admin.answers["GetStatus"] = samples.quiet_status()
    command = [sys.executable, "-m", "mesh_cli", "status", "--watch", "--json", "--interval", "0.05"]
    command += ["--control-plane", admin.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    assert [json.loads(line)["control_plane"] for line in lines] == ["control-plane-1f0c"] * 2


def test_a_gateway_that_stands_by_is_behind_nothing() -> None:
    standby = edge_service_pb2.EdgeReport(outcome=edge_service_pb2.EDGE_OUTCOME_STANDBY, policy_version="old")
    assert gateway_result(admin_pb2.EdgeGatewayStatus(report=standby), "new").plain == "standby"
