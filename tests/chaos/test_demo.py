"""`mesh demo` as people run it: every promise is kept, and one that is not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh_cli.demo import command
from mesh_cli.demo.promises import Promise, exactly
from mesh_cli.demo.rabbitmq import ROOT_VARIABLE
from mesh_cli.demo.stage import Stage
from mesh_cli.demo.supervisor import ProcessError
from tests.chaos.mesh_command import PATIENCE, running

pytestmark = pytest.mark.timeout(3 * PATIENCE)

PROMISES = {
    "spread.round_robin",
    "spread.least_request",
    "spread.weighted_round_robin",
    "spread.random",
    "spread.ring_hash",
    "spread.peak_ewma",
    "rotation.failed",
    "rotation.certificates",
    "rotation.root",
    "identity.refused",
    "identity.denied",
    "kill.failed",
    "kill.avoided",
    "hang.failed",
    "hang.ejected",
    "hang.back",
    "breaker.opens",
    "breaker.fast",
    "breaker.closes",
    "breaker.resumed",
    "rolling.failed",
    "rolling.exits",
    "control_plane.failed",
    "control_plane.back",
    "control_plane.changes",
    "control_plane.forgotten",
    "books.stock",
    "books.payments",
    "shutdown.exits",
    "demo.time",
}

EVENTS = {"events.failed", "events.lost", "events.order", "events.twice", "events.drained"}
WITHOUT_BROKER = {"events.kept"}

TIMED = {"breaker.fast", "demo.time"}
"""What a machine that does other things besides need not keep."""


@pytest.mark.parametrize(
    ("registry", "broker"), [pytest.param("embedded", True, marks=pytest.mark.measured), ("consul", False)]
)
def test_every_promise_is_kept_and_nothing_is_left(tmp_path: Path, registry: str, broker: bool) -> None:
    figures = tmp_path / "promises.json"
    arguments = ("demo", "--quick", "--json", str(figures), *["--consul"] * (registry == "consul"))
    with running(*arguments, broker=broker) as demo:
        code = demo.end(timeout=2 * PATIENCE)
        assert demo.processes() == {}
        left = list(demo.temporary.iterdir())
    promises = {row["id"]: row for row in json.loads(figures.read_text())}
    broken = {id: row for id, row in promises.items() if not row["ok"]}
    assert broken.keys() <= TIMED, demo.output
    assert code == (1 if broken else 0), demo.output
    assert bool(left) == bool(broken), "logs are kept of a demo that broke a promise, and of no other"
    end = demo.output.partition("One of the failures that were caused on purpose")[2]
    assert "calls of demo to payments, shop.v1.PaymentService/Charge: UNAVAILABLE" in end
    assert "-> " in end
    assert "The dashboard was at http://127.0.0.1:" in end
    assert promises.keys() == PROMISES | (EVENTS if broker else WITHOUT_BROKER)
    assert all(row.keys() == {"id", "promise", "value", "unit", "goal", "ok", "note"} for row in promises.values())


def test_a_broken_promise_is_named_and_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        title = "Something that does not hold"

        async def play(self, stage: Stage) -> list[Promise]:
            return [exactly("broken.one", "nothing fails", 1, 0, "calls")]

    class Stuck:
        title = "Something that does not end"

        async def play(self, stage: Stage) -> list[Promise]:
            raise ProcessError("it did not start")

    monkeypatch.setattr("mesh_cli.demo.run.SCENARIOS", (Broken(), Stuck()))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nothing"))
    assert command(consul=False, json_file=tmp_path / "promises.json", quick=True) == 1
    rows = {row["id"]: row for row in json.loads((tmp_path / "promises.json").read_text())}
    assert {id for id, row in rows.items() if not row["ok"]} == {"broken.one", "Stuck"}
    assert "it did not start" in rows["Stuck"]["note"]
    message = capsys.readouterr().err
    assert "broken.one" in message
    (logs,) = tmp_path.glob("grpc-mesh-logs-*")
    assert str(logs) in message
    assert (logs / "orders-1.log").exists()
