from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def unmeasured_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts run as fast as they do elsewhere: coverage makes them half as fast, and late.

    What they run is measured in other tests; ``measured`` marks one in which it is measured all the same.
    """
    if request.node.get_closest_marker("measured") is None:
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
