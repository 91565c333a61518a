"""The check that every test goes through finds what a test leaves behind, and nothing else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading

import grpc.aio
import pytest

from tests import leaks


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "PATIENCE", 0.05)


def test_a_child_process_that_goes_on_is_found_and_killed(impatient: None) -> None:
    before = leaks.living_descendants()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"x")
        child.stdin.flush()
        assert child.stdout.read(1) == b"x"  # a process that has only just begun may have no command line yet
        assert leaks.leaked_processes(before) == [f"process {child.pid} (cat)"]
    assert child.returncode == -9


def test_an_orphan_is_found_and_killed(impatient: None) -> None:
    before = leaks.living_descendants()
    parent = subprocess.run(["sh", "-c", "sleep 61 >&- 2>&- & echo $!"], check=True, capture_output=True, text=True)
    orphan = int(parent.stdout)
    (found,) = leaks.leaked_processes(before)
    assert found.startswith(f"process {orphan} (")  # its command line is still the shell's until it executes sleep
    os.waitpid(orphan, 0)


def test_a_process_that_was_there_before_or_is_ending_is_no_leak() -> None:
    with subprocess.Popen(["sleep", "60"]) as earlier:
        before = leaks.living_descendants()
        with subprocess.Popen(["sleep", "0.05"]):
            assert leaks.leaked_processes(before) == []
        earlier.kill()


def test_a_thread_that_goes_on_is_found(impatient: None) -> None:
    before = threading.enumerate()
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="left-behind")
    thread.start()
    assert leaks.leaked_threads(before) == ["thread left-behind"]
    done.set()
    thread.join()
    assert leaks.leaked_threads(before) == []


async def test_a_task_that_goes_on_is_found(impatient: None) -> None:
    done = asyncio.Event()
    task = asyncio.create_task(done.wait(), name="left-behind")
    (found,) = await leaks.leaked_tasks()
    assert found.startswith("task left-behind (")
    done.set()
    await task
    assert await leaks.leaked_tasks() == []


async def test_an_open_channel_is_found() -> None:
    before = leaks.open_channels()
    channel = grpc.aio.insecure_channel("127.0.0.1:9")
    assert leaks.leaked_channels(before) == ["open channel to 127.0.0.1:9"]
    await channel.close()
    assert leaks.leaked_channels(before) == []


async def test_a_server_that_serves_is_found_and_stopped() -> None:
    server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert await leaks.leaked_servers() == ["a grpc server that serves"]
    assert await leaks.leaked_servers() == []
    assert not await server.wait_for_termination(10.0)


LEAKY = """
import asyncio, subprocess, threading
import grpc.aio, pytest

@pytest.fixture
async def keeps_task():
    tasks = [asyncio.create_task(asyncio.sleep(60), name="of-the-fixture")]
    yield
    tasks.clear()

@pytest.fixture
async def ends_task():
    task = asyncio.create_task(asyncio.sleep(60))
    yield
    task.cancel()

async def test_task(): asyncio.create_task(asyncio.sleep(60), name="of-the-test")
async def test_fixture(keeps_task): pass
async def test_channel(request): request.config.channel = grpc.aio.insecure_channel("127.0.0.1:9")
async def test_server(request):
    server = request.config.server = grpc.aio.server()
    server.add_insecure_port("127.0.0.1:0")
    await server.start()
def test_process(): subprocess.Popen(["sleep", "62"])
async def test_clean(ends_task): await asyncio.sleep(0)
"""


def test_the_test_that_leaks_is_the_one_that_fails(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    root = leaks.__file__.rpartition("/tests/")[0]
    monkeypatch.setenv("PYTHONPATH", root)
    pytester.makeconftest("from tests.conftest import *\nfrom tests import leaks\nleaks.PATIENCE = 0.05\n")
    pytester.makepyfile(LEAKY)
    pytester.makeini("[pytest]\nasyncio_mode = auto\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:xdist")
    result.assert_outcomes(passed=6, errors=5)
    result.stdout.fnmatch_lines_random(
        [
            "*left behind: task of-the-test*",
            "*left behind: task of-the-fixture*",
            "*left behind: open channel to 127.0.0.1:9*",
            "*left behind: a grpc server that serves*",
            "*left behind: process * (sleep 62)*",
        ]
    )
