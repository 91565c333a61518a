"""What tests of the gateway share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mesh_cli.app import app

GOLDEN = Path(__file__).parent / "golden"

Run = Callable[..., Result]
Golden = Callable[[str, str], None]


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares a text with a file of tests/gateway/golden; with ``--update`` writes it instead."""
    update = request.config.getoption("--update")

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path.name} is missing; write it with --update"
        assert text == path.read_text(encoding="utf-8")

    return compare


@pytest.fixture
def run() -> Run:
    """Runs the command in this process, in a pipe."""
    runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})

    def invoke(*arguments: str) -> Result:
        result = runner.invoke(app, list(arguments))
        unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
        assert not unexpected, f"traceback: {result.exception!r}"
        return result

    return invoke
