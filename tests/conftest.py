"""What every test gets: a check that it leaves nothing running, and settings of hypothesis and golden files."""

from __future__ import annotations

import gc
import inspect
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator

import hypothesis
import pytest

from tests import leaks
from tests.ports import held_address

pytest_plugins = ["pytester"]

WHOLE_SYSTEMS = ("chaos", "deploy", "edge", "events", "integration", "security")

# That examples take long to make says something about the machine, not about what is tested.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=100,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=5_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update`` rewrites golden files instead of comparing with them."""
    parser.addoption("--update", action="store_true", help="write golden files instead of comparing with them")


def pytest_configure() -> None:
    """Prepares the checks below, and settles that tests are in plaintext unless they say that they are not.

    In the environment, so that the processes that tests start go by it too.
    """
    os.environ["MESH_INSECURE"] = "1"
    leaks.adopt_orphans()
    leaks.remember_channels_and_servers()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            # As in what a shell starts with "&" or nohup. Processes that tests start would inherit it, and not end when
            # tests ask them to; in place of a handler they get the default.
            signal.signal(number, lambda *_: None)


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the collections after each test need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that refuses connections for as long as the test runs."""
    with held_address() as address:
        yield address


@pytest.fixture(autouse=True)
def unmeasured_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that tests of whole systems start run as fast as elsewhere: coverage makes them half as fast, and late.

    What they run is measured in other tests; ``measured`` marks one in which it is measured all the same.
    """
    if request.path.parent.name in WHOLE_SYSTEMS and request.node.get_closest_marker("measured") is None:
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(autouse=True)
def level_of_the_log() -> Iterator[None]:
    """Commands that run in the test's process set it, as for a process of their own."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def leaves_no_processes_or_threads() -> Iterator[None]:
    """Fails the test that leaves child processes, orphans of theirs, or threads behind."""
    processes = leaks.living_descendants()
    threads = threading.enumerate()
    yield
    left = [*leaks.leaked_processes(processes), *leaks.leaked_threads(threads)]
    assert not left, f"the test left behind: {', '.join(left)}"


@pytest.fixture(autouse=True)
def leaves_no_tasks_or_channels(request: pytest.FixtureRequest, leaves_no_processes_or_threads: None) -> None:
    """Fails the asynchronous test that leaves tasks, open gRPC channels or running gRPC servers in its loop."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("watch_loop")


@pytest.fixture
async def watch_loop() -> AsyncIterator[None]:
    """Set up before, and so torn down after, the test's other asynchronous fixtures."""
    channels = leaks.open_channels()
    yield
    left = [*await leaks.leaked_servers(), *await leaks.leaked_tasks(), *leaks.leaked_channels(channels)]
    # What gRPC holds in cycles has to go while its loop lives: freed later, beside its threads, it has crashed Python.
    gc.collect()
    assert not left, f"the test left behind: {', '.join(left)}"
