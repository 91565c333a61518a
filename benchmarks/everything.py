"""Calls with everything on against raw ones, and against raw ones with OpenTelemetry's contrib interceptors.

Everything is mutual TLS, balancing, breaker, retries, limits, authorization, metrics, load reports and tracing, on both
ends. Each arm has a server process of its own, and each round runs a slice through every arm, in random order: raw, raw
again (the A/A control) and the mesh with 1% of the traces. Then, apart from these, because what samples everything goes
on to export while others have their turn: raw, the contrib interceptors with all traces, and the mesh with all of them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from random import Random

import grpc.aio
from opentelemetry.instrumentation.grpc import aio_client_interceptors

import mesh_client
from benchmarks.calls import UNARY, Load, Operation, mesh_unary, raw_unary, run_slice
from benchmarks.figures import Figure
from benchmarks.processes import Child, child
from benchmarks.secure_calls import CALLER, joining_environment
from benchmarks.spans import provider
from mesh_client.identity import Identity
from mesh_client.transport import CHANNEL_OPTIONS, authenticating_options, merge_options

SERVICE, MESHED = "inventory", "inventory-mesh"
"""Services that are called as raw ones and through the mesh."""
GOAL = 1.12
LOADS = tuple(replace(load, name=f"everything.{load.name}") for load in UNARY[:2])


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to make a call."""

    operation: Operation
    server: Child


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call cost."""

    p50: float
    """Seconds."""
    client: float
    """Seconds of CPU time, as ``server``."""
    server: float


@asynccontextmanager
async def _arms(share: float, *, contest: bool) -> AsyncIterator[dict[str, Arm]]:
    """Raw, twice, and the mesh with that share of the traces; for a contest also the contrib interceptors with all."""
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(child("benchmarks.secure_plane_process", SERVICE, MESHED, CALLER))
        collector = (await stack.enter_async_context(child("benchmarks.collector_process"))).ready

        async def server(way: str, service: str) -> Child:
            environment = {**joining_environment(plane), "MESH_TOKEN": plane.ready["tokens"][service]}
            return await stack.enter_async_context(
                child("benchmarks.everything_server_process", way, service, collector, share, environment=environment)
            )

        spans = provider(collector, share)
        stack.callback(spans.shutdown)
        mesh = await stack.enter_async_context(
            mesh_client.connect(
                plane.ready["address"],
                service=CALLER,
                enrolment=plane.ready["enrolment"],
                token=plane.ready["tokens"][CALLER],
                insecure=False,
                cache_dir="",
                tracer_provider=spans,
            )
        )
        bare, meshed = await server("bare", SERVICE), await server("mesh", MESHED)
        await mesh.transport.ready()
        raw = await stack.enter_async_context(mesh.transport.open_channel(f"127.0.0.1:{bare.ready}", SERVICE))
        channel = mesh.channel(MESHED)
        while not any(state.endpoints for state in mesh.state().services if state.service == MESHED):
            await mesh.changed()
        arms = {
            "raw": Arm(raw_unary([raw]), bare),
            "raw again": Arm(raw_unary([raw]), bare),
            "mesh": Arm(mesh_unary(channel), meshed),
        }
        if contest:
            identity = mesh.transport.identity
            assert identity is not None
            contrib = await server("contrib", SERVICE)
            traced = await stack.enter_async_context(
                grpc.aio.secure_channel(
                    f"127.0.0.1:{contrib.ready}",
                    identity.channel_credentials(),
                    options=_options(identity),
                    interceptors=aio_client_interceptors(tracer_provider=spans),
                )
            )
            arms["contrib"] = Arm(raw_unary([traced]), contrib)
        yield arms


def _options(identity: Identity) -> list[tuple[str, object]]:
    name = identity.principal.dns_name.replace(CALLER, SERVICE, 1)
    return merge_options(CHANNEL_OPTIONS, authenticating_options(name))


async def _slice(arm: Arm, load: Load) -> Cost:
    before = await arm.server.ask("cpu")
    made = await run_slice(arm.operation, load)
    return Cost(made.p50, made.cpu, (await arm.server.ask("cpu") - before) / load.calls)


def _figures(load: Load, few: list[dict[str, Cost]], every: list[dict[str, Cost]]) -> list[Figure]:
    figures = []
    for field, what in (("p50", "p50"), ("client", "client CPU"), ("server", "server CPU")):
        name, about = f"{load.name}.{field}", f"{load.about}: {what}"
        cpu = field != "p50"

        def ratios(rounds: list[dict[str, Cost]], arm: str, *bases: str, field: str = field) -> list[float]:
            return [
                getattr(arms[arm], field) / (sum(getattr(arms[base], field) for base in bases) / len(bases))
                for arms in rounds
            ]

        raw = ("raw", "raw again")
        for key, found, words, goal in (
            ("few", ratios(few, "mesh", *raw), "everything on, 1% sampled / raw", GOAL if cpu else None),
            ("few.control", ratios(few, "raw again", "raw"), "raw / raw", None),
            ("all", ratios(every, "mesh", *raw), "everything on, all sampled / raw", None),
            ("contrib", ratios(every, "contrib", *raw), "contrib interceptors / raw", None),
            ("contest", ratios(every, "mesh", "contrib"), "everything on, all sampled / contrib", 1.0 if cpu else None),
            ("all.control", ratios(every, "raw again", "raw"), "raw / raw", None),
        ):
            figures.append(Figure.of_rounds(f"{name}.{key}", found, "x", f"{about}, {words}", goal))
    return figures


async def _rounds(share: float, count: int, *, contest: bool) -> dict[str, list[dict[str, Cost]]]:
    """What each arm cost in each round, by the load's name."""
    random = Random(1)
    measured: dict[str, list[dict[str, Cost]]] = {load.name: [] for load in LOADS}
    async with _arms(share, contest=contest) as arms:
        for load in LOADS:  # connections, caches and the allocator warm up
            for arm in arms.values():
                await _slice(arm, load)
        for _ in range(count):
            for load in LOADS:
                order = random.sample(list(arms), len(arms))
                measured[load.name].append({name: await _slice(arms[name], load) for name in order})
    return measured


async def cost(quick: bool) -> list[Figure]:
    """Unary calls, 1 and 16 at a time."""
    count = 5 if quick else 25
    few, every = await _rounds(0.01, count, contest=False), await _rounds(1.0, count, contest=True)
    return [figure for load in LOADS for figure in _figures(load, few[load.name], every[load.name])]
