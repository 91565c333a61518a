"""Processes start, hang, stop and die as they are told, and never outlive their supervisor."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway import guard
from mesh_cli.demo.supervisor import Process, ProcessError, Supervisor

READY = re.compile(r"^ready (\w+)$")
SERVE = "print('ready now', flush=True); signal.pause()"
STUBBORN = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {SERVE}"


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with Supervisor(tmp_path) as running:
        yield running


async def start(supervisor: Supervisor, code: str) -> Process:
    return await supervisor.start("child", [sys.executable, "-c", f"import signal; {code}"], os.environ, READY)


def state(process: Process) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_a_process_is_ready_when_it_says_so(supervisor: Supervisor) -> None:
    process = await start(supervisor, SERVE)
    assert (await process.wait_ready())[1] == "now"
    assert process.running
    assert os.getpgid(process.pid) == process.pid


async def test_a_process_that_ends_before_it_is_ready_shows_its_last_words(supervisor: Supervisor) -> None:
    process = await start(supervisor, "import sys; sys.exit('no such port')")
    with pytest.raises(ProcessError, match=r"(?s)ended with 1.*no such port"):
        await process.wait_ready()


async def test_a_process_that_is_never_ready_is_given_up_on(supervisor: Supervisor) -> None:
    process = await start(supervisor, "signal.pause()")
    with pytest.raises(ProcessError, match=r"more than 0\.05 s"):
        await process.wait_ready(timeout=0.05)


async def test_stopping_gives_the_process_time_to_leave(supervisor: Supervisor) -> None:
    # A handler could run between printing and pausing, which would then be for ever.
    await_it = "signal.pthread_sigmask(signal.SIG_BLOCK, [15]); print('ready now', flush=True); signal.sigwait([15])"
    process = await start(supervisor, f"{await_it}; exit(7)")
    await process.wait_ready()
    assert await process.stop() == 7
    assert not process.running
    process.signal(signal.SIGKILL)


async def test_a_process_that_does_not_leave_is_killed(supervisor: Supervisor) -> None:
    process = await start(supervisor, STUBBORN)
    await process.wait_ready()
    assert await process.stop(grace=0.05) == -signal.SIGKILL


async def test_a_frozen_process_can_be_thawed_and_stopped(supervisor: Supervisor) -> None:
    process = await start(supervisor, SERVE)
    await process.wait_ready()
    process.freeze()
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert state(process) == "T"
    process.thaw()
    os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WNOWAIT)
    process.freeze()
    assert await process.stop() == -signal.SIGTERM


async def test_the_log_holds_everything_and_the_tail_the_end(supervisor: Supervisor, tmp_path: Path) -> None:
    process = await start(supervisor, "print(*range(100), sep='\\n')")
    assert await process.wait() == 0
    assert (tmp_path / "child.log").read_text().split() == [str(number) for number in range(100)]
    assert process.tail().split() == [str(number) for number in range(80, 100)]


async def test_leaving_the_supervisor_kills_what_runs_even_what_hangs(tmp_path: Path) -> None:
    async with Supervisor(tmp_path) as supervisor:
        processes = [await start(supervisor, STUBBORN) for _ in range(3)]
        for process in processes:
            await process.wait_ready()
        processes[0].freeze()
    assert [process.running for process in processes] == [False] * 3


async def test_a_killed_supervisor_takes_its_processes_along(supervisor: Supervisor, tmp_path: Path) -> None:
    """A process that supervises another, both killed by one SIGKILL of the first."""
    code = f"""
import asyncio, os, pathlib, re, sys
from mesh_cli.demo.supervisor import Supervisor
async def main():
    async with Supervisor(pathlib.Path({str(tmp_path)!r})) as supervisor:
        child = await supervisor.start(
            "grandchild", [sys.executable, "-c", {"import signal; " + STUBBORN!r}], os.environ, re.compile("ready")
        )
        await child.wait_ready()
        print("ready", f"p{{child.pid}}", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    parent = await start(supervisor, code)
    grandchild = os.pidfd_open(int((await parent.wait_ready())[1][1:]))
    try:
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(grandchild, gone.set)
        await parent.kill()
        await asyncio.wait_for(gone.wait(), 30)
    finally:
        asyncio.get_running_loop().remove_reader(grandchild)
        os.close(grandchild)


def test_the_guard_knows_whether_the_parent_is_still_there() -> None:
    assert guard.die_with_parent(os.getppid(), 0)
    assert not guard.die_with_parent(os.getpid(), 0)


def test_the_guard_refuses_what_the_kernel_refuses() -> None:
    with pytest.raises(OSError, match="PDEATHSIG"):
        guard.die_with_parent(os.getppid(), 4096)


def test_the_guard_starts_nothing_for_a_parent_that_is_gone() -> None:
    try:
        with pytest.raises(SystemExit):
            guard.main([str(os.getpid()), "false"])
    finally:
        guard.die_with_parent(os.getppid(), 0)


def test_the_guard_becomes_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execvp", lambda program, arguments: became.append((program, arguments)))
    try:
        guard.main([str(os.getppid()), "program", "argument"])
    finally:
        guard.die_with_parent(os.getppid(), 0)
    assert became == [("program", ["program", "argument"])]
