"""Plays the scenarios one after the other and adds up what they promised."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import grpc
from mesh.v1 import traffic_pb2
from rich.padding import Padding

import mesh_client
from mesh_cli.demo import policies
from mesh_cli.demo.edge import RestOrders
from mesh_cli.demo.load import Customers
from mesh_cli.demo.policies import Operator
from mesh_cli.demo.promises import Promise, at_most, closing_table, exactly, write_json
from mesh_cli.demo.scenarios import SCENARIOS
from mesh_cli.demo.stage import FULL, QUICK, Profile, Scenario, Stage
from mesh_cli.demo.system import CUSTOMERS, System, has_edge
from mesh_cli.demo.view import Screen
from mesh_cli.output import console, write_error
from mesh_cli.traffic_form import failure
from mesh_client.core.errors import MeshError
from mesh_client.mesh import Mesh
from mesh_client.tasks import end_tasks

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

TIME_LIMIT = 120.0
"""Seconds that the whole demo may take."""

LEAF_LIFETIME = 30
"""Seconds for which certificates are good, so that all of them are renewed several times while the demo runs."""

_SYNC_TIMEOUT = 20.0


def run(*, consul: bool, json_file: Path | None, quick: bool) -> int:
    """Runs the demo; returns the exit code: 0 when every promise was kept, 1 when not, 130 after Ctrl-C."""
    return run_interruptible(lambda: _demo(consul, json_file, QUICK if quick else FULL))


def run_interruptible(main: Callable[[], Coroutine[object, object, int]]) -> int:
    """Runs a coroutine whose cleanup Ctrl-C, SIGTERM and SIGHUP wait for; returns its result, or 130."""

    async def with_signals() -> int:
        work = asyncio.ensure_future(main())
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        return await work

    # What the mesh client logs of the faults that are injected on purpose belongs to the display, not into it.
    logger, library = logging.getLogger("mesh_client"), logging.getLogger("aiormq")
    levels = logger.level, library.level
    logger.setLevel(logging.ERROR)
    library.setLevel(logging.CRITICAL)
    try:
        return asyncio.run(with_signals())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.stderr.write("interrupted; everything has been stopped\n")
        return INTERRUPTED
    finally:
        logger.setLevel(levels[0])
        library.setLevel(levels[1])


@contextlib.asynccontextmanager
async def running_system(
    consul: bool, leaf_lifetime: int, *, tracing: bool = False
) -> AsyncIterator[tuple[System, Operator]]:
    """A running system with its policies in force. Its directory goes, unless something went wrong."""
    directory = Path(tempfile.mkdtemp(prefix="grpc-mesh-"))
    try:
        async with (
            System(directory, consul=consul, leaf_lifetime=leaf_lifetime, tracing=tracing) as system,
            Operator(system.address, system.identities) as operator,
        ):
            edge = None
            if has_edge():
                await operator.apply_edge(policies.edge())
                edge = asyncio.create_task(system.start_edge())
            try:
                for policy in (policies.orders(), policies.inventory(), policies.payments()):
                    await operator.apply(policy)
                if edge is not None:
                    await edge
            finally:
                if edge is not None:
                    edge.cancel()
            yield system, operator
    except Exception:
        sys.stderr.write(f"the logs are in {directory}\n")
        raise
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    else:
        shutil.rmtree(directory, ignore_errors=True)


async def _demo(consul: bool, json_file: Path | None, profile: Profile) -> int:
    screen = Screen(console())
    began = time.monotonic()
    promises: list[Promise] = []
    screen.tell(f"starting a control plane on {'Consul' if consul else 'the embedded registry'}, and the shop")
    async with running_system(consul, LEAF_LIFETIME) as (system, operator):
        async with (
            mesh_client.connect(
                system.address,
                service=CUSTOMERS,
                enrolment=system.enrolment_address,
                token_file=system.identities.token_file(CUSTOMERS),
                insecure=False,
                cache_dir="",
            ) as mesh,
            contextlib.AsyncExitStack() as stack,
        ):
            rest = await stack.enter_async_context(RestOrders(system.edge_url)) if system.edge_url else None
            stage = await _set_up(system, mesh, operator, screen, profile, rest)
            background = [
                asyncio.create_task(stage.customers.run()),
                asyncio.create_task(screen.follow(system, mesh, stage.customers)),
            ]
            try:
                for number, scenario in enumerate(SCENARIOS, 1):
                    screen.scenario(number, len(SCENARIOS), scenario.title)
                    for promise in await _play(scenario, stage):
                        screen.promise(promise)
                        promises.append(promise)
            finally:
                await end_tasks(*background)
        explained = await _explained(operator)
        promises += await _shut_down(system, screen)
        promises.append(at_most("demo.time", "the whole demo", time.monotonic() - began, TIME_LIMIT, "s"))
        broken = [promise for promise in promises if not promise.ok]
        logs = _keep_logs(system) if broken else None
    console().print(closing_table(promises))
    _tell_of_dashboard(system, explained)
    if json_file is not None:
        write_json(promises, json_file)
    if broken:
        write_error(f"broken: {', '.join(promise.id for promise in broken)}; the logs are in {logs}")
        return 1
    return 0


async def _explained(operator: Operator) -> traffic_pb2.FailureGroup | None:
    """One way in which calls failed, because the demo had them fail, that says what to do."""
    try:
        answer = await operator.explain("payments")
    except grpc.aio.AioRpcError:
        return None
    return next((group for group in answer.failures if group.explanation and group.remedy), None)


def _tell_of_dashboard(system: System, explained: traffic_pb2.FailureGroup | None) -> None:
    out = console()
    if explained is not None:
        out.print(
            "\nOne of the failures that were caused on purpose, as `mesh explain payments` and the dashboard told it:"
        )
        for line in failure(explained, told=False):
            out.print(Padding(line, (0, 0, 0, 2), expand=False))
    out.print(
        f"\nThe dashboard was at {system.dashboard_url} while it ran. `mesh up` keeps everything running, and writes a "
        "link that opens it.",
        soft_wrap=True,
    )


def _keep_logs(system: System) -> Path:
    kept = Path(tempfile.mkdtemp(prefix="grpc-mesh-logs-"))
    for log in system.directory.glob("*.log"):
        shutil.copy(log, kept)
    return kept


async def _set_up(
    system: System, mesh: Mesh, operator: Operator, screen: Screen, profile: Profile, rest: RestOrders | None
) -> Stage:
    customers = Customers(mesh.channel("orders"), profile.rate, rest)
    for service in system.services:
        mesh.channel(service)
    stage = Stage(system, mesh, operator, customers, screen, profile)
    for instance in system.instances:
        await stage.until_known(instance.service, instance.name, _SYNC_TIMEOUT)
    # The first order shows that orders knows inventory and payments.
    await customers.place("first")
    if rest is not None:
        screen.tell(
            f"the edge takes orders by REST at {rest.url}; from now on they go through it, and are looked up by gRPC"
        )
    return stage


async def _play(scenario: Scenario, stage: Stage) -> list[Promise]:
    try:
        return await scenario.play(stage)
    except (MeshError, grpc.aio.AioRpcError, TimeoutError) as error:
        stage.customers.go_on()
        id = type(scenario).__name__
        return [exactly(id, f"{scenario.title}: comes to its end", 0, 1, "", f"{type(error).__name__}: {error}")]


async def _shut_down(system: System, screen: Screen) -> list[Promise]:
    screen.tell("SIGTERM to everything")
    began = time.monotonic()
    codes = await system.stop_all()
    dirty = sorted(f"{name} {code}" for name, code in codes.items() if code != 0)
    note = ", ".join(dirty) or f"{time.monotonic() - began:.1f} s"
    return [
        exactly(
            "shutdown.exits", "processes that did not end with exit code 0", len(dirty), 0, f"of {len(codes)}", note
        )
    ]
