"""Every attack is heard: whatever anybody logs in a test is kept, and must hold no secret."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.security.world import Log, World, open_world


@pytest.fixture(autouse=True)
def log(capfd: pytest.CaptureFixture[str]) -> Iterator[Log]:
    """All records at DEBUG; at the end, neither they nor what was written to the terminal hold a secret."""
    made = Log()
    with made.listening():
        yield made
    made.check("\n".join(capfd.readouterr()))


@pytest.fixture
async def world(log: Log, tmp_path: Path) -> AsyncIterator[World]:
    """One control plane with an embedded registry, in memory."""
    async with open_world(tmp_path, log) as made:
        yield made
