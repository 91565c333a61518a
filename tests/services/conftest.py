"""A whole shop for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.services.shop import Stubs, open_shop


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Stubs]:
    """Two instances of orders, one of inventory and payments, on files of their own."""
    async with AsyncExitStack() as stack:
        yield await open_shop(tmp_path, stack)
