"""The policy store in the KV store of a real Consul."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from control_plane.events import PolicyDeleted, PolicyStored
from control_plane.policies import PolicyBook
from control_plane.sources import NotStoredError, StoreUnavailableError, VersionConflictError
from control_plane.sources.consul_http import ConsulToken, parse_registry
from control_plane.sources.consul_policies import ConsulPolicyStore
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.policy import ServicePolicy
from tests.control_plane.recording import Recording, recorded
from tests.integration.consul_cluster import ConsulCluster


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.dev(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def store(consul: ConsulCluster) -> ConsulPolicyStore:
    return ConsulPolicyStore(parse_registry(consul.registry), ConsulToken())


@pytest.fixture
async def recording(store: ConsulPolicyStore) -> AsyncIterator[Recording]:
    async with recorded(store) as recording:
        await recording.until(lambda: recording.connected)
        yield recording


def folded(recording: Recording) -> PolicyBook[ServicePolicy]:
    book = PolicyBook(ServicePolicy)
    for event in recording.events:
        if isinstance(event, PolicyStored | PolicyDeleted):
            book.apply(event)
    return book


async def test_a_policy_is_stored_changed_spoiled_and_deleted(
    consul: ConsulCluster, store: ConsulPolicyStore, recording: Recording
) -> None:
    first = await store.put("orders", b"service: orders\ntimeout: 1s\n", "")
    await recording.until(lambda: recording.policies)
    assert folded(recording).policy("orders")[0].timeout == 1.0
    assert await store.get("orders") == first

    second = await store.put("orders", b"service: orders\ntimeout: 2s\n", first.version)
    assert second.version != first.version
    await recording.until(lambda: folded(recording).policy("orders")[0].timeout == 2.0)

    # Somebody writes past the mesh, and wrongly.
    await consul.put_key("mesh/policies/orders", b"service: orders\ntimeout: never\n")
    await recording.until(lambda: folded(recording).problems)
    book = folded(recording)
    assert book.policy("orders")[0].timeout == 2.0
    assert book.problems[0].errors[0].path == "timeout"

    stored = await store.get("orders")
    assert stored is not None
    await store.delete("orders", stored.version)
    await recording.until(lambda: not recording.policies)
    assert folded(recording).policy("orders")[0].timeout is None
    assert await store.get("orders") is None


async def test_compare_and_set_refuses_what_was_not_expected(store: ConsulPolicyStore) -> None:
    first = await store.put("orders", b"1", "")
    with pytest.raises(VersionConflictError) as conflict:
        await store.put("orders", b"2", "")
    assert conflict.value.stored == first.version
    for wrong in ("999999", "not-a-version"):
        with pytest.raises(VersionConflictError):
            await store.put("orders", b"2", wrong)
        with pytest.raises(VersionConflictError):
            await store.delete("orders", wrong)
    with pytest.raises(VersionConflictError):
        await store.put("payments", b"2", first.version)
    assert await store.list() == [first]
    second = await store.put("orders", b"2", None)
    third = await store.put("orders", b"3", second.version)
    assert await store.list() == [third]
    await store.delete("orders", None)
    with pytest.raises(NotStoredError):
        await store.delete("orders", None)
    assert await store.list() == []


async def test_keys_that_are_no_policies_disturb_nobody(consul: ConsulCluster, recording: Recording) -> None:
    await consul.put_key("mesh/policies/", b"")
    await consul.put_key("mesh/policies/Not A Name", b"service: x")
    await consul.put_key("mesh/policies/orders", b"service: orders")
    await recording.until(lambda: "orders" in recording.policies)
    assert set(recording.policies) == {"orders"}
    assert recording.connected


async def test_policies_of_edges_are_beside(
    consul: ConsulCluster, store: ConsulPolicyStore, recording: Recording
) -> None:
    edges = ConsulPolicyStore(parse_registry(consul.registry), ConsulToken(), EdgePolicy)
    async with recorded(edges) as of_edges:
        await of_edges.until(lambda: of_edges.connected)
        first = await edges.put("public", b"edge: public", "")
        await consul.put_key("mesh/edge-policies/inside", b"edge: inside")
        await of_edges.until(lambda: set(of_edges.policies) == {"public", "inside"})
        assert [item.name for item in await edges.list()] == ["inside", "public"]
        with pytest.raises(VersionConflictError, match="policy of edge public: expected no policy"):
            await edges.put("public", b"edge: public", "")
        await edges.delete("public", first.version)
        with pytest.raises(NotStoredError, match="edge public"):
            await edges.delete("public", None)
        await of_edges.until(lambda: set(of_edges.policies) == {"inside"})
    assert await store.list() == []
    assert recording.policies == {}


async def test_policies_that_consul_lost_stay_until_they_are_stored_again(
    consul: ConsulCluster, store: ConsulPolicyStore, recording: Recording
) -> None:
    await store.put("orders", b"service: orders", None)
    await store.put("payments", b"service: payments", None)
    await recording.until(lambda: len(recording.policies) == 2)
    consul.agents[0].kill()
    await recording.until(lambda: not recording.connected)
    with pytest.raises(StoreUnavailableError):
        await store.put("orders", b"service: orders", None)
    with pytest.raises(StoreUnavailableError):
        await store.get("orders")
    await consul.restart(consul.agents[0])
    await recording.until(lambda: "came back without" in recording.detail)
    assert set(recording.policies) == {"orders", "payments"}
    await store.put("orders", b"service: orders", "")
    await store.put("payments", b"service: payments", "")
    await recording.until(lambda: recording.connected)
    await store.delete("payments", None)
    await recording.until(lambda: set(recording.policies) == {"orders"})


async def test_environment_variables_of_consuls_own_command_do_not_redirect_writes(
    store: ConsulPolicyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert (await store.put("orders", b"service: orders", "")).name == "orders"
