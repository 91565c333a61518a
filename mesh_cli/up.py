"""`mesh up`: the demo's system, running until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from mesh_cli.demo import require_shop
from mesh_cli.output import add_row, console, table
from mesh_client.core.events.topology import OPERATOR
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal

if TYPE_CHECKING:
    from rich.console import Console

    from mesh_cli.demo.system import System


_LEAF_LIFETIME = 86_400


def up(*, consul: bool) -> int:
    """Runs the system until Ctrl-C or SIGTERM; returns the exit code.

    Raises:
        MeshError: it cannot run; the message says what is missing.
    """
    require_shop()
    from mesh_cli.demo.run import run_interruptible

    return run_interruptible(lambda: _up(consul))


async def _up(consul: bool) -> int:
    from mesh_cli.demo.run import running_system

    out = console()
    out.print("starting ...")
    async with running_system(consul, _LEAF_LIFETIME, tracing=True) as (system, _):
        _describe(system, out, await system.identities.dashboard_link())
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        out.print("stopping ...")
        await system.stop_all()
    return 0


def _describe(system: System, out: Console, link: str) -> None:
    rows = table("instance", "identity", "address", "process", "log")
    for instance in system.instances:
        identity = Principal.service(DEFAULT_TRUST_DOMAIN, instance.service).spiffe_id
        add_row(rows, instance.name, identity, instance.address, str(instance.process.pid), str(instance.process.log))
    out.print(rows)
    out.print(f"\ncontrol plane  {system.address}, enrolment {system.enrolment_address}")
    out.print(f"operator       {system.identities.operator}", soft_wrap=True)
    out.print(f"dashboard      {link}", soft_wrap=True)
    out.print("               That link signs you in, once, within a minute; `mesh dashboard` writes another.")
    if system.edge_url:
        out.print(f"edge           {system.edge_url}, its API at {system.edge_url}/openapi.json", soft_wrap=True)
    if system.consul_address:
        out.print(f"Consul         http://{system.consul_address}/ui/")
    victim = system.of("orders")[0]
    order = """-d '{"idempotencyKey": "mine", "sku": "espresso-beans", "quantity": 1}'"""
    rest = f"\n  curl {system.edge_url}/v1/orders {order}" if system.edge_url else ""
    broker = {} if system.broker is None else system.broker.environment(OPERATOR)
    exports = "".join(f"\n  export {name}={value}" for name, value in broker.items())
    letters = "\n  mesh events status shipping\n  mesh events dead list shipping" if broker else ""
    outage = " ".join(str(instance.process.pid) for instance in system.of("payments"))
    out.print(
        f"""
Try in another terminal:
  export MESH_CONTROL_PLANE={system.address}
  export MESH_OPERATOR={system.identities.operator}{exports}
  mesh dashboard           # a link to look at all of it in a browser
  mesh status --watch
  mesh endpoints orders
  mesh trace               # once there are calls{rest}
  mesh policy get orders
  mesh policy check reviews shop.v1.PaymentService/Charge
  mesh logs orders --follow{letters}
  mesh ca status           # who is who, with every certificate
  kill -9 {victim.process.pid}       # {victim.name} dies
  kill -STOP {victim.process.pid}    # or hangs; -CONT lets it go on
  kill -USR1 {outage}    # payments fails as a whole; -USR2 ends that
Logs and databases are in {system.directory} until this ends. Ctrl-C stops everything.""",
        soft_wrap=True,
    )
