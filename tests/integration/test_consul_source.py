"""The Consul source against a real Consul, one server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from control_plane.sources.consul import ConsulSource
from control_plane.sources.consul_http import ConsulToken, parse_registry
from mesh_client.core.model import Health, Locality
from tests.control_plane.recording import Recording, recorded
from tests.integration.consul_cluster import ConsulCluster


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.dev(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def recording(consul: ConsulCluster) -> AsyncIterator[Recording]:
    async with recorded(ConsulSource(parse_registry(consul.registry), ConsulToken())) as recording:
        await recording.until(lambda: recording.connected)
        yield recording


async def test_an_instance_appears_changes_health_and_goes(consul: ConsulCluster, recording: Recording) -> None:
    await consul.register(
        "orders",
        "orders-1",
        port=9001,
        ttl="60s",
        Meta={"version": "v2", "mesh-zone": "a", "mesh-region": "eu"},
        Weights={"Passing": 7, "Warning": 1},
    )
    await recording.until(lambda: recording.ids("orders"))
    endpoint = recording.services["orders"]["orders-1"]
    assert (endpoint.target, endpoint.weight, endpoint.health) == ("127.0.0.1:9001", 7, Health.HEALTHY)
    assert endpoint.locality == Locality(region="eu", zone="a")
    assert dict(endpoint.metadata) == {"version": "v2"}

    await consul.set_status("orders-1", "critical")
    await recording.until(lambda: recording.services["orders"]["orders-1"].health is Health.UNHEALTHY)
    await consul.set_status("orders-1", "passing")
    await recording.until(lambda: recording.services["orders"]["orders-1"].health is Health.HEALTHY)

    await consul.register("orders", "orders-2", port=9002)
    await recording.until(lambda: recording.ids("orders") == {"orders-1", "orders-2"})
    await consul.deregister("orders-2")
    await recording.until(lambda: recording.ids("orders") == {"orders-1"})
    await consul.deregister("orders-1")
    await recording.until(lambda: "orders" not in recording.services)


async def test_services_without_the_tag_are_none_of_the_meshs_business(
    consul: ConsulCluster, recording: Recording
) -> None:
    await consul.register("database", "database-1", tags=["primary"])
    await consul.register("orders", "orders-1")
    await recording.until(lambda: recording.ids("orders"))
    assert set(recording.services) == {"orders"}


async def test_registrations_that_make_no_sense_are_named_and_disturb_nobody(
    consul: ConsulCluster, recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    await consul.register("orders", "orders-1")
    for instance, fields in (
        ("no-port", {"port": 0}),
        ("an-url", {"Address": "http://orders"}),
        ("an id", {}),
        ("x" * 300, {}),
    ):
        await consul.register("orders", instance, **fields)
    for service in ("Or_ders", "x" * 64):
        await consul.register(service, f"{service[:7]}-1")
    await consul.register("orders", "odd", Meta={"k" * 128: "v" * 512, "mesh-zone": "no zone"})
    await consul.register("payments", "payments-1")
    await recording.until(lambda: recording.ids("payments") and "odd" in recording.ids("orders"))
    assert recording.ids("orders") == {"orders-1", "odd"}
    assert set(recording.services) == {"orders", "payments"}
    assert recording.services["orders"]["odd"].locality == Locality()
    for named in ("no-port", "an-url", "an id", "xxx", "Or_ders", "no zone", "kkk"):
        assert named in caplog.text


async def test_a_missed_ttl_makes_an_instance_unhealthy(consul: ConsulCluster, recording: Recording) -> None:
    await consul.register("orders", "orders-1", ttl="1s")
    await recording.until(lambda: recording.ids("orders"))
    await recording.until(lambda: recording.services["orders"]["orders-1"].health is Health.UNHEALTHY)


async def test_a_persistent_agent_restarts_and_nothing_is_dropped(tmp_path: Path) -> None:
    async with (
        ConsulCluster.single(tmp_path) as consul,
        recorded(ConsulSource(parse_registry(consul.registry), ConsulToken())) as recording,
    ):
        await consul.register("orders", "orders-1")
        await consul.register("payments", "payments-1")
        await recording.until(lambda: recording.ids("orders") and recording.ids("payments"))
        mark = recording.mark()
        consul.agents[0].terminate()
        await recording.until(lambda: not recording.connected)
        await consul.restart(consul.agents[0])
        await recording.until(lambda: recording.connected)
        await consul.register("orders", "orders-2", port=9002)
        await recording.until(lambda: recording.ids("orders") == {"orders-1", "orders-2"})
        assert recording.ids("payments") == {"payments-1"}
        for event in recording.since(mark):
            assert getattr(event, "endpoints", True), f"an endpoint was dropped: {event}"


async def test_an_agent_that_lost_its_state_drops_nobody_and_is_followed_again(
    consul: ConsulCluster, recording: Recording
) -> None:
    for number in range(20):  # so that the index is well above that of a fresh agent
        await consul.register("orders", "orders-1", port=9000 + number)
    await consul.register("payments", "payments-1")
    await recording.until(lambda: recording.ids("payments"))
    await recording.until(lambda: recording.services["orders"]["orders-1"].port == 9019)
    agent = consul.agents[0]
    agent.kill()
    await recording.until(lambda: not recording.connected)
    await consul.restart(agent)
    await recording.until(lambda: recording.connected)
    # What registers after the reset is seen at once, and what is missing since is still there.
    await consul.register("orders", "orders-2", port=9100)
    await recording.until(lambda: recording.ids("orders") == {"orders-1", "orders-2"})
    await consul.register("inventory", "inventory-1")
    await recording.until(lambda: recording.ids("inventory"))
    assert recording.ids("payments") == {"payments-1"}
    # The instance that registers again at its address takes the place of what was kept.
    await consul.register("orders", "orders-1", port=9019)
    await consul.register("orders", "orders-3", port=9300)
    await recording.until(lambda: recording.ids("orders") == {"orders-1", "orders-2", "orders-3"})


async def test_what_an_agent_lost_for_good_goes_when_the_hold_ends(consul: ConsulCluster) -> None:
    source = ConsulSource(parse_registry(consul.registry), ConsulToken(), restart_hold=0.5)
    async with recorded(source) as recording:
        await consul.register("orders", "orders-1", port=9001)
        await consul.register("orders", "orders-2", port=9002)
        await consul.register("payments", "payments-1")
        await recording.until(lambda: recording.ids("orders") == {"orders-1", "orders-2"})
        await recording.until(lambda: recording.ids("payments"))
        agent = consul.agents[0]
        agent.kill()
        await consul.restart(agent)
        await consul.register("orders", "orders-1", port=9001)
        await recording.until(lambda: recording.connected)
        await recording.until(lambda: recording.ids("orders") == {"orders-1"})
        await recording.until(lambda: "payments" not in recording.services)


async def test_with_consul_down_nothing_is_removed(consul: ConsulCluster, recording: Recording) -> None:
    await consul.register("orders", "orders-1")
    await recording.until(lambda: recording.ids("orders"))
    mark = recording.mark()
    consul.agents[0].kill()
    await recording.until(lambda: not recording.connected)
    assert "cannot be reached" in recording.detail
    assert consul.agents[0].address in recording.detail
    assert [type(event).__name__ for event in recording.since(mark)] == ["SourceLost"]
    assert recording.ids("orders") == {"orders-1"}


async def test_a_source_that_starts_before_consul_connects_when_it_comes(tmp_path: Path) -> None:
    cluster = ConsulCluster.single(tmp_path)
    async with recorded(ConsulSource(parse_registry(cluster.registry), ConsulToken())) as recording:
        await recording.until(lambda: "cannot be reached" in recording.detail)
        async with cluster:
            await recording.until(lambda: recording.connected)
            await cluster.register("orders", "orders-1")
            await recording.until(lambda: recording.ids("orders"))


async def test_services_past_the_limit_of_watches_are_followed_too(consul: ConsulCluster) -> None:
    source = ConsulSource(parse_registry(consul.registry), ConsulToken(), max_watches=2)
    async with recorded(source) as recording:
        names = [f"service-{number}" for number in range(6)]
        for name in names:
            await consul.register(name, f"{name}-1", ttl="60s")
        await recording.until(lambda: all(recording.ids(name) for name in names))
        for name in names:
            await consul.set_status(f"{name}-1", "critical")
        await recording.until(
            lambda: all(recording.services[name][f"{name}-1"].health is Health.UNHEALTHY for name in names)
        )
        # Without a check, only the service list tells that something changed.
        await consul.register("service-5", "service-5-2", port=9999)
        await recording.until(lambda: recording.ids("service-5") == {"service-5-1", "service-5-2"})
        for name in names[:5]:
            await consul.deregister(f"{name}-1")
        await recording.until(lambda: set(recording.services) == {"service-5"})
        await consul.deregister("service-5-1")
        await recording.until(lambda: recording.ids("service-5") == {"service-5-2"})
