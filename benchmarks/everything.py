"""Calls with everything on against raw ones, and against raw ones with OpenTelemetry's contrib interceptors.

Everything is mutual TLS, balancing, breaker, retries, limits, authorization, metrics, load reports and tracing, on both
ends. Each arm has a server process of its own. Each round runs a slice through every arm, in random order: raw, raw
again (the A/A control), the contrib interceptors with all traces sampled, and the mesh with 1% and with all of them.
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
from mesh_client.mesh import Mesh
from mesh_client.transport import CHANNEL_OPTIONS, authenticating_options, merge_options

SERVICE, SAMPLED, RARELY = "inventory", "inventory-all", "inventory-few"
"""Services by what is sampled of calls to them."""
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
async def _arms() -> AsyncIterator[dict[str, Arm]]:
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(
            child("benchmarks.secure_plane_process", SERVICE, SAMPLED, RARELY, CALLER)
        )
        collector = (await stack.enter_async_context(child("benchmarks.collector_process"))).ready

        async def server(way: str, service: str, share: float) -> Child:
            environment = {**joining_environment(plane), "MESH_TOKEN": plane.ready["tokens"][service]}
            return await stack.enter_async_context(
                child("benchmarks.everything_server_process", way, service, collector, share, environment=environment)
            )

        async def client(share: float) -> Mesh:
            spans = provider(collector, share)
            stack.callback(spans.shutdown)
            return await stack.enter_async_context(
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

        few, every = await client(0.01), await client(1.0)
        bare, contrib = await server("bare", SERVICE, 0.0), await server("contrib", SERVICE, 1.0)
        await few.transport.ready()
        identity = few.transport.identity
        assert identity is not None
        raw = await stack.enter_async_context(few.transport.open_channel(f"127.0.0.1:{bare.ready}", SERVICE))
        spans = provider(collector, 1.0)
        stack.callback(spans.shutdown)
        traced = await stack.enter_async_context(
            grpc.aio.secure_channel(
                f"127.0.0.1:{contrib.ready}",
                identity.channel_credentials(),
                options=_options(identity),
                interceptors=aio_client_interceptors(tracer_provider=spans),
            )
        )
        arms = {
            "raw": Arm(raw_unary([raw]), bare),
            "raw again": Arm(raw_unary([raw]), bare),
            "contrib": Arm(raw_unary([traced]), contrib),
        }
        for name, mesh, service, share in (("1%", few, RARELY, 0.01), ("100%", every, SAMPLED, 1.0)):
            there = await server("mesh", service, share)
            channel = mesh.channel(service)
            while not any(state.endpoints for state in mesh.state().services if state.service == service):
                await mesh.changed()
            arms[name] = Arm(mesh_unary(channel), there)
        yield arms


def _options(identity: Identity) -> list[tuple[str, object]]:
    name = identity.principal.dns_name.replace(CALLER, SERVICE, 1)
    return merge_options(CHANNEL_OPTIONS, authenticating_options(name))


async def _slice(arm: Arm, load: Load) -> Cost:
    before = await arm.server.ask("cpu")
    made = await run_slice(arm.operation, load)
    return Cost(made.p50, made.cpu, (await arm.server.ask("cpu") - before) / load.calls)


def _figures(load: Load, rounds: list[dict[str, Cost]]) -> list[Figure]:
    figures = []
    for field, what in (("p50", "p50"), ("client", "client CPU"), ("server", "server CPU")):
        taken = [{arm: getattr(cost, field) for arm, cost in arms.items()} for arms in rounds]
        raw = [(arms["raw"] + arms["raw again"]) / 2 for arms in taken]
        name, about = f"{load.name}.{field}", f"{load.about}: {what}"
        cpu = field != "p50"
        for arm, key, goal in (
            ("1%", "few", GOAL if cpu else None),
            ("100%", "all", None),
            ("contrib", "contrib", None),
        ):
            ratios = [arms[arm] / base for arms, base in zip(taken, raw, strict=True)]
            figures.append(Figure.of_rounds(f"{name}.{key}", ratios, "x", f"{about}, {_NAMES[arm]} / raw", goal))
        against = [arms["100%"] / arms["contrib"] for arms in taken]
        figures += [
            Figure.of_rounds(
                f"{name}.contest", against, "x", f"{about}, everything on, all sampled / contrib", 1.0 if cpu else None
            ),
            Figure.of_rounds(
                f"{name}.control", [arms["raw again"] / arms["raw"] for arms in taken], "x", f"{about}, raw / raw"
            ),
        ]
    return figures


_NAMES = {"1%": "everything on, 1% sampled", "100%": "everything on, all sampled", "contrib": "contrib interceptors"}


async def cost(quick: bool) -> list[Figure]:
    """Unary calls, 1 and 16 at a time."""
    random = Random(1)
    async with _arms() as arms:
        for load in LOADS:  # connections, caches and the allocator warm up
            for arm in arms.values():
                await _slice(arm, load)
        measured: dict[str, list[dict[str, Cost]]] = {load.name: [] for load in LOADS}
        for _ in range(5 if quick else 25):
            for load in LOADS:
                order = random.sample(list(arms), len(arms))
                measured[load.name].append({name: await _slice(arms[name], load) for name in order})
    return [figure for load in LOADS for figure in _figures(load, measured[load.name])]
