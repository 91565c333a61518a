from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

import mesh_client.consul_registration
from mesh_client.addresses import parse_host_port
from mesh_client.consul_registration import AgentError, ConsulRegistrar, check_id
from mesh_client.core.model import Endpoint, Locality
from mesh_client.core.registration import RegistrationState, Verdict
from mesh_client.mesh_server import MeshServer
from tests.integration.consul_cluster import ConsulAgent, ConsulCluster
from tests.integration.orders import running

ENDPOINT = Endpoint(
    id="orders-1",
    address="127.0.0.1",
    port=4711,
    weight=7,
    locality=Locality("eu-1", "eu-1a"),
    metadata={"version": "v2"},
)
PATIENCE = 20.0


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsulAgent]:
    """One agent for all tests that leave it running: an election takes longer than most of them."""
    shared = ConsulAgent("consul-1", tmp_path_factory.mktemp("consul"), {"bootstrap_expect": 1})
    shared.start()
    yield shared
    shared.kill()
    shared.give_back()


@pytest.fixture
async def consul(agent: ConsulAgent) -> AsyncIterator[ConsulCluster]:
    """The shared agent, with nothing registered."""
    cluster = ConsulCluster([agent])
    cluster._session = aiohttp.ClientSession()
    try:
        await cluster.ready(agent)
        for service in await cluster.request("GET", "/v1/agent/services"):
            await cluster.deregister(service)
        yield cluster
    finally:
        await cluster._session.close()


@pytest.fixture
async def own_consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    """An agent to be killed."""
    async with ConsulCluster.single(tmp_path) as cluster:
        yield cluster


def registry(consul: ConsulCluster) -> dict[str, Any]:
    """Options of a server that registers there; no control plane listens."""
    return {"registry": f"consul://{consul.agents[0].address}", "control_plane": "127.0.0.1:1", "drain_timeout": 0.2}


async def instances(consul: ConsulCluster) -> list[dict[str, Any]]:
    return list(await consul.request("GET", "/v1/health/service/orders"))


def checks_of(instance: dict[str, Any]) -> dict[str, Any]:
    (check,) = (check for check in instance["Checks"] if check["CheckID"].startswith("grpc-mesh:"))
    return dict(check)


async def outputs(consul: ConsulCluster) -> list[str]:
    """What the agent's checks say."""
    return [check["Output"] for check in (await consul.request("GET", "/v1/agent/checks")).values()]


