"""Starting, being ready, failing and stopping."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mesh.v1 import admin_pb2, endpoint_pb2, registry_pb2

from control_plane.events import ServiceObserved, SourceConnected
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.sources import EmitPolicy
from control_plane.sources.database import Database
from control_plane.sources.embedded_policies import EmbeddedPolicyStore
from mesh_client.core.errors import ConfigError
from tests.control_plane.worlds import BOUND, POLICY, HandSource, World, running


class DeafStore(EmbeddedPolicyStore):
    """A policy store that cannot be read until the test lets it hear."""

    name = "deaf"

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.hears = asyncio.Event()

    async def run(self, emit: EmitPolicy) -> None:
        await self.hears.wait()
        emit(SourceConnected(self.name))
        await asyncio.Event().wait()


async def health(channel: grpc.aio.Channel) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return int(answer.status)


class TestReadiness:
    async def test_it_serves_when_the_registry_was_read(self) -> None:
        source = HandSource(connected=False)
        async with running(source=source) as world:
            assert await health(world.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
            await source.emit(SourceConnected("hand"))
            async with asyncio.timeout(BOUND):
                while await health(world.channel) != health_pb2.HealthCheckResponse.SERVING:
                    await asyncio.sleep(0)
            await source.emit(SourceConnected("hand"))

    async def test_policies_that_cannot_be_read_do_not_keep_it_from_serving_for_ever(self) -> None:
        source = HandSource()
        options = ControlPlaneOptions(insecure=True, policy_wait=0.05)
        database = Database(None)
        store = DeafStore(database)
        plane = ControlPlane(options, source=source, policies=store)
        logging.getLogger("control_plane.server").setLevel(logging.CRITICAL)
        await plane.start()
        async with grpc.aio.insecure_channel(plane.address) as channel:
            world = World(plane, source, channel)
            async with world.client() as client:
                await source.lists("orders", "1")
                await client.subscribe("orders", types=(POLICY,))
                defaults = (await client.next(POLICY)).resources[0]
                assert defaults.policy.retry.max_attempts == 3
                assert defaults.provisional
                store.hears.set()
                known = (await client.next(POLICY)).resources[0]
                assert known.policy == defaults.policy
                assert not known.provisional
        await plane.stop()
        await database.close()
        logging.getLogger("control_plane.server").setLevel(logging.NOTSET)

    async def test_stopping_does_not_wait_for_policies(self) -> None:
        source = HandSource()
        database = Database(None)
        plane = ControlPlane(ControlPlaneOptions(insecure=True), source=source, policies=DeafStore(database))
        await plane.start()
        await source.lists("orders")
        await plane.stop()
        await database.close()

    async def test_reflection_names_every_service(self) -> None:
        async with running() as world:
            stub = reflection_pb2_grpc.ServerReflectionStub(world.channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await call.read()
            call.cancel()
        names = {service.name for service in answer.list_services_response.service}
        assert {
            "mesh.v1.AdminService",
            "mesh.v1.DiscoveryService",
            "mesh.v1.RegistryService",
            "grpc.health.v1.Health",
        } <= names


class TestRegistries:
    async def test_an_endpoint_that_registers_is_published_while_its_stream_is_open(self) -> None:
        plane = ControlPlane(ControlPlaneOptions(insecure=True))
        await plane.start()
        async with grpc.aio.insecure_channel(plane.address) as channel:
            world = World(plane, HandSource(), channel)
            async with world.client() as client:
                await client.subscribe("orders")
                call = world.registry.Register()
                endpoint = endpoint_pb2.Endpoint(id="1", address="127.0.0.1", port=1)
                await call.write(registry_pb2.RegisterRequest(service="orders", endpoint=endpoint))
                await client.follow("orders", "1")
                await call.done_writing()
                await client.follow("orders")
                async with asyncio.timeout(BOUND):
                    while await call.read() is not grpc.aio.EOF:
                        pass
                    assert await call.code() is grpc.StatusCode.OK
        await plane.stop()

    async def test_a_policy_about_events_makes_a_service_known_that_serves_no_calls(self) -> None:
        async with running() as world, world.client() as client:
            await client.subscribe("shipping")
            for _ in ("policy", "endpoints"):
                response = await client.read()
                assert response.removed == ["shipping"]
                await client.acknowledge(response)
            document = "{service: shipping, events: [{paused: true}]}"
            await world.admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=document), timeout=BOUND)
            policy = (await client.next(POLICY)).resources[0]
            assert policy.policy.events[0].paused
            await client.next()
            await world.admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document="service: shipping"), timeout=BOUND)
            assert (await client.next(POLICY)).removed == ["shipping"]

    async def test_with_consul_it_starts_although_nobody_answers_and_says_so(self) -> None:
        with_consul = ControlPlaneOptions(insecure=True, registry="consul://127.0.0.1:1")
        plane = ControlPlane(with_consul)
        logging.getLogger("control_plane.sources").setLevel(logging.CRITICAL)
        await plane.start()
        async with grpc.aio.insecure_channel(plane.address) as channel:
            world = World(plane, HandSource(), channel)
            async with asyncio.timeout(BOUND):
                while len((await world.admin.GetStatus(admin_pb2.GetStatusRequest())).sources) < 3:
                    await asyncio.sleep(0)
            shown = await world.admin.GetStatus(admin_pb2.GetStatusRequest())
            assert [(source.name, source.connected) for source in shown.sources] == [
                ("consul", False),
                ("consul-edge-policies", False),
                ("consul-policies", False),
            ]
            call = world.registry.Register()
            async with asyncio.timeout(BOUND):
                await call.write(registry_pb2.RegisterRequest(service="orders"))
                assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        await plane.stop()
        logging.getLogger("control_plane.sources").setLevel(logging.NOTSET)

    async def test_a_token_file_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        options = ControlPlaneOptions(
            insecure=True, registry="consul://127.0.0.1:1", consul_token_file=tmp_path / "none"
        )
        with pytest.raises(ConfigError, match="none"):
            ControlPlane(options)


class TestFailures:
    async def test_an_address_that_is_taken_is_named(self) -> None:
        async with running() as world:
            second = ControlPlane(ControlPlaneOptions(insecure=True, address=world.plane.address))
            with pytest.raises(ConfigError, match=world.plane.address):
                await second.start()

    async def test_what_one_service_says_wrong_does_not_stop_the_others(self) -> None:
        async with running() as world, world.client() as client:
            logging.getLogger("control_plane.server").setLevel(logging.CRITICAL)
            await world.source.emit(ServiceObserved("hand", "Not Good", ()))
            logging.getLogger("control_plane.server").setLevel(logging.NOTSET)
            await world.source.lists("orders", "1")
            await client.subscribe("orders")
            await client.follow("orders", "1")

    async def test_a_source_that_fails_is_told_to_whoever_waits(self) -> None:
        async with running() as world:
            waiting = asyncio.create_task(world.plane.wait())
            await world.source.lists("orders")
            world.source.fail(ZeroDivisionError("a defect"))
            with pytest.raises(ZeroDivisionError):
                await waiting

    async def test_a_source_that_ends_is_a_failure_too(self) -> None:
        class Ending(HandSource):
            async def run(self, emit: object) -> None:
                return

        async with running(source=Ending()) as world:
            with pytest.raises(RuntimeError, match="ended by itself"):
                await world.plane.wait()

    async def test_what_was_not_started_can_be_stopped(self) -> None:
        await ControlPlane(ControlPlaneOptions(insecure=True)).stop()

    async def test_waiting_ends_when_it_was_stopped(self) -> None:
        async with running() as world:
            waiting = asyncio.create_task(world.plane.wait())
            await world.source.lists("orders")
            await asyncio.gather(world.plane.stop(), world.plane.stop())
            await waiting


SERVE = """
import asyncio
from control_plane.options import ControlPlaneOptions
from control_plane.process import serve
asyncio.run(serve(ControlPlaneOptions(insecure=True)))
"""

FAIL = """
import asyncio
from control_plane import process
from control_plane.options import ControlPlaneOptions

class Broken(process.ControlPlane):
    def _emit(self, event):
        raise ZeroDivisionError("a defect")

process.ControlPlane = Broken
asyncio.run(process.serve(ControlPlaneOptions(insecure=True)))
"""


class TestServing:
    @staticmethod
    async def process(program: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ,
        )

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_it_says_where_it_listens_and_stops_cleanly_when_asked(self, number: signal.Signals) -> None:
        process = await self.process(SERVE)
        assert process.stdout is not None
        async with asyncio.timeout(BOUND):
            line = (await process.stdout.readline()).decode()
            assert line.startswith("mesh control-plane listening on 127.0.0.1:")
            async with grpc.aio.insecure_channel(line.split()[-1]) as channel:
                assert await health(channel) in (1, 2)
            process.send_signal(number)
            output, errors = await process.communicate()
        assert (process.returncode, output) == (0, b"")
        assert b"Traceback" not in errors

    async def test_a_defect_in_a_source_ends_the_process(self) -> None:
        process = await self.process(FAIL)
        async with asyncio.timeout(BOUND):
            _, errors = await process.communicate()
        assert process.returncode == 1
        assert b"a defect" in errors
