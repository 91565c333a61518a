"""Child processes of a run: Python modules that say when they are ready and end when their standard input does."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

PATIENCE = 60.0
"""Seconds that a child may take to be ready, to answer, or to end."""


class Child:
    """A child that is asked and answers by lines of JSON."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.ready: Any = None
        """What it said when it was ready."""

    async def answer(self) -> Any:
        """Its next answer.

        Raises:
            RuntimeError: it ended instead; its own words are on standard error.
        """
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a child process ended with {await self._process.wait()}")
        return json.loads(line)

    async def ask(self, question: Any) -> Any:
        """Asks and returns the answer."""
        self.tell(question)
        return await self.answer()

    def tell(self, question: Any) -> None:
        """Asks without waiting for an answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")

    async def stop(self) -> None:
        """Ends it by closing its standard input; kills it when that does not help."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def child(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> AsyncIterator[Child]:
    """A child process that runs a module of this package, ready; ``environment`` is added to this process's own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *map(str, arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=64 * 1024 * 1024,
        env={**os.environ, **(environment or {})},
    )
    made = Child(process)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(made.stop)
        made.ready = await made.answer()
        yield made


async def serve_parent(ready: Any, answer: Callable[[Any], Awaitable[Any]] | None = None) -> None:
    """The child's side: says that it is ready, then answers each question until standard input ends."""
    reader = asyncio.StreamReader(limit=64 * 1024 * 1024)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say(ready)
    while line := await reader.readline():
        if answer is not None:
            _say(await answer(json.loads(line)))


def _say(words: Any) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()
