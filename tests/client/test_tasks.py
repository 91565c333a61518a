"""Tasks end when they are told to, also those that miss it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading

import pytest

from mesh_client.tasks import end_tasks, in_thread, obey_cancellation


async def test_a_cancellation_that_was_swallowed_is_obeyed() -> None:
    begun = asyncio.Event()

    async def swallows() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            begun.set()
            await asyncio.Event().wait()
        obey_cancellation()

    task = asyncio.create_task(swallows())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_who_was_not_cancelled_goes_on() -> None:
    obey_cancellation()


async def test_a_task_that_lost_its_cancellation_is_cancelled_again() -> None:
    wake, rounds = asyncio.Event(), 0

    async def loop() -> None:
        nonlocal rounds
        while True:
            await asyncio.wait_for(wake.wait(), 1_000.0)
            wake.clear()
            rounds += 1

    task = asyncio.create_task(loop())
    while not rounds:  # it waits within wait_for from then on
        wake.set()
        await asyncio.sleep(0)
    wake.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # what it waits for has ended, and it has not been told
    seen = rounds
    await end_tasks(task, again=0.01)
    assert task.cancelled()
    assert rounds > seen or sys.version_info >= (3, 12), "the first cancellation was lost, or this tests nothing"


async def test_tasks_end_together_and_what_they_raise_is_theirs(recwarn: pytest.WarningsRecorder) -> None:
    async def fails() -> None:
        raise ValueError("its own business")

    failing, waiting = asyncio.create_task(fails()), asyncio.create_task(asyncio.sleep(1_000.0))
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    await asyncio.sleep(0)
    await end_tasks(failing, None, waiting, done)
    assert failing.done()
    assert waiting.cancelled()
    await end_tasks()
    await end_tasks(None)


async def test_a_task_has_time_for_its_end() -> None:
    ended = False

    async def closes() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(1_000.0)
        finally:
            await asyncio.sleep(0.01)
            ended = True

    task = asyncio.create_task(closes())
    await asyncio.sleep(0)
    await end_tasks(task)
    assert ended


async def test_whoever_is_cancelled_waits_for_the_thread_that_works_for_it() -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait(30.0)
        ended.set()

    task = asyncio.create_task(in_thread(work))
    await asyncio.to_thread(begun.wait, 30.0)
    task.cancel()
    for _ in range(10):  # it has its turn, again and again
        await asyncio.sleep(0)
    assert not task.done()
    go.set()
    await asyncio.wait({task})
    assert (task.cancelled(), ended.is_set()) == (True, True)


async def test_what_a_thread_returns_and_raises_is_passed_on() -> None:
    assert await in_thread(int, "12", base=8) == 10
    with pytest.raises(ValueError, match="invalid literal"):
        await in_thread(int, "x")