async def until(consul: ConsulCluster, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    async with asyncio.timeout(PATIENCE):
        while not condition(found := await instances(consul)):
            await asyncio.sleep(0.02)
    return found


def one_in(status: str) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda found: [checks_of(instance)["Status"] for instance in found] == [status]


async def test_everything_that_is_said_of_the_instance_is_registered(consul: ConsulCluster) -> None:
    registrar = ConsulRegistrar("orders", ENDPOINT, parse_host_port(consul.agents[0].address, "agent"), 30.0, Random(1))
    registrar.report(Verdict(True, "self-check passed"))
    registrar.start()
    while registrar.status().state is not RegistrationState.REGISTERED:
        await registrar.changed()
    (found,) = await until(consul, one_in("passing"))
    service = found["Service"]
    assert (service["ID"], service["Address"], service["Port"]) == ("orders-1", "127.0.0.1", 4711)
    assert service["Tags"] == ["grpc-mesh"]
    assert service["Weights"]["Passing"] == 7
    registration = service["Meta"].pop("mesh-registration")
    assert service["Meta"] == {"version": "v2", "mesh-zone": "eu-1a", "mesh-region": "eu-1"}
    check = (await consul.request("GET", "/v1/agent/checks"))[check_id(ENDPOINT)]
    assert check["Output"] == "self-check passed"
    await registrar.announce_drain()
    (found,) = await until(consul, lambda found: "mesh-draining" in found[0]["Service"]["Meta"])
    assert found["Service"]["Meta"]["mesh-draining"] == "true"
    assert found["Service"]["Meta"]["mesh-registration"] == registration
    assert checks_of(found)["Status"] == "passing"
    await registrar.deregister()
    assert registrar.status().state is RegistrationState.GONE
    await until(consul, lambda found: not found)


def test_the_check_lasts_for_several_reports_and_removes_what_stays_critical() -> None:
    definition = mesh_client.consul_registration.service_definition(
        "orders", ENDPOINT, 10.0, passing=True, draining=False, registration="x"
    )
    check = definition["Check"]
    assert isinstance(check, dict)
    assert (check["TTL"], check["DeregisterCriticalServiceAfter"]) == ("10s", "1m")
    assert check["CheckID"] == check_id(ENDPOINT)


async def test_variables_for_other_tools_do_not_lead_a_server_to_another_agent(
    consul: ConsulCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("CONSUL_HTTP_ADDR", "127.0.0.1:1"),
        ("CONSUL_HTTP_SSL", "true"),
        ("CONSUL_HTTP_AUTH", "somebody:else"),
        ("HTTP_PROXY", "http://127.0.0.1:1"),
        ("http_proxy", "http://127.0.0.1:1"),
    ):
        monkeypatch.setenv(name, value)
    async with running(**registry(consul)) as made:
        async with asyncio.timeout(PATIENCE):
            await made.registered()
        await until(consul, one_in("passing"))
        await made.stop()
        await until(consul, lambda found: not found)


async def test_self_checks_feed_the_check(consul: ConsulCluster) -> None:
    async with running(**registry(consul)) as made:
        await made.registered()
        await until(consul, one_in("passing"))
        await made.set_serving(False)
        await until(consul, one_in("critical"))
        async with asyncio.timeout(PATIENCE):
            while await outputs(consul) != ["self-check: the server says NOT_SERVING"]:
                await asyncio.sleep(0.02)
        await made.set_serving(True)
        await until(consul, one_in("passing"))
        await made.stop()
        await until(consul, lambda found: not found)


@pytest.mark.parametrize("forgets", [True, False], ids=["that has forgotten", "that remembers"])
async def test_a_server_is_registered_again_with_an_agent_that_restarted(
    own_consul: ConsulCluster, forgets: bool
) -> None:
    (agent,) = own_consul.agents
    async with running(**registry(own_consul)) as made:
        await made.registered()
        agent.kill()
        while made.status().registration.state is RegistrationState.REGISTERED:
            await made.changed()
        assert "ConnectionError" in made.status().registration.detail
        if forgets:
            agent.forget()
        await own_consul.restart(agent)
        async with asyncio.timeout(PATIENCE):
            await made.registered()
        await until(own_consul, one_in("passing"))


async def test_an_agent_that_forgot_between_two_reports_is_told_again(consul: ConsulCluster) -> None:
    async with running(**registry(consul), instance_id="orders-1") as made:
        await made.registered()
        await until(consul, one_in("passing"))
        await consul.deregister("orders-1")
        await until(consul, one_in("passing"))
        await made.registered()


async def test_a_server_starts_without_the_agent_and_registers_when_it_comes(tmp_path: Path) -> None:
    cluster = ConsulCluster.single(tmp_path)
    async with running(**registry(cluster)) as made:
        while made.status().registration.failures < 2:
            await made.changed()
        async with cluster:
            async with asyncio.timeout(PATIENCE):
                await made.registered()
            await until(cluster, one_in("passing"))
            await made.stop()


async def test_a_server_whose_agent_is_gone_still_stops(
    own_consul: ConsulCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(**registry(own_consul)) as made:
        await made.registered()
        own_consul.agents[0].kill()
        await made.stop()
    assert "Consul removes it when its check has been critical for 1m" in caplog.text
    assert made.status().registration.state is not RegistrationState.REGISTERED


async def test_an_agent_that_hangs_holds_nothing_up_for_long(
    consul: ConsulCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mesh_client.consul_registration, "AGENT_TIMEOUT", 0.3)
    async with running(**registry(consul), instance_id="orders-1") as made:
        await made.registered()
        consul.agents[0].pause()
        try:
            await made.stop()
        finally:
            consul.agents[0].resume()
    assert "ReadTimeout" in caplog.text


async def test_an_agent_that_forgot_is_left_alone_by_who_leaves(consul: ConsulCluster) -> None:
    agent = mesh_client.consul_registration.ConsulAgent(parse_host_port(consul.agents[0].address, "agent"), str)
    await agent.deregister("never-registered")
    with pytest.raises(AgentError, match="404|500") as caught:
        await agent.report("grpc-mesh:never-registered", Verdict(True, "fine"))
    assert not caught.value.refused
    agent.close()


async def test_a_registrar_that_never_registered_leaves_quietly(consul: ConsulCluster) -> None:
    registrar = ConsulRegistrar("orders", ENDPOINT, parse_host_port(consul.agents[0].address, "agent"), 3.0, Random(1))
    await registrar.announce_drain()
    await registrar.deregister()
    assert registrar.status().state is RegistrationState.GONE


async def test_the_token_of_the_service_registers_it_and_a_wrong_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master = str(uuid.uuid4())
    acl = {"enabled": True, "default_policy": "deny", "tokens": {"master": master, "agent": master}}
    agent = ConsulAgent("consul-1", tmp_path / "consul-1", {"bootstrap_expect": 1, "acl": acl})
    async with ConsulCluster([agent], master) as cluster:
        created = await cluster.request("PUT", "/v1/acl/token", {"ServiceIdentities": [{"ServiceName": "orders"}]})
        async with running(**registry(cluster)) as refused:
            while not refused.status().registration.failures:
                await refused.changed()
            assert "403" in refused.status().registration.detail
        monkeypatch.setenv("CONSUL_HTTP_TOKEN", created["SecretID"])
        async with running(**registry(cluster)) as made:
            await made.registered()
            await until(cluster, one_in("passing"))
            await made.stop()
            await until(cluster, lambda found: not found)
        file = tmp_path / "token"
        monkeypatch.delenv("CONSUL_HTTP_TOKEN")
        monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", str(file))
        async with running(**registry(cluster)) as waiting:
            while not waiting.status().registration.failures:
                await waiting.changed()
            assert "FileNotFoundError" in waiting.status().registration.detail
            file.write_text(created["SecretID"] + "\n")
            file.chmod(0o644)
            while "chmod 600" not in waiting.status().registration.detail:
                await waiting.changed()
            file.chmod(0o600)
            async with asyncio.timeout(PATIENCE):
                await waiting.registered()


async def test_a_server_that_hangs_turns_critical(consul: ConsulCluster) -> None:
    options = {**registry(consul), "check_interval": 0.2, "instance_id": "orders-1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.orders_process", json.dumps(options), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert int(await process.stdout.readline())
        await until(consul, one_in("passing"))
        process.send_signal(signal.SIGSTOP)
        (found,) = await until(consul, one_in("critical"))
        assert "TTL" in checks_of(found)["Output"]
        process.send_signal(signal.SIGCONT)
        await until(consul, one_in("passing"))
        process.terminate()
        assert await process.wait() == 0
        await until(consul, lambda found: not found)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_changes_are_waited_for_by_many(consul: ConsulCluster) -> None:
    async def registered(made: MeshServer) -> RegistrationState:
        await made.registered()
        return made.status().registration.state

    async with running(**registry(consul)) as made:
        states = await asyncio.gather(*(registered(made) for _ in range(3)))
    assert states == [RegistrationState.REGISTERED] * 3
