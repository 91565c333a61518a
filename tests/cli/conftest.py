"""What tests of the `mesh` command share: how it is run, a control plane that answers from a script, golden files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mesh_cli.app import app
from tests.cli.scripted import ScriptedAdmin, scripted_admin

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTH = 168

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process, in a pipe of a fixed width; ``stdin`` is its standard input."""
    for name in ("MESH_CONTROL_PLANE", "MESH_OPERATOR", "MESH_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    runner = CliRunner(env={"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "TERMINAL_WIDTH": str(WIDTH)})

    def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
        result = runner.invoke(app, list(arguments), input=stdin)
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        assert not unexpected, f"traceback: {result.exception!r}"
        return result

    return invoke


@pytest.fixture
def admin() -> Iterator[ScriptedAdmin]:
    """A real gRPC server whose `AdminService` answers what the test has put into it."""
    with scripted_admin() as scripted:
        yield scripted


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with ``tests/golden/NAME``; with ``--update`` writes the file instead."""
    update = request.config.getoption("--update")

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        # Tables are padded to the right; what nobody sees is not compared.
        stripped = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
        if update:
            path.write_text(stripped, encoding="utf-8")
        assert path.exists(), f"{path.name} is missing; write it with --update"
        assert stripped == path.read_text(encoding="utf-8")

    return compare
