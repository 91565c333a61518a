"""`mesh demo` and `mesh up` as people run them: promises kept, and no process left however they end."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh_cli.demo import command
from mesh_cli.demo.promises import Promise, exactly
from mesh_cli.demo.rabbitmq import ROOT_VARIABLE
from mesh_cli.demo.run import INTERRUPTED
from mesh_cli.demo.stage import Stage
from mesh_cli.demo.supervisor import ProcessError
from mesh_cli.demo.system import Layout, System

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

PATIENCE = 100.0
"""Seconds for what takes a quarter of them on a machine that has nothing else to do."""
pytestmark = pytest.mark.timeout(3 * PATIENCE)

# Coverage of the command itself is measured, if at all: those that it starts would be late.
_MAIN = "import os; os.environ.pop('COVERAGE_PROCESS_CONFIG', None); from mesh_cli.main import main; main()"

TIMED = {"breaker.fast", "demo.time"}
"""What a machine that does other things besides need not keep."""

MARK = "GRPC_MESH_DEMO_TEST"


class Command:
    """A running `mesh` command whose processes can be told from all others by a variable in their environment."""

    def __init__(self, *arguments: str, broker: bool) -> None:
        # Not pytest's directory: the paths of sockets in it would be too long.
        self.temporary = Path(tempfile.mkdtemp(prefix="demo-"))
        self._mark = f"{MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *arguments],
            env={
                **os.environ,
                **({} if broker else {ROOT_VARIABLE: str(self.temporary / "nothing")}),
                name: value,
                "TMPDIR": str(self.temporary),
                "CI": "true",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    def close(self) -> None:
        """Kills it and reaps it."""
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def signal(self, number: signal.Signals) -> None:
        """To the command alone, as the kernel or an operator would; not to the processes that it started."""
        self._process.send_signal(number)

    def read_until(self, text: str, timeout: float) -> None:
        """Reads its output until the text has come."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while text not in self.output:
            readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(descriptor, 65536) if readable else b""
            assert data, f"no {text!r} in the output:\n{self.output}"
            self.output += data.decode()

    def end(self, timeout: float) -> int:
        """Its exit code, with all of its output read."""
        rest, _ = self._process.communicate(timeout=timeout)
        self.output += rest.decode()
        return self._process.returncode

    def processes(self) -> dict[int, str]:
        """Every process that carries the mark, the command itself included: process id to command line.

        The broker's environment is all its own; it has its files in the temporary directory.
        """
        found = {}
        marks = (self._mark.encode(), str(self.temporary).encode())
        for directory in Path("/proc").iterdir():
            if not directory.name.isdecimal():
                continue
            try:
                environment = (directory / "environ").read_bytes()
                if any(mark in environment for mark in marks):
                    found[int(directory.name)] = (directory / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # It has ended meanwhile, or is somebody else's.
        return found

    def wait_gone(self) -> None:
        """Returns when no process is left, each of which the kernel tells of by a descriptor."""
        deadline = time.monotonic() + 5.0
        for process in self.processes():
            try:
                descriptor = os.pidfd_open(process)
            except ProcessLookupError:
                continue
            select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            os.close(descriptor)
        assert self.processes() == {}


@contextmanager
def running(*arguments: str, broker: bool = False) -> Iterator[Command]:
    """A `mesh` command, killed at the end if it has not ended. Without a broker it starts in half the time."""
    command = Command(*arguments, broker=broker)
    try:
        yield command
    finally:
        command.close()


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
        up.signal(signal.SIGINT)
        assert up.end(timeout=PATIENCE) == 0, up.output
        assert up.processes() == {}
        assert list(up.temporary.iterdir()) == []


def test_a_consul_that_cannot_be_run_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_CONSUL_BINARY", str(tmp_path / "nothing"))
    with running("up", "--consul") as up:
        assert up.end(timeout=PATIENCE) == 1
    assert "MESH_CONSUL_BINARY" in up.output
    assert "Traceback" not in up.output
