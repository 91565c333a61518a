"""The Consul source and policy store against three real servers, ACLs with default deny."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from control_plane.events import ServiceVanished
from control_plane.sources import StoreUnavailableError
from control_plane.sources.consul import ConsulSource
from control_plane.sources.consul_http import ConsulToken, parse_registry
from control_plane.sources.consul_policies import ConsulPolicyStore
from tests.control_plane.recording import Recording, recorded
from tests.integration.consul_cluster import ConsulCluster

READER = 'service_prefix "" { policy = "read" }\nnode_prefix "" { policy = "read" }'


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.three_with_acl(tmp_path) as cluster:
        yield cluster


def source(consul: ConsulCluster, token: str = "") -> ConsulSource:
    return ConsulSource(parse_registry(consul.registry), ConsulToken(token))


def reads(recording: Recording, ids: set[str]) -> bool:
    return recording.connected and recording.ids("orders") == ids


def is_lost(recording: Recording) -> bool:
    return not recording.connected


async def test_tokens_good_fresh_anonymous_narrow_and_deleted(consul: ConsulCluster) -> None:
    await consul.register("orders", "orders-1", agent=consul.agents[1])
    token = await consul.make_token(READER)

    # Fresh, and asked of a follower that may not know it yet.
    leader = await consul.leader()
    follower = next(agent for agent in consul.agents if agent is not leader)
    fresh = ConsulSource(parse_registry(f"consul://{follower.address}"), ConsulToken(await consul.make_token(READER)))
    async with recorded(fresh) as recording:
        # The agent tells the others of a registration a moment after it has taken it.
        await recording.until(lambda: reads(recording, {"orders-1"}))
        assert [event for event in recording.events if re.search(r"\b403\b", getattr(event, "detail", ""))] == []

    # Without rights Consul answers with an empty catalog and status 200.
    async with recorded(source(consul)) as recording:
        await recording.until(lambda: "empty catalog" in recording.detail)
        assert "service_prefix" in recording.detail
        assert not recording.connected

    # May see services, but no nodes: every service looks empty.
    narrow = await consul.make_token('service_prefix "" { policy = "read" }')
    async with recorded(source(consul, narrow)) as recording:
        await recording.until(lambda: "node_prefix" in recording.detail)
        assert not recording.connected
        assert recording.services == {}

    # The token is deleted under way.
    async with recorded(source(consul, token)) as recording:
        await recording.until(lambda: recording.connected)
        await consul.delete_token(token)
        await consul.register("payments", "payments-1")  # wakes the blocking query
        await recording.until(lambda: not recording.connected)
        assert "the token is not accepted" in recording.detail
        assert recording.ids("orders") == {"orders-1"}
        assert not [event for event in recording.events if isinstance(event, ServiceVanished)]
        assert all(token not in str(event) for event in recording.events)


async def test_rights_that_are_taken_away_remove_nothing(consul: ConsulCluster) -> None:
    await consul.register("orders", "orders-1")
    policy = await consul.request("PUT", "/v1/acl/policy", {"Name": "reader", "Rules": READER})
    created = await consul.request("PUT", "/v1/acl/token", {"Policies": [{"Name": "reader"}]})
    async with recorded(source(consul, created["SecretID"])) as recording:
        await recording.until(lambda: recording.connected and recording.ids("orders"))
        mark = recording.mark()
        emptied = {"Name": "reader", "Rules": 'service "orders" { policy = "read" }'}
        await consul.request("PUT", f"/v1/acl/policy/{policy['ID']}", emptied)
        for number in range(3):
            await consul.register("payments", f"payments-{number}", port=9000 + number)  # wakes the blocking query
        await recording.until(lambda: not recording.connected)
        assert recording.ids("orders") == {"orders-1"}
        assert not [event for event in recording.since(mark) if isinstance(event, ServiceVanished)]


async def test_the_leader_is_killed_and_the_source_goes_on(consul: ConsulCluster) -> None:
    token = await consul.make_token(READER)
    leader = await consul.leader()
    others = [agent for agent in consul.agents if agent is not leader]
    await consul.register("orders", "orders-1", agent=others[0])
    # The leader is asked first, so that the source has to go over to another agent as well.
    addresses = parse_registry("consul://" + ",".join(agent.address for agent in (leader, *others)))
    async with (
        recorded(ConsulSource(addresses, ConsulToken(token))) as recording,
        recorded(ConsulSource(addresses[1:], ConsulToken(token))) as at_follower,
    ):
        for each in (recording, at_follower):
            await each.until(partial(reads, each, {"orders-1"}))
        leader.kill()
        for each in (recording, at_follower):
            await each.until(partial(is_lost, each))
        await consul.register("orders", "orders-2", port=9002, agent=others[1])
        for each in (recording, at_follower):
            await each.until(partial(reads, each, {"orders-1", "orders-2"}))
            assert not [event for event in each.events if isinstance(event, ServiceVanished)]

        # All of Consul down: nothing is removed, and the detail says what is wrong.
        mark = recording.mark()
        for agent in others:
            agent.kill()
        await recording.until(lambda: not recording.connected)
        assert recording.detail
        assert recording.ids("orders") == {"orders-1", "orders-2"}
        assert {type(event).__name__ for event in recording.since(mark)} == {"SourceLost"}


async def test_policies_need_a_token_with_rights(consul: ConsulCluster) -> None:
    await consul.put_key("mesh/policies/orders", b"service: orders")
    addresses = parse_registry(consul.registry)
    none = ConsulPolicyStore(addresses, ConsulToken())
    async with recorded(none) as recording:
        await recording.until(lambda: "key_prefix" in recording.detail)
        assert not recording.connected
    with pytest.raises(StoreUnavailableError, match="not accepted"):
        await none.get("orders")
    with pytest.raises(StoreUnavailableError, match="key_prefix"):
        await none.list()
    with pytest.raises(StoreUnavailableError, match="key_prefix"):
        await none.put("orders", b"service: orders", None)

    token = await consul.make_token('key_prefix "mesh/policies/" { policy = "write" }')
    store = ConsulPolicyStore(addresses, ConsulToken(token))
    async with recorded(store) as recording:
        await recording.until(lambda: recording.connected)
        assert recording.policies == {"orders": b"service: orders"}
        stored = await store.get("orders")
        assert stored is not None
        await store.delete("orders", stored.version)
        await recording.until(lambda: not recording.policies)
        assert recording.connected
