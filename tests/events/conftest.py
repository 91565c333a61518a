"""One real RabbitMQ for all tests of events that a process runs, with a clean virtual host for each."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from mesh_client.core.events.topology import CONTROL_PLANE, OPERATOR
from mesh_client.events import consumer
from tests.events.services import Services
from tests.integration.rabbitmq import RabbitMQ

USERS = ("orders", "shipping", "notifications", OPERATOR, CONTROL_PLANE)
VHOSTS = tuple(f"test-{number}" for number in range(6))
_numbers = itertools.count()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A broker. Tests that stop it have one of their own."""
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq"), USERS, vhosts=VHOSTS[:2], outlives_tests=True) as broker:
        yield broker


@pytest.fixture(autouse=True)
def no_wait_for_new_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brokers that are not killed soon after need none."""
    monkeypatch.setattr(consumer, "SETTLE", 0.0)


@pytest.fixture
def vhost(rabbitmq: RabbitMQ) -> str:
    """A virtual host in which no group has anything to do."""
    return VHOSTS[next(_numbers) % 2]


@pytest.fixture
async def services(rabbitmq: RabbitMQ, vhost: str, tmp_path: Path) -> AsyncIterator[Services]:
    """Makes buses of services in a virtual host of their own, and closes them."""
    async with AsyncExitStack() as stack:
        services = Services(rabbitmq, vhost, tmp_path, stack)
        yield services
    await services.clean()
