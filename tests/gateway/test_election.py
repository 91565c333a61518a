"""Gateways that elect one of them through a real Consul."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gateway import election
from gateway.election import RULES, ConsulElection
from gateway.election_state import Election, Role
from mesh_client.addresses import HostPort
from mesh_client.core.errors import ConfigError
from tests.integration.consul_cluster import ConsulCluster

PATIENCE = 30.0


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.dev(tmp_path) as cluster:
        yield cluster


class Candidate:
    """One gateway's part, running."""

    def __init__(self, name: str, consul: ConsulCluster, token: Callable[[], str] = str, shift: float = 0.0) -> None:
        agent = consul.agents[0]
        self.shift = shift
        """Seconds that its clock goes ahead."""
        self.roles: list[Role] = []
        self.election = ConsulElection(
            "edge",
            name,
            HostPort("127.0.0.1", agent.http_port),
            self.roles.append,
            token=token,
            clock=lambda: asyncio.get_running_loop().time() + self.shift,
        )
        self.task = asyncio.create_task(self.election.run())

    async def becomes(self, role: Role) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.election.role is not role:
                assert not self.task.done() or self.task.exception() is None
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    def die(self) -> None:
        """As if killed: nothing is given back."""
        self.election._machine = Election(election.TTL, 0.0)
        self.task.cancel()


async def test_one_leads_and_when_it_stops_another_does_at_once(consul: ConsulCluster) -> None:
    first = Candidate("edge-1", consul)
    await first.becomes(Role.LEADER)
    second = Candidate("edge-2", consul)
    await second.becomes(Role.STANDBY)
    assert second.election.holder == "edge-1"
    assert first.election.role is Role.LEADER
    await first.stop()
    async with asyncio.timeout(election.TTL - 1.0):  # less than a session's life
        await second.becomes(Role.LEADER)
    await second.stop()


@pytest.mark.timeout(90)
async def test_when_the_leader_dies_another_takes_over_within_the_life_of_its_session(consul: ConsulCluster) -> None:
    first = Candidate("edge-1", consul)
    await first.becomes(Role.LEADER)
    second = Candidate("edge-2", consul)
    await second.becomes(Role.STANDBY)
    first.die()
    started = asyncio.get_running_loop().time()
    await second.becomes(Role.LEADER)
    assert asyncio.get_running_loop().time() - started < 2 * election.TTL + 9.0
    await second.stop()


async def test_while_consul_is_down_the_leader_goes_on_and_in_time_the_others_act_too(
    consul: ConsulCluster, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Candidate("edge-1", consul), Candidate("edge-2", consul)
    async with asyncio.timeout(PATIENCE):
        while {first.election.role, second.election.role} != {Role.LEADER, Role.STANDBY}:
            await asyncio.sleep(0.02)
    consul.agents[0].kill()
    for candidate in (first, second):
        candidate.shift = election.TTL
        await candidate.becomes(Role.ALONE)
    assert "cannot be asked" in caplog.text
    assert "acting alone, as may others" in caplog.text
    await consul.restart(consul.agents[0])
    async with asyncio.timeout(PATIENCE):
        while {first.election.role, second.election.role} != {Role.LEADER, Role.STANDBY}:
            await asyncio.sleep(0.02)
    # Nobody stopped pushing before another one could.
    leader = first if first.roles[0] is Role.LEADER else second
    assert leader.roles[:2] == [Role.LEADER, Role.ALONE]
    await first.stop()
    await second.stop()


@pytest.mark.timeout(90)
async def test_under_acls_a_token_with_the_stated_rules_is_enough_and_one_without_them_is_told_which(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ConsulCluster.three_with_acl(tmp_path) as consul:
        token = await consul.make_token(RULES)
        able = Candidate("edge-1", consul, lambda: token)
        await able.becomes(Role.LEADER)
        await able.stop()
        other = await consul.make_token('key_prefix "elsewhere" { policy = "read" }')
        unable = Candidate("edge-2", consul, lambda: other)
        async with asyncio.timeout(PATIENCE):
            while RULES not in caplog.text:
                await asyncio.sleep(0.02)
        assert other not in caplog.text
        await unable.stop()


async def test_a_token_that_cannot_be_read_is_said(consul: ConsulCluster, caplog: pytest.LogCaptureFixture) -> None:
    def unreadable() -> str:
        raise ConfigError("the token's file can be read by others")

    candidate = Candidate("edge-1", consul, unreadable)
    async with asyncio.timeout(PATIENCE):
        while "can be read by others" not in caplog.text:
            await asyncio.sleep(0.02)
    await candidate.stop()
