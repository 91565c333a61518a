"""`mesh demo` and `mesh up` leave no process, however they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from mesh_cli.demo.rabbitmq import ROOT_VARIABLE
from mesh_cli.demo.run import INTERRUPTED
from mesh_cli.demo.supervisor import ProcessError
from mesh_cli.demo.system import Layout, System
from tests.chaos.mesh_command import PATIENCE, running

pytestmark = pytest.mark.timeout(3 * PATIENCE)


async def test_a_system_of_which_one_instance_cannot_start_is_stopped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(ProcessError, match="SHOP_WEIGHT"):
        async with System(tmp_path, layout=Layout(weights={"orders": {2: 5000}})):
            pass


def test_killing_the_demo_itself_leaves_no_orphan() -> None:
    with running("demo", "--quick", broker=True) as demo:
        demo.read_until("policy of orders", timeout=PATIENCE)
        commands = " ".join(demo.processes().values())
        for part in ("demo --quick", "control-plane", "services.orders", "gateway run", "envoy", "beam.smp", "epmd"):
            assert part in commands
        demo.signal(signal.SIGKILL)
        demo.wait_gone()


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "SIGSTOP orders-2"), (signal.SIGTERM, "policy of orders"), (signal.SIGHUP, "starting")],
)
def test_interrupting_the_demo_stops_everything_and_cleans_up(number: signal.Signals, moment: str) -> None:
    with running("demo", "--quick") as demo:
        demo.read_until(moment, timeout=PATIENCE)
        demo.signal(number)
        assert demo.end(timeout=PATIENCE) == INTERRUPTED, demo.output
        assert demo.processes() == {}
        assert "Traceback" not in demo.output
        assert list(demo.temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("registry", "broker"), [pytest.param("embedded", True, marks=pytest.mark.measured), ("consul", False)]
)
def test_up_runs_until_it_is_interrupted(registry: str, broker: bool) -> None:
    with running("up", *["--consul"] * (registry == "consul"), broker=broker) as up:
        up.read_until("Ctrl-C stops everything", timeout=PATIENCE)
        address = up.output.partition("MESH_CONTROL_PLANE=")[2].split()[0]
        operator = up.output.partition("MESH_OPERATOR=")[2].split()[0]
        shown = subprocess.run(
            [sys.executable, "-m", "mesh_cli", "status", "--json", "--control-plane", address, "--operator", operator],
            env={**os.environ, "MESH_INSECURE": "0"},
            capture_output=True,
            timeout=30,
            check=True,
        )
        healthy = {row["service"]: row["healthy"] for row in json.loads(shown.stdout)["services"]}
        assert {service: healthy[service] for service in ("orders", "inventory", "payments")} == {
            "orders": 3,
            "inventory": 3,
            "payments": 2,
        }
        dashboard, _, code = up.output.partition("dashboard      ")[2].split()[0].partition("/#login=")
        said = {"Content-Type": "application/json", "Origin": dashboard}
        signing_in = urllib.request.Request(f"{dashboard}/api/login", json.dumps({"code": code}).encode(), said)
        with urllib.request.urlopen(signing_in, timeout=10) as answer:
            assert json.load(answer) == {"operator": "demo"}
        assert ("/ui/" in up.output) == (registry == "consul")
        edge = up.output.partition("edge           ")[2].split(",")[0]
        with urllib.request.urlopen(f"{edge}/v1/stock/espresso-beans", timeout=10) as answer:
            assert json.load(answer)["sku"] == "espresso-beans"
        assert received_from_the_edge(address, operator) == {("edge", "inventory")}
        exports = dict(re.findall(r"^  export (\w+)=(\S+)$", up.output, re.MULTILINE))
        assert ("MESH_BROKER" in exports) == ("mesh events status shipping" in up.output) == broker
        if broker:
            events = subprocess.run(
                [sys.executable, "-m", "mesh_cli", "events", "status", "shipping", "--json"],
                env={**os.environ, "MESH_INSECURE": "0", **exports},
                capture_output=True,
                timeout=30,
                check=True,
            )
            queue = json.loads(events.stdout)["queues"][0]
            assert (queue["queue"], queue["consumers"] > 0) == ("shipping.shipping", True)
        up.signal(signal.SIGINT)
        assert up.end(timeout=PATIENCE) == 0, up.output
        assert up.processes() == {}
        assert list(up.temporary.iterdir()) == []


def received_from_the_edge(address: str, operator: str) -> set[tuple[str, str]]:
    """Edges that servers know of a caller that reports nothing, which Envoy is, once there are some."""
    command = [sys.executable, "-m", "mesh_cli", "top", "--once", "--json"]
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        shown = subprocess.run(
            [*command, "--control-plane", address, "--operator", operator],
            env={**os.environ, "MESH_INSECURE": "0"},
            capture_output=True,
            timeout=30,
            check=True,
        )
        if found := {
            (each["caller"], each["service"]) for each in json.loads(shown.stdout)["edges"] if each["received"]
        }:
            return found
        time.sleep(0.5)
    raise AssertionError("no load report has told of the call")


def test_a_consul_that_cannot_be_run_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_CONSUL_BINARY", str(tmp_path / "nothing"))
    with running("up", "--consul") as up:
        assert up.end(timeout=PATIENCE) == 1
    assert "MESH_CONSUL_BINARY" in up.output
    assert "Traceback" not in up.output
