"""What it costs a server to know who calls and to ask its rules: guarded calls against bare ones, with mutual TLS.

The same client, through grpc's own channels, calls a server of grpc's own and one of the mesh's in one process. Each
round runs a slice through every arm, in random order: bare, bare again (the A/A control) and guarded.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from random import Random

from benchmarks.calls import SERVICE, UNARY, Load, Operation, Slice, raw_unary, run_slice
from benchmarks.figures import Figure
from benchmarks.processes import Child, child
from benchmarks.secure_calls import CALLER, connect, joining_environment

LOADS = tuple(replace(load, name=f"guard.{load.name}") for load in UNARY[:2])


async def _server_slice(server: Child, operation: Operation, load: Load) -> Slice:
    """A slice with the CPU time of the server in place of the client's."""
    before = await server.ask("cpu")
    made = await run_slice(operation, load)
    return replace(made, cpu=(await server.ask("cpu") - before) / load.calls)


def _figures(load: Load, rounds: list[dict[str, Slice]]) -> list[Figure]:
    figures = []
    for field, what in (("p50", "p50"), ("cpu", "server CPU")):
        taken = [{arm: getattr(made, field) for arm, made in arms.items()} for arms in rounds]
        ratios = [2 * arms["guarded"] / (arms["bare"] + arms["bare again"]) for arms in taken]
        controls = [arms["bare again"] / arms["bare"] for arms in taken]
        extra = [(arms["guarded"] - (arms["bare"] + arms["bare again"]) / 2) * 1e6 for arms in taken]
        name, about = f"{load.name}.{field}", f"{load.about}: {what}"
        figures += [
            Figure.of_rounds(name, ratios, "x", f"{about}, guarded / bare"),
            Figure.of_rounds(f"{name}.control", controls, "x", f"{about}, bare / bare"),
            Figure.of_rounds(f"{name}.extra", extra, "us", f"{about}, guarded - bare"),
        ]
    return figures


async def cost(quick: bool) -> list[Figure]:
    """Unary calls, 1 and 16 at a time."""
    random = Random(1)
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(child("benchmarks.secure_plane_process", SERVICE, CALLER))
        environment = joining_environment(plane)
        server = await stack.enter_async_context(child("benchmarks.guarded_server_process", environment=environment))
        mesh = await stack.enter_async_context(connect(plane))
        await mesh.transport.ready()
        bare, guarded = [
            await stack.enter_async_context(mesh.transport.open_channel(f"127.0.0.1:{server.ready[name]}", SERVICE))
            for name in ("bare", "guarded")
        ]
        arms = {"bare": raw_unary([bare]), "bare again": raw_unary([bare]), "guarded": raw_unary([guarded])}
        for load in LOADS:  # connections, caches and the allocator warm up
            for operation in arms.values():
                await run_slice(operation, load)
        measured: dict[str, list[dict[str, Slice]]] = {load.name: [] for load in LOADS}
        for _ in range(5 if quick else 25):
            for load in LOADS:
                order = random.sample(list(arms), len(arms))
                measured[load.name].append({arm: await _server_slice(server, arms[arm], load) for arm in order})
    return [figure for load in LOADS for figure in _figures(load, measured[load.name])]
