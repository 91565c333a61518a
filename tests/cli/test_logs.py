"""`mesh logs`, against scripted answers and, to the end, against a real control plane and a process that attends."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import operations_pb2 as pb

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_client.log_service import LogService
from mesh_client.logs import Logs, current_logs
from tests.cli.conftest import Run
from tests.cli.scripted import Refusal, ScriptedAdmin, scripted_admin

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

Golden = Callable[[str, str], None]


def process(name: str = "orders-1", service: str = "orders", id: str = "5f0c9a1b2c3d4e5f-4711") -> pb.Process:
    return pb.Process(
        service=service,
        instances=[name, f"{service}-host-7"],
        id=id,
        version="0.1.0",
        runtime="CPython 3.11.7",
        grpc_version="1.85.1",
        host="host-7",
        pid=4711,
    )


def record(sequence: int, message: str, **options: Any) -> pb.LogRecord:
    made = pb.LogRecord(
        **{
            "level": pb.LOG_LEVEL_INFO,
            "logger": "shop",
            "message": message,
            "sequence": sequence,
            "service": "orders",
            "instance": "orders-1",
            "process": "p1",
            **options,
        }
    )
    moment = Timestamp()
    moment.FromJsonString(f"2026-11-23T12:00:00.{sequence:03d}Z")
    made.time.CopyFrom(moment)
    return made


def everything() -> list[pb.LogRecord]:
    """Records of every look."""
    return [
        record(1, "in detail", level=pb.LOG_LEVEL_DEBUG, instance="orders-2", process="p2"),
        record(2, "order placed", fields='{"order_id": "o-1", "items": 2}', trace_id=TRACE, span_id="00f067aa0ba902b7"),
        record(3, "payment is slow", level=pb.LOG_LEVEL_WARNING, logger="shop.payments"),
        record(
            4,
            "went wrong",
            level=pb.LOG_LEVEL_ERROR,
            exception='Traceback (most recent call last):\n  File "a.py", line 1, in b\nLookupError: lost',
        ),
        record(5, "\x1b[31mred\x1b[0m [bold]", level=pb.LOG_LEVEL_CRITICAL, fields="not json"),
    ]


def answer(*records: pb.LogRecord, **options: Any) -> pb.TailLogsResponse:
    return pb.TailLogsResponse(records=records, **options)


def test_records_are_shown_in_the_order_of_time(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    later, *earlier = reversed(everything())
    admin.streams["TailLogs"] = [answer(processes=[process()]), answer(later), answer(*earlier)]
    shown = run("logs", "orders", "--control-plane", admin.address)
    assert (shown.exit_code, shown.stderr) == (0, "")
    golden("logs.txt", shown.stdout)
    as_json = run("logs", "orders", "--json", "--control-plane", admin.address)
    golden("logs.jsonl", as_json.stdout)


def test_the_options_are_asked_for(run: Run, admin: ScriptedAdmin) -> None:
    admin.streams["TailLogs"] = [answer(processes=[process()])]
    options = ("--instance", "orders-1", "--level", "WARNING", "--logger", "shop.db", "-n", "7")
    for words in (("logs", "orders"), ("logs", "show", "orders")):
        assert run(*words, *options, "--control-plane", admin.address).exit_code == 0
    wanted = pb.TailLogsRequest(
        service="orders", instance="orders-1", level=pb.LOG_LEVEL_WARNING, logger="shop.db", last=7
    )
    assert admin.requests == [wanted, wanted]
    for option, value in (("--level", "loud"), ("--logger", "no such logger"), ("--lines", "1001")):
        assert run("logs", "orders", option, value, "--control-plane", admin.address).exit_code == 2


def test_only_so_many_are_shown_and_what_is_missing_is_said(run: Run, admin: ScriptedAdmin) -> None:
    admin.streams["TailLogs"] = [
        answer(processes=[process()]),
        answer(*(record(number, str(number)) for number in range(1, 6)), silent=["orders-9"]),
    ]
    shown = run("logs", "orders", "-n", "2", "--control-plane", admin.address)
    assert [line.split()[-1] for line in shown.stdout.splitlines()] == ["4", "5"]
    assert shown.stderr == "mesh: orders-9 did not answer in time: its log is missing\n"


def test_every_control_plane_is_asked_and_one_that_cannot_be_is_said(
    run: Run, admin: ScriptedAdmin, nobody: str
) -> None:
    with scripted_admin() as other:
        admin.streams["TailLogs"] = [answer(record(2, "second"), processes=[process()])]
        other.streams["TailLogs"] = [answer(record(1, "first", process="p2"), processes=[process(id="p2")])]
        addresses = f"{admin.address},{other.address},{nobody}"
        shown = run("logs", "orders", "--control-plane", addresses)
        assert [line.split()[-1] for line in shown.stdout.splitlines()] == ["first", "second"]
        assert shown.stderr.startswith("mesh: logs of processes that are connected there are missing: cannot reach")
        admin.answers["SetLogLevel"] = pb.SetLogLevelResponse(outcomes=[pb.LogLevelOutcome(process=process())])
        changed = run("logs", "level", "orders", "debug", "--control-plane", addresses)
        assert changed.exit_code == 0
        assert "are left out: cannot reach the control plane" in changed.stderr
    gone = run("logs", "orders", "--control-plane", nobody)
    assert gone.exit_code == 1
    assert gone.stderr.startswith("mesh: cannot reach the control plane")


@pytest.mark.parametrize(
    ("instance", "words"),
    [
        ("", "no process of orders can be asked for its log: it has to call mesh_client.configure_logs"),
        ("orders-9", "no process of orders can be asked for its log"),
    ],
)
def test_that_nobody_can_be_asked_is_an_error_which_says_why(
    instance: str, words: str, run: Run, admin: ScriptedAdmin
) -> None:
    admin.answers["ListProcesses"] = pb.ListProcessesResponse(processes=[process("payments-1", "payments")])
    for command in (("logs", "orders"), ("logs", "level", "orders", "debug")):
        shown = run(*command, "--instance", instance, "--control-plane", admin.address)
        assert (shown.exit_code, shown.stdout) == (1, "")
        assert words in shown.stderr
        assert "There are processes of payments" in shown.stderr


def test_names_of_other_processes_are_told(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["ListProcesses"] = pb.ListProcessesResponse(processes=[process(), process("orders-2")])
    shown = run("logs", "orders", "--instance", "orders-9", "--control-plane", admin.address)
    assert shown.stderr == "mesh: orders has no process called orders-9; there are orders-1, orders-2\n"


def test_a_control_plane_that_refuses_is_an_error(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["TailLogs"] = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "32 logs are being read")
    for follow in ((), ("--follow",)):
        shown = run("logs", "orders", *follow, "--control-plane", admin.address)
        assert shown.exit_code == 1
        assert "32 logs are being read" in shown.stderr


def test_following_shows_what_comes_until_the_end(run: Run, admin: ScriptedAdmin) -> None:
    admin.answers["ListProcesses"] = pb.ListProcessesResponse()
    admin.streams["TailLogs"] = [
        answer(processes=[process()]),
        answer(record(1, "first")),
        answer(record(1, "first"), record(2, "second"), silent=["orders-9"], dropped=3),
    ]
    admin.answers["TailLogs"] = Refusal(grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
    shown = run("logs", "orders", "--follow", "--control-plane", admin.address)
    assert [line.split()[-1] for line in shown.stdout.splitlines()] == ["first", "second"]
    assert shown.exit_code == 1
    waiting, silent, dropped, error = shown.stderr.splitlines()
    assert waiting.startswith("mesh: waiting: no process of orders can be asked for its log")
    assert silent == "mesh: orders-9 did not answer in time: its log up to now is missing"
    assert dropped == "mesh: 3 records came faster than they could be read, and are missing here"
    assert "the workload has been revoked" in error


def test_following_needs_a_control_plane(run: Run, nobody: str) -> None:
    shown = run("logs", "orders", "--follow", "--control-plane", nobody)
    assert shown.exit_code == 1
    assert shown.stderr.startswith("mesh: cannot reach the control plane")


def test_levels_are_changed_and_what_became_of_it_is_shown(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["SetLogLevel"] = pb.SetLogLevelResponse(
        outcomes=[
            pb.LogLevelOutcome(process=process()),
            pb.LogLevelOutcome(process=process("orders-2", id="p2"), error="no answer within 5 s"),
        ]
    )
    words = ("logs", "level", "orders", "debug", "--logger", "shop", "--for", "90s", "--control-plane", admin.address)
    shown = run(*words)
    assert shown.exit_code == 1
    golden("logs_level.txt", shown.stdout)
    golden("logs_level.json", run(*words, "--json").stdout)
    asked = admin.requests[0]
    assert isinstance(asked, pb.SetLogLevelRequest)
    assert (asked.level, asked.logger, asked.duration.seconds) == (pb.LOG_LEVEL_DEBUG, "shop", 90)
    admin.answers["SetLogLevel"] = pb.SetLogLevelResponse(outcomes=[pb.LogLevelOutcome(process=process())])
    reset = run("logs", "level", "orders", "default", "--control-plane", admin.address)
    assert (reset.exit_code, "as configured" in reset.stdout) == (0, True)


def test_processes_are_listed(run: Run, admin: ScriptedAdmin, golden: Golden) -> None:
    admin.answers["ListProcesses"] = pb.ListProcessesResponse(
        processes=[process(), process("cp-1", "control-plane"), pb.Process(id="a client of no service")]
    )
    golden("logs_list.txt", run("logs", "list", "--control-plane", admin.address).stdout)
    golden("logs_list.json", run("logs", "list", "--json", "--control-plane", admin.address).stdout)


# -- to the end


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Logs]:
    monkeypatch.setattr("mesh_client.logs._current", None)
    level = logging.getLogger().level
    yield mesh_client.configure_logs(stream=io.StringIO())
    if (current := current_logs()) is not None:
        current.close()
    logging.getLogger().setLevel(level)


@asynccontextmanager
async def running(logs: Logs, address: str) -> AsyncIterator[ControlPlane]:
    options = ControlPlaneOptions(insecure=True, address=address, control_plane_id="cp-1")
    plane = ControlPlane(options, log=LogService(logs))
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop(0.1)


async def test_a_process_is_read_followed_over_a_restart_and_turned_to_debug(run: Run, logs: Logs, nobody: str) -> None:
    log = logging.getLogger("shop")
    log.info("before")

    async def mesh(*arguments: str) -> Any:
        return await asyncio.to_thread(run, *arguments, "--control-plane", plane.address)

    async with running(logs, nobody) as plane:
        client = mesh_client.connect(plane.address, service="orders", node_id="orders-1", cache_dir="")
        async with client:
            async with asyncio.timeout(30):
                while "orders-1" not in (await mesh("logs", "list")).stdout:
                    pass
            shown = await mesh("logs", "orders", "--logger", "shop")
            assert shown.stdout.endswith("info     orders-1 shop: before\n")
            own = await mesh("logs", "control-plane", "--logger", "shop", "--json")
            assert json.loads(own.stdout)["instance"] == "cp-1"
            follower = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "mesh_cli", "logs", "orders", "-f", "--json", "--logger", "shop"),
                *("--control-plane", plane.address),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            assert follower.stdout is not None

            async def line() -> str:
                async with asyncio.timeout(30):
                    return str(json.loads(await follower.stdout.readline())["message"])  # type: ignore[union-attr]  # a pipe

            assert await line() == "before"
            log.debug("not at this level")
            changed = await mesh("logs", "level", "orders", "debug", "--logger", "shop", "--for", "1m")
            assert changed.exit_code == 0, changed.stderr
            log.debug("in detail")
            assert await line() == "in detail"
            await plane.stop(0.1)
            log.info("while nobody was there")
            async with running(logs, plane.address):
                assert await line() == "while nobody was there"
                follower.send_signal(signal.SIGINT)
                _, errors = await asyncio.wait_for(follower.communicate(), 30)
            assert follower.returncode == 0
            assert b"trying again" in errors
            assert b"answers again" in errors
